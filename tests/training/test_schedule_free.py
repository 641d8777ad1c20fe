"""Optimizers that train some weights and mean others by their result (Defazio et al., 2024): train(), eval()."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from whole_runs import Place, equal, figures, last

pytestmark = pytest.mark.timeout(600)

# The weights are y = 0.9 x + 0.1 z in training, where gradients are taken, and x in evaluation.
MINE = '''
import torch
from torch import nn


class Line(nn.Module):
    """A model that begins with the same weights, wherever it is built."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 3), nn.Dropout(dropout)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(24.0).reshape(3, 8).sin())
            self.layer.bias.zero_()

    def forward(self, x):
        return self.dropout(self.layer(x))


class SGDScheduleFree(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "step": 0, "train_mode": False})

    def _to(self, train_mode):
        for group in self.param_groups:
            for item in group["params"] if group["train_mode"] is not train_mode else ():
                if "z" in self.state[item]:
                    share = 1 - group["beta"] if train_mode else 1 - 1 / group["beta"]
                    item.lerp_(self.state[item]["z"], share)
            group["train_mode"] = train_mode

    @torch.no_grad()
    def train(self):
        self._to(True)

    @torch.no_grad()
    def eval(self):
        self._to(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "Optimizer was not in train mode when step is called"
            group["step"] += 1
            for item in group["params"]:
                z = self.state[item].setdefault("z", item.clone())
                share = 1 / group["step"]
                x = (item - (1 - group["beta"]) * z) / group["beta"]
                z -= group["lr"] * item.grad
                x.lerp_(z, share)
                item.copy_(group["beta"] * x + (1 - group["beta"]) * z)
'''
SETTINGS: dict[str, Any] = {
    "modules": ["without_schedule", "toy"], "model": {"name": "Line"}, "loaders.shuffle": False,
    "loaders.train": {"size": 29}, "loaders.test": {"size": 7, "seed": 2}, "trainer.pictures": False,
    "optimizer": {"name": "SGDScheduleFree", "lr": 0.5}, "loaders.batch_size": 4,
}  # fmt: skip


def by_hand(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights after so many steps of eight points, without a bias: x, as the paper writes it, and y."""
    points = torch.randn(29, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32).double()
    labels = (points.float() @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    points = torch.cat([points, torch.ones(29, 1)], 1).double()
    x = torch.cat([torch.arange(24.0).reshape(3, 8).sin(), torch.zeros(3, 1)], 1).double()
    z = x.clone()
    for step in range(steps):
        rows = slice(step % 4 * 8, min(step % 4 * 8 + 8, 29))
        y = (0.9 * x + 0.1 * z).requires_grad_()
        F.cross_entropy(points[rows] @ y.T, labels[rows]).backward()
        z = z - 0.5 * y.grad
        x = x + (z - x) / (step + 1)
    return x, 0.9 * x + 0.1 * z


def test_the_averages_are_what_is_validated_tested_and_saved(place: Place) -> None:
    place.write("without_schedule.py", MINE)
    config = place.config("schedule-free", **SETTINGS)
    place.run(config, "trainer.max_steps=6", ranks=2)
    run = last(place.path("schedule-free"))
    x, y = by_hand(6)
    assert run.ema is not None
    for found, expected in ((run.ema, x), (run.weights, y)):
        both = torch.cat([found["layer.weight"], found["layer.bias"][:, None]], 1).double()
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    points = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    labels = (points @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    loss = F.cross_entropy(torch.cat([points, torch.ones(11, 1)], 1).double() @ x.T, labels)
    assert figures(place.path("schedule-free"))["val/loss"][6] == pytest.approx(float(loss), rel=1e-5)
    result = place.run("test", config)
    tested = f"loss {figures(place.path('schedule-free'))['test/loss'][6]:.4f}"
    assert tested in result.stdout + result.stderr


def test_it_resumes_bit_for_bit_however_often_it_was_validated(place: Place) -> None:
    place.write("without_schedule.py", MINE)
    settings = SETTINGS | {"model": {"name": "Line", "dropout": 0.3}}
    whole, parts = place.config("free-whole", **settings), place.config("free-parts", **settings)
    place.run(whole, "trainer.max_steps=6", ranks=2)
    often = ["trainer.validate_every_steps=1", "trainer.max_steps=3"]
    place.run(parts, *often, ranks=2)
    place.run(parts, "trainer.max_steps=6", ranks=2)
    one, other = last(place.path("free-whole")), last(place.path("free-parts"))
    assert equal(one.weights, other.weights) and equal(one.ema, other.ema)
    assert equal(one.state["optimizer"], other.state["optimizer"])


def test_a_second_average_is_refused(place: Place) -> None:
    place.write("without_schedule.py", MINE)
    config = place.config("free-ema", **SETTINGS | {"trainer.ema_decay": 0.9})
    result = place.run(config, expect=2)
    assert "trainer.ema_decay: SGDScheduleFree averages the weights itself; remove one of the two" in result.stderr
