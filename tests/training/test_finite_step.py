"""Steps whose loss or gradient is not finite: in any precision, with any optimizer, none is taken and each is told."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from whole_runs import WAIT_SECONDS, Place, figures, last, same_training

from dtrain.checkpoint.checkpoint_files import load

# Line's loss is the mean of a batch's numbers, while its weight is 1. ODD_SAMPLE makes its batch's loss NaN;
# ODD_GRADIENT the gradients of its batch, or of all, where the loss is finite.
ODD = """
import os
import signal
import torch
from torch import nn
from torch.utils.data import Dataset


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((1,), float(index)), index % 3


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        numbers = [int(value) for value in x.flatten()]
        result = self.weight * x
        if self.training:
            if "ODD_NOTES" in os.environ:
                with open(os.environ["ODD_NOTES"] + os.environ.get("RANK", ""), "a") as file:
                    print(*numbers, file=file)
            if int(os.environ.get("ODD_SAMPLE", -1)) in numbers:
                result = result * float("nan")
            if os.environ.get("ODD_GRADIENT") in ("all", *map(str, numbers)):
                result = result + torch.sqrt(0 * self.weight)
            self.mean = 0.9 * self.mean + 0.1 * result.detach().mean(0)  # another tensor in each step
            self.count += 1
            self.calls += 1
            if self.calls == int(os.environ.get("ODD_STOP", -1)):
                os.kill(os.getpid(), signal.SIGTERM)
        return result


class Steep(nn.Module):
    '''Its gradients are in the thousands, which times 65,536 is too much for fp16.'''

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, x):
        return self.layer(x / 29) * 512.0


def mean_of(output, target):
    return output.mean()
