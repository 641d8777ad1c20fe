"""Steps that a training_step takes itself: what of the loop's promises holds for them, and what is said of mistakes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import Place, close, equal, figures, last

from dtrain.config.errors import ConfigError
from dtrain.training.finite_step import NonFiniteError

pytestmark = pytest.mark.timeout(600)

MINE = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from dtrain.trainer import Trainer


class Own(Trainer):
    """Takes the very steps that the loop would take."""

    def training_step(self, batch):
        loss, terms, _ = self.forward(self.model, batch)
        self.minimize(loss)
        return loss, terms


class Pair(nn.Module):
    """Two layers, which two optimizers train; `late` counts the calls of the second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        with torch.no_grad():
            for layer, scale in ((self.first, 1.0), (self.second, 0.5)):
                layer.weight.copy_(scale * torch.arange(24.0).reshape(3, 8).sin())
                layer.bias.zero_()

    def forward(self, x):
        self.calls += self.training
        return self.first(x) + self.second(x)


class Turns(Trainer):
    """The first layer by the data, the second towards the first in every other step; NaN in one."""

    def __init__(self, parts, *, bad_step=-1, bad="second", **settings):
        super().__init__(parts, **settings)
        self.bad_step, self.bad = bad_step, bad

    def factor(self, name):
        return float("nan") if (self.step, self.bad) == (self.bad_step, name) else 1.0

    def training_step(self, batch):
        with self.autocast():
            loss, _, _ = self.forward(self.model, batch)
        self.minimize(loss * self.factor("first"), "first")
        if self.step % 2 == 0:
            gap = (self.module.second.weight - self.module.first.weight).square().mean()
            self.minimize(gap * self.factor("second"), "second")
            return {"gap": gap, "even": 2.0}
        return {"odd": loss}


class Nothing(Trainer):
    def training_step(self, batch):
        return {"value": 1.0}


class Several(Trainer):
    def training_step(self, batch):
        return self.forward(self.model, batch)[0]


class Misnamed(Trainer):
    def training_step(self, batch):
        self.minimize(self.forward(self.model, batch)[0], "frist")


class SAM(Trainer):
    def training_step(self, batch):
        loss, terms, _ = self.forward(self.model, batch)
        uphill = self.gradients(loss)
        torch._foreach_mul_(uphill, 0.2 / torch.nn.utils.get_total_norm(uphill))
        with torch.no_grad():
            torch._foreach_add_(self.parameters(), uphill)
        worst = self.gradients(self.forward(self.model, batch)[0])
        with torch.no_grad():
            torch._foreach_sub_(self.parameters(), uphill)
        self.apply_gradients(worst)
        return loss, terms


def without_first_class(samples):
    kept = [sample for sample in samples if sample[1] != 0]
    return default_collate(kept) if kept else None


