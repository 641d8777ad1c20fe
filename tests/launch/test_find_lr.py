"""dtrain check --find-lr: the ramp and the suggestion, by a plain torch loop; nothing is trained by it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result
from PIL import Image
from torch import nn
from whole_runs import Place, equal

MODEL = """
import torch
from torch import nn


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 24).view(3, 8))
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x)
"""
SETTINGS: dict[str, Any] = {
    "modules": ["toy", "fixed"], "model": {"name": "Fixed"}, "loaders.shuffle": False, "loaders.batch_size": None,
    "loaders.global_batch_size": 4, "loaders.train": {"size": 32}, "optimizer": {"name": "SGD", "lr": 0.3},
    "lr_scheduler": {"name": "StepLR", "step_size": 1, "warmup_steps": 50},
}  # fmt: skip


def by_hand() -> tuple[list[float], list[float]]:
    """The rates and losses of a loop in plain torch, 100 steps from 1e-7 to 10."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    model = nn.Linear(8, 3)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 24).view(3, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates, losses = np.geomspace(1e-7, 10, 100).tolist(), []
    for number, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        low = 4 * number % 32
        loss = nn.functional.cross_entropy(model(x[low : low + 4]), y[low : low + 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rates, losses


@pytest.mark.slow
def test_the_curve_and_the_suggestion_are_those_of_a_plain_loop(place: Place) -> None:
    place.write("fixed.py", MODEL)
    picture = place.folder / "find-lr.png"  # of one after another
    for ranks, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        name = f"find-lr-{ranks}-{strategy}"
        done = place.run(
            "check", place.config(name, **SETTINGS | {"trainer.strategy": strategy}), "--find-lr", ranks=ranks
        )
        check_curve(picture, done)
        picture.unlink()
        assert not place.path(name).exists()


def check_curve(file: Path, done: Result) -> None:
    picture = Image.open(file)
    rates, losses = by_hand()
    assert json.loads(picture.info["rates"]) == pytest.approx(rates)
    assert json.loads(picture.info["losses"]) == pytest.approx(losses, rel=1e-4)
    assert picture.width > 400
    average, smooth = 0.0, []
    for number, loss in enumerate(losses, 1):  # fastai's and Lightning's smoothing, with their 0.98
        average = 0.98 * average + 0.02 * loss
        smooth.append(average / (1 - 0.98**number))
    steepest = 10 + int(np.argmin(np.gradient(np.array(smooth[10:-1]))))
    (found,) = re.findall(r"optimizer\.lr=(\S+) is suggested", done.stdout)
    assert math.isclose(float(found), rates[steepest], rel_tol=0.05), done.text


@pytest.mark.slow
def test_weights_optimizer_and_random_numbers_are_put_back(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whole_runs import write_config

    from dtrain import create_trainer, load_config
    from dtrain.launch.find_lr import find_lr, keep

    changes = {"optimizer": {"name": "AdamW", "lr": 0.01}, "model": {"name": "MLP", "dropout": 0.5, "norm": True}}
    trainer = create_trainer(load_config(write_config(tmp_path, "kept", changes)))
    before, rate = keep(trainer), trainer.optimizer.param_groups[0]["lr"]
    lines = list(find_lr(trainer, before))
    assert lines[-1] == "learning rate: the curve is in find-lr.png"
    after = keep(trainer)
    assert equal(before.states, after.states)
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    assert not trainer.optimizer.state
    assert torch.equal(torch.get_rng_state(), before.generators["torch"])
