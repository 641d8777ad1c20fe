"""Averaged weights: what is averaged and how, by hand from the weights of every step."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from whole_runs import Place, figures, last

NORMED = """
import torch
from torch import nn


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layers = nn.BatchNorm1d(8, momentum=0.5), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("newest", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)  # another tensor in each step
            self.newest.copy_(x.detach()[0])
        return self.layers(self.norm(x))
"""
STEPS = 24


@pytest.fixture(scope="module")
def normed(place: Place) -> Place:
    place.write("normed.py", NORMED)
    return place


def settings(decay: float | None) -> dict[str, object]:
    return {
        "modules": ["toy", "normed"], "model": {"name": "Normed"}, "optimizer.lr": 0.5, "trainer.ema_decay": decay,
        "trainer.max_epochs": 3, "trainer.checkpoint_every_steps": 1, "trainer.keep_last": STEPS + 1,
        "loaders.train.size": 32, "trainer.pictures": False,
    }  # fmt: skip


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def by_hand(run: Path, decay: float, start: dict[str, np.ndarray], first: int, steps: int) -> dict[str, np.ndarray]:
    average = {name: value.astype(np.float64) for name, value in start.items()}
    for number in range(steps):
        keeps = min(decay, (1 + number) / (10 + number))
        for name, value in weights(run, first + number).items():
            copied = name in ("seen", "newest", "norm.num_batches_tracked")
            average[name] = value if copied else keeps * average[name] + (1 - keeps) * value
    return average


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_of_every_step_by_hand(normed: Place, decay: float) -> None:
    """The initial weights have a share of 1e-9 at the end, so any may be taken for them."""
    name = f"ramp-{decay}"
    normed.run(normed.config(name, **settings(decay)))
    run = normed.path(name)
    found, newest = load_file(run / "checkpoints" / "last" / "ema.safetensors"), weights(run, STEPS)
    expected = by_hand(run, decay, weights(run, 1), 1, STEPS)
    assert found.keys() == expected.keys() == newest.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    assert found["seen"] == newest["seen"] == STEPS * 4 and found["norm.num_batches_tracked"] == STEPS
    assert not np.allclose(found["norm.running_mean"], newest["norm.running_mean"], rtol=1e-3)
    assert last(run).state["averaged"] == STEPS


def test_a_short_training_with_a_long_average_validates_like_its_weights(normed: Place) -> None:
    """With 0.999 of the old average kept from the start, 2 % of the way would be gone after 24 steps."""
    for name, decay in (("long", 0.999), ("none", None)):
        normed.run(normed.config(name, **settings(decay)))
    averaged, raw = (figures(normed.path(name))["val/loss"] for name in ("long", "none"))
    assert raw[8] < 0.9, "it learns; log(3) is chance"
    assert averaged[STEPS] == pytest.approx(raw[STEPS], abs=0.1)


def test_an_average_that_begins_later_begins_with_the_weights_that_were_reached(normed: Place) -> None:
    normed.run(normed.config("before", **settings(None)))
    resumed = normed.config("after", **settings(0.99) | {"trainer.max_epochs": 4})
    normed.run(resumed, f"trainer.resume={normed.path('before')}/checkpoints/last")
    run = normed.path("after")
    expected = by_hand(run, 0.99, weights(normed.path("before"), STEPS), STEPS + 1, 8)
    found = load_file(run / "checkpoints" / "last" / "ema.safetensors")
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