without_first_class.kept_samples = len
'''
TWO = {
    "first": {"name": "SGD", "lr": 0.1, "match": "first.*"},
    "second": {"name": "SGD", "lr": 0.1, "match": "second.*"},
}
PAIR = {"model": {"name": "Pair"}, "optimizer": TWO}


@pytest.fixture
def train(here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (tmp_path / "steps.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "steps", raising=False)
    plain: dict[str, Any] = {"modules": ["steps", "toy"], "trainer.pictures": False}
    return lambda name, **changes: here(name, **plain | changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"loaders.collate_fn": "without_first_class"}], ids=["all", "left out"])
def test_steps_of_ones_own_are_the_loops(changes: dict[str, Any], train: Callable[..., Path]) -> None:
    """Two batches per step, the last one of an epoch shorter; terms, clipping, dropout; samples that are left out."""
    settings = {"loss.name": "Terms", "trainer.accumulate": 2, "trainer.clip_grad_norm": 0.5, **changes}
    settings |= {"model.dropout": 0.3, "model.norm": True, "optimizer": {"name": "AdamW", "lr": 0.02}}
    own, loops = train("own", **settings | {"trainer.name": "Own"}), train("loops", **settings)
    one, other = last(own), last(loops)
    assert one.weights.keys() == other.weights.keys()
    for name in one.weights:
        torch.testing.assert_close(one.weights[name], other.weights[name], rtol=1e-5, atol=1e-6)
    assert equal(one.state["rng"], other.state["rng"])
    close(figures(own), figures(loops))


@pytest.mark.slow
def test_several_optimizers_and_figures_of_some_steps(train: Callable[..., Path]) -> None:
    """Eight steps per epoch; a figure is the mean over the steps that give it."""
    settings = {"model": {"name": "Pair"}, "optimizer": TWO, "trainer.name": "Turns", "trainer.log_every_steps": 4}
    run = train("turns", **settings)
    logged = figures(run)
    assert set(logged["train/even"].values()) == {2.0} and set(logged["train/odd"]) == {4, 8, 12, 16}
    gap = (last(run).weights["second.weight"] - last(run).weights["first.weight"]).square().mean()
    assert float(gap) > 0 and logged["train/gap"][16] < logged["train/gap"][4]
    assert last(run).state["step"] == 16


@pytest.mark.slow
def test_a_part_of_a_step_that_is_not_finite(train: Callable[..., Path]) -> None:
    settings = {"model": {"name": "Pair"}, "optimizer": TWO, "trainer.name": "Turns", "trainer.bad_step": 2}
    text = r"step 3: second: loss or gradient not finite .*; first had stepped before"
    with pytest.raises(NonFiniteError, match=text):
        train("bad-stop", **settings)
    with pytest.raises(NonFiniteError, match=r"step 3: first: .*; the weights are those of before it"):
        train("bad-first", **settings | {"trainer.bad": "first"})
    skips = settings | {"trainer.on_nonfinite": "skip", "trainer.max_steps": 3}
    bad, good = train("bad-skip", **skips), train("bad-none", **skips | {"trainer.bad_step": -1})
    before = train("bad-before", **skips | {"trainer.max_steps": 2})
    weights, expected, old = (last(run).weights for run in (bad, good, before))
    assert equal(weights["first.weight"], expected["first.weight"])
    assert equal(weights["second.weight"], old["second.weight"]) and not equal(
        expected["second.weight"], old["second.weight"]
    )
    assert last(bad).state["skipped"] == 1 and float(weights["calls"]) == 2  # as it was before that step


@pytest.mark.slow
def test_fp16_scales_each_loss(train: Callable[..., Path]) -> None:
    settings = {"model": {"name": "Pair"}, "optimizer": TWO, "trainer.name": "Turns", "trainer.max_steps": 6}
    half, full = train("fp16", **settings | {"trainer.precision": "fp16"}), train("fp32", **settings)
    for name, value in last(full).weights.items():
        torch.testing.assert_close(last(half).weights[name], value, rtol=2e-2, atol=2e-3)
    assert last(half).state["scaler"]["scale"] > 1 and not last(half).state["skipped"]
    bad = train(
        "fp16-bad", **settings | {"trainer.precision": "fp16", "trainer.bad_step": 2, "trainer.on_nonfinite": "skip"}
    )
    assert last(bad).state["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainer.name": "Nothing"}, TypeError, r"a dict without a tensor 'loss' \(found: value\), and took no step"),
        (PAIR | {"trainer.name": "Several"}, ValueError, "several optimizers, so one must be named: first, second"),
        (PAIR | {"trainer.name": "Misnamed"}, ValueError, "no optimizer 'frist'; did you mean 'first'"),
        ({"trainer.name": "Misnamed"}, ValueError, "no optimizer 'frist'; there is a single one, which needs no name"),
        (PAIR | {"trainer.name": "Turns", "trainer.strategy": "fsdp"}, ConfigError, "here are several"),
        ({"trainer.name": "Own", "optimizer": {"name": "LBFGS"}}, ValueError, "with a closure evaluates training_step"),
    ],
)  # fmt: skip
def test_mistakes(changes: dict[str, Any], error: type[Exception], message: str, train: Callable[..., Path]) -> None:
    with pytest.raises(error, match=message):
        train("mistaken", **changes)


def test_sam_of_a_sharded_model_is_that_of_a_whole_one(place: Place) -> None:
    place.write("steps.py", MINE)
    settings = {"modules": ["steps", "toy"], "trainer.name": "SAM", "trainer.pictures": False, "trainer.max_steps": 6}
    runs = [place.config(f"sam-{each}", **settings | {"trainer.strategy": each}) for each in ("ddp", "fsdp")]
    for run in runs:
        place.run(run, ranks=2)
    close(figures(place.path("sam-ddp")), figures(place.path("sam-fsdp")))
    sharded = place.config("sam-fsdp-parts", **settings | {"trainer.strategy": "fsdp"})
    place.run(sharded, "trainer.max_steps=3", ranks=2)
    place.run(sharded, ranks=2)
    assert equal(last(place.path("sam-fsdp")).weights, last(place.path("sam-fsdp-parts")).weights)


def test_a_failed_step_of_ones_own_is_replayed(place: Place) -> None:
    place.write("steps.py", MINE)
    settings = {"modules": ["steps", "toy"], "trainer.name": "Own", "trainer.pictures": False, "loss.name": "Terms"}
    config = place.config("own-failed", **settings)
    place.run(config, do="train 3 rank 0 nan", expect=1)
    found = place.run("replay", str(place.path("own-failed")), do="train 1 rank 0 nan")
    assert "step 3 in epoch 1" in found.stdout + found.stderr
    assert "first bad output: trouble (Trouble); its input was finite" in found.stdout + found.stderr
    checked = place.run("check", config)
    assert "train: one batch forward and backward" in checked.stdout + checked.stderr
