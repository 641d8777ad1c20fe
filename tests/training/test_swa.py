"""trainer.swa: the mean of weights at epochs' ends, its BatchNorm statistics and rates, by hand; stopped, resumed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from whole_runs import Place, equal, figures, last, write_config

from dtrain.checkpoint.checkpoint_files import load
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config

MODEL = """
import os
import signal

import torch
from torch import nn


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=0.5), nn.Linear(6, 3)
        self.is_due = "STOP_IN_PASS" in os.environ and os.environ.get("RANK", "0") == "1"

    def forward(self, x):
        if self.training and not torch.is_grad_enabled() and self.is_due:
            self.is_due = False
            os.kill(os.getpid(), signal.SIGTERM)
        return self.last(self.norm(self.first(x)).tanh())
"""
EPOCHS, START, PER_EPOCH, BATCH, RANKS = 5, 2, 4, 4, 2  # 29 samples; the last batch of all ranks has 3 and 2
SETTINGS: dict[str, Any] = {
    "modules": ["toy", "averaged"], "model": {"name": "Averaged"}, "loaders.shuffle": False,
    "loaders.batch_size": BATCH,
    "loaders.train": {"size": 29}, "optimizer": {"name": "SGD", "lr": 0.4, "momentum": 0.9}, "trainer.pictures": False,
    "lr_scheduler": {"name": "ExponentialLR", "gamma": 0.9}, "trainer.max_epochs": EPOCHS, "trainer.keep_last": EPOCHS,
    "trainer.swa": {"start_epoch": START, "lr": 0.05, "anneal_epochs": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def averaged(place: Place) -> Place:
    place.write("averaged.py", MODEL)
    return place


def whole(place: Place) -> Path:
    def train() -> str:
        place.run(place.config("swa", **SETTINGS), ranks=RANKS)
        return str(place.path("swa"))

    return Path(place.once("swa", train))


def weights(run: Path, epoch: int, file: str = "model") -> dict[str, torch.Tensor]:
    loaded = load(run / "checkpoints" / f"step-{epoch * PER_EPOCH:08d}")
    return (loaded.ema or {}) if file == "ema" else loaded.weights


@pytest.mark.slow
def test_the_mean_of_epochs_ends_and_its_statistics_by_hand(averaged: Place) -> None:
    run = whole(averaged)
    assert not (run / "checkpoints" / f"step-{PER_EPOCH:08d}" / "ema.safetensors").exists()
    for epoch in range(START, EPOCHS + 1):
        found = weights(run, epoch, "ema")
        of_epochs = [weights(run, number) for number in range(START, epoch + 1)]
        mean = {name: torch.stack([each[name].double() for each in of_epochs]).mean(0) for name in found}
        for name in (name for name in found if "running" not in name and "batches" not in name):
            np.testing.assert_allclose(found[name], mean[name], rtol=1e-5, atol=1e-6, err_msg=name)
        points = torch.randn(29, 8, generator=torch.Generator().manual_seed(0)).double()  # as toy.Points has them
        hidden = points @ mean["first.weight"].T + mean["first.bias"]
        step = BATCH * RANKS
        batches = [hidden[low : low + step][rank::RANKS] for low in range(0, 29, step) for rank in range(RANKS)]
        variances = sum(len(batch) * batch.var(0, unbiased=True) for batch in batches) / 29
        np.testing.assert_allclose(found["norm.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["norm.running_var"], variances, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_mean_is_what_is_validated(averaged: Place) -> None:
    run = whole(averaged)
    state = weights(run, EPOCHS, "ema")
    x = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    hidden = torch.nn.functional.linear(x, state["first.weight"], state["first.bias"])
    hidden = (hidden - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt()
    hidden = (hidden * state["norm.weight"] + state["norm.bias"]).tanh()
    loss = torch.nn.functional.cross_entropy(hidden @ state["last.weight"].T + state["last.bias"], y)
    assert figures(run)["val/loss"][EPOCHS * PER_EPOCH] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_rates_are_those_of_swalr(averaged: Place) -> None:
    """As PyTorch's documentation uses it: the scheduler up to the start, SWALR from then on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    expected = []
    for epoch in range(1, EPOCHS + 1):
        if epoch == START:
            scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = figures(whole(averaged))["lr"]
    assert [found[epoch * PER_EPOCH] for epoch in range(1, EPOCHS + 1)] == pytest.approx(expected)
    assert math.isclose(expected[-1], 0.05)


@pytest.mark.slow
def test_stopped_while_statistics_are_taken_it_resumes_to_the_same_bits(averaged: Place) -> None:
    config = averaged.config("swa-stopped", **SETTINGS)
    averaged.run(config, ranks=RANKS, env={"STOP_IN_PASS": "1"}, expect=75)
    stopped = last(averaged.path("swa-stopped")).state
    assert (stopped["step"], stopped["epoch"], stopped["averaged_epoch"]) == (START * PER_EPOCH, START - 1, START - 1)
    averaged.run(config, ranks=RANKS)
    one, other = last(whole(averaged)), last(averaged.path("swa-stopped"))
    assert equal(one.weights, other.weights)
    assert equal(one.ema, other.ema)
    assert {key for key in one.state if not equal(one.state[key], other.state[key])} == set()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainer.ema_decay": 0.9}, "trainer.swa: cannot be combined with 'ema_decay'"),
        ({"trainer.swa": {"lr": 0.1}}, "missing required argument 'start_epoch'"),
        ({"trainer.swa": {"start_epoch": 0}}, "trainer.swa.start_epoch: must be at least 1, found 0"),
        ({"trainer.swa": {"start_epoch": 1, "swa_lr": 0.1}}, "got an unexpected argument 'swa_lr'"),
    ],
)
def test_what_cannot_be_is_one_message(tmp_path: Path, changes: Any, told: str) -> None:
    with pytest.raises(ConfigError) as found:
        check(load_config(write_config(tmp_path, "wrong", SETTINGS | {"modules": ["toy"]} | changes)))
    assert [told in str(mistake) for mistake in found.value.mistakes] == [True] or told in str(found.value)


@pytest.mark.slow
def test_sharded_it_is_the_same_average(averaged: Place) -> None:
    sharded = SETTINGS | {"trainer.strategy": "fsdp", "trainer.fsdp": {"min_parameters": 10}}
    averaged.run(averaged.config("swa-sharded", **sharded), ranks=RANKS)
    one, other = weights(whole(averaged), EPOCHS, "ema"), weights(averaged.path("swa-sharded"), EPOCHS, "ema")
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_statistics_that_are_frozen_stay_in_the_average(averaged: Place) -> None:
    averaged.run(averaged.config("swa-frozen", **SETTINGS | {"trainer.freeze": ["norm.*"], "trainer.max_epochs": 3}))
    steps = sorted((averaged.path("swa-frozen") / "checkpoints").glob("step-*"))
    found, newest = (load_file(steps[-1] / f"{file}.safetensors") for file in ("ema", "model"))
    assert found["norm.running_mean"].tolist() == newest["norm.running_mean"].tolist() == [0.0] * 6
    assert not found["first.weight"].equal(newest["first.weight"])