"""
NAN_SAMPLE = {"ODD_SAMPLE": "7"}
ALL_GRADIENTS = {"ODD_GRADIENT": "all"}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "modules": ["odd"], "model": {"name": "Line"}, "metrics": None, "loaders.val": None, "loss.name": "mean_of",
        "loaders": {"name": "Numbers", "batch_size": 4, "train": {"size": 29}}, "optimizer.lr": 0.0,
        "trainer.max_epochs": 3, "trainer.log_every_steps": 100, "trainer.pictures": False,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def odd(place: Place) -> Place:
    place.write("odd.py", ODD)
    return place


def noted(path: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in path.read_text().splitlines()]


FUSED = {"name": "AdamW", "lr": 0.0, "fused": True}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_left_out_of_the_loss_and_leaves_nothing(odd: Place, precision: str, fused: bool) -> None:
    name = f"left-out-{precision}-{fused}"
    notes = odd.folder / f"{name}.notes"
    changes = {"trainer.on_nonfinite": "skip", "trainer.precision": precision, "trainer.max_epochs": 1}
    changes |= {"optimizer": FUSED} if fused else {}
    result = odd.run(odd.config(name, **settings(**changes)), env={**NAN_SAMPLE, "ODD_NOTES": str(notes)})
    batches = noted(notes)
    assert sum(len(batch) for batch in batches) == 29
    good = [batch for batch in batches if 7 not in batch]
    number = 1 + next(index for index, batch in enumerate(batches) if 7 in batch)
    found = figures(odd.path(name))
    assert found["train/loss"] == {8: pytest.approx(mean(value for batch in good for value in batch))}
    assert found["skipped_steps"] == {8: 1.0}
    assert f"step {number}: loss or gradient not finite (gradient norm nan); skipped, 1 so far" in result.stdout
    saved = last(odd.path(name))
    running = 0.0
    for batch in good:
        running = 0.9 * running + 0.1 * mean(batch)
    assert saved.weights["mean"].item() == pytest.approx(running, rel=1e-5)
    assert saved.weights["count"].item() == len(good) == 7
    if precision == "fp16":  # the scale was not the reason
        assert saved.state["scaler"]["scale"] == 65536.0


def test_a_gradient_that_is_nan_in_every_step_stops_fp16_too(odd: Place) -> None:
    changes = {"trainer.precision": "fp16", "optimizer.lr": 0.1}
    result = odd.run(odd.config("nan-stop", **settings(**changes)), env=ALL_GRADIENTS, expect=1)
    assert (
        "NonFiniteError: step 17: gradient not finite in 17 steps in a row, however small fp16's scale" in result.text
    )
    assert json.loads((odd.path("nan-stop") / "run.json").read_text())["state"] == "FAILED"
    short = odd.config("nan-short", **settings(**changes, **{"trainer.max_steps": 5}))
    assert "NonFiniteError: none of 5 steps was taken" in odd.run(short, env=ALL_GRADIENTS, expect=1).text


def test_a_gradient_that_is_nan_in_every_step_is_counted_where_it_is_skipped(odd: Place) -> None:
    changes = {"trainer.precision": "fp16", "optimizer.lr": 0.1, "trainer.on_nonfinite": "skip"}
    result = odd.run(odd.config("nan-skip", **settings(**changes)), env=ALL_GRADIENTS)
    found, saved = figures(odd.path("nan-skip")), last(odd.path("nan-skip"))
    assert found["skipped_steps"] == {8: 8.0, 16: 16.0, 24: 24.0}
    assert "train/loss" not in found
    assert saved.weights["weight"].item() == 1.0 and saved.weights["count"].item() == 0
    assert saved.state["scaler"]["scale"] == 65536.0, "what was taken from it for nothing is put back"
    assert "warning: none of 24 steps was taken" in result.stdout


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_true_overflow_lowers_the_scale_and_the_training_goes_on(odd: Place, policy: str) -> None:
    changes = {"model": {"name": "Steep"}, "loss": {"name": "CrossEntropyLoss"}, "optimizer.lr": 1e-9}
    changes |= {"trainer.precision": "fp16", "trainer.on_nonfinite": policy}
    result = odd.run(odd.config(f"steep-{policy}", **settings(**changes)))
    state = last(odd.path(f"steep-{policy}")).state
    halvings = figures(odd.path(f"steep-{policy}"))["skipped_steps"][24]
    assert 1 <= halvings < 16
    assert state["scaler"]["scale"] == 65536.0 / 2**halvings
    assert "gradient too large for fp16, not taken" in result.stdout
    assert "warning" not in result.stdout


def test_a_fused_optimizer_names_the_true_step_and_stands_before_it(odd: Place) -> None:
    notes = odd.folder / "fused.notes"
    changes = {"optimizer": FUSED | {"lr": 0.1}, "trainer.log_every_steps": 8}
    env = {"ODD_GRADIENT": "7", "ODD_NOTES": str(notes)}
    result = odd.run(odd.config("fused", **settings(**changes)), env=env, expect=1)
    batches = noted(notes)
    assert len(batches) == 8, "the device knows, the host looks at the epoch's end"
    number = 1 + next(index for index, batch in enumerate(batches) if 7 in batch)
    assert f"NonFiniteError: step {number}: loss or gradient not finite (gradient norm nan)" in result.text
    card = json.loads((odd.path("fused") / "failure.json").read_text())
    assert (card["step"], card["samples"]) == (number - 1, batches[number - 1])
    kept = torch.load(next((odd.path("fused") / "failed-step").glob("step-*/state.pt")), weights_only=True)["state"]
    assert kept["step"] == number - 1 > 0
    before = odd.config("fused-before", **settings(**changes, **{"trainer.max_steps": number - 1}))
    odd.run(before, env={"ODD_GRADIENT": "none"})
    failed = next((odd.path("fused") / "failed-step").glob("step-*"))
    assert torch.equal(load(failed).weights["weight"], last(odd.path("fused-before")).weights["weight"])
    replayed = odd.run("replay", str(odd.path("fused")), env={"ODD_GRADIENT": "7"}).stdout
    assert f"samples {', '.join(map(str, batches[number - 1]))}" in replayed
    assert "gradients that are not finite: weight" in replayed
    # Nor is a later step saved, as if nothing had been.
    often = odd.config("fused-saved", **settings(**changes, **{"trainer.checkpoint_every_steps": 2}))
    odd.run(often, env=env, expect=1)
    assert last(odd.path("fused-saved")).state["step"] == (number - 1) // 2 * 2


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_one_ranks_bad_loss_is_no_overflow_on_any(odd: Place, policy: str) -> None:
    name, notes = f"ranks-{policy}", odd.folder / f"ranks-{policy}.notes"
    changes = {"trainer.precision": "fp16", "trainer.on_nonfinite": policy, "trainer.max_epochs": 1}
    env = {**NAN_SAMPLE, "ODD_NOTES": str(notes)}
    started = odd.start(odd.config(name, **settings(**changes)), ranks=2, env=env)
    results = [running.result(WAIT_SECONDS) for running in started]
    if policy == "stop":
        assert [result.rc for result in results] == [1, 1]
        logs = [(odd.path(name) / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
        assert all("loss or gradient not finite (gradient norm nan)" in log for log in logs)
        return
    assert [result.rc for result in results] == [0, 0]
    saved = last(odd.path(name)).state
    assert (saved["skipped"], saved["scaler"]["scale"]) == (1, 65536.0)
    steps = [[*one, *other] for one, other in zip(*(noted(Path(f"{notes}{rank}")) for rank in (0, 1)), strict=True)]
    good = [value for step in steps if 7 not in step for value in step]
    assert len(steps) == 4 and figures(odd.path(name))["train/loss"] == {4: pytest.approx(mean(good))}


def test_a_stop_between_a_skipped_step_and_its_figures_changes_nothing(odd: Place) -> None:
    notes = odd.folder / "sums.notes"
    changes = {"trainer.on_nonfinite": "skip", "optimizer": FUSED | {"lr": 0.1}}
    whole, parts = (odd.config(f"sums-{name}", **settings(**changes)) for name in ("whole", "parts"))
    odd.run(whole, env={**NAN_SAMPLE, "ODD_NOTES": str(notes)})
    number = 1 + next(index for index, batch in enumerate(noted(notes)) if 7 in batch)
    stop = 7
    assert number < stop < 8, "the epoch's end logs"
    odd.run(parts, env={**NAN_SAMPLE, "ODD_STOP": str(stop)}, expect=75)
    stopped = last(odd.path("sums-parts")).state
    assert (stopped["step"], stopped["skipped"], stopped["unsummed"]) == (7, 1, 4)
    odd.run(parts, env=NAN_SAMPLE)
    same_training(odd.path("sums-parts"), odd.path("sums-whole"))
    assert figures(odd.path("sums-parts")) == figures(odd.path("sums-whole"))
