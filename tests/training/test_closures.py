"""Optimizers that evaluate the loss themselves: LBFGS and a SAM as others write it, by the side of plain loops."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from whole_runs import Place, equal, figures, last

from dtrain.config.errors import ConfigError
from dtrain.training.closure import asks_for_closure
from dtrain.training.finite_step import NonFiniteError

pytestmark = pytest.mark.timeout(600)

# A SAM as it is published (davda54/sam): its signature does not say that it needs a closure.
MINE = '''
import torch
from torch import nn


class Line(nn.Module):
    """A model that begins with the same weights, wherever it is built."""

    def __init__(self, dropout=0.0, bad_call=-1):
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 3), nn.Dropout(dropout)
        self.calls, self.bad_call = 0, bad_call
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(24.0).reshape(3, 8).sin())
            self.layer.bias.zero_()

    def forward(self, x):
        self.calls += self.training
        factor = float("nan") if self.training and self.calls == self.bad_call else 1.0
        return self.dropout(self.layer(x)) * factor


class SAM(torch.optim.SGD):
    def __init__(self, params, lr, rho):
        super().__init__(params, lr)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        parameters = [item for group in self.param_groups for item in group["params"]]
        norm = torch.cat([item.grad.flatten() for item in parameters]).norm()
        before = [item.clone() for item in parameters]
        for item in parameters:
            item.add_(item.grad, alpha=self.rho / float(norm))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for item, old in zip(parameters, before):
            item.copy_(old)
        super().step()
'''
PLAIN: dict[str, Any] = {
    "modules": ["bent", "toy"], "model": {"name": "Line"}, "loaders.shuffle": False,
    "loaders.train": {"size": 29}, "trainer.accumulate": 2, "trainer.pictures": False,
}  # fmt: skip
LBFGS = {"name": "LBFGS", "lr": 0.1, "max_iter": 3}  # at larger rates it amplifies rounding


def points() -> tuple[Tensor, Tensor]:
    x = torch.randn(29, 8, generator=torch.Generator().manual_seed(0))
    return x, (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)


def plain_loop(make: Callable[[list[Tensor]], Any], epochs: int) -> list[Tensor]:
    """The same training with torch's own means, steps of eight points; the weights."""
    x, y = points()
    weight, bias = torch.arange(24.0).reshape(3, 8).sin().requires_grad_(), torch.zeros(3, requires_grad=True)
    optimizer = make([weight, bias])
    for _ in range(epochs):
        for at in range(0, 29, 8):

            def closure(at: int = at) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(x[at : at + 8] @ weight.T + bias, y[at : at + 8])
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)
    return [weight, bias]


@pytest.fixture
def train(here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (tmp_path / "bent.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "bent", raising=False)
    return lambda name, **changes: here(name, **PLAIN | changes)


def test_lbfgs_is_given_the_loss_of_the_whole_step(place: Place) -> None:
    """One rank, and two; each step is of two batches per rank, the last one of an epoch of five points."""
    place.write("bent.py", MINE)
    config = place.config("lbfgs", **PLAIN | {"optimizer": LBFGS, "trainer.max_epochs": 1})
    place.run(config)
    two = ["loaders.batch_size=2", "trainer.checkpoint_dir=run-lbfgs-two", "loaders.train.batch_size=2"]
    place.run(config, *two, ranks=2)
    expected = plain_loop(lambda items: torch.optim.LBFGS(items, lr=0.1, max_iter=3), 1)
    x, y = points()
    first = F.cross_entropy(x[:8] @ torch.arange(24.0).reshape(3, 8).sin().T, y[:8])
    for run in (place.path("lbfgs"), place.path("lbfgs-two")):
        found = last(run)
        assert found.state["step"] == 4
        for value, name in zip(expected, ("layer.weight", "layer.bias"), strict=True):
            torch.testing.assert_close(found.weights[name], value.detach(), rtol=1e-3, atol=1e-4)
        assert figures(run)["train/loss"][1] == pytest.approx(float(first), rel=1e-5)  # of the first evaluation


def test_lbfgs_resumes_with_its_history_and_the_same_dropout(place: Place) -> None:
    place.write("bent.py", MINE)
    settings = PLAIN | {"model": {"name": "Line", "dropout": 0.3}, "optimizer": LBFGS, "loaders.batch_size": 2}
    settings |= {"loaders.shuffle": True, "lr_scheduler": None}
    whole, parts = place.config("lbfgs-whole", **settings), place.config("lbfgs-parts", **settings)
    place.run(whole, "trainer.max_steps=6", ranks=2)
    place.run(parts, "trainer.max_steps=3", ranks=2)
    place.run(parts, "trainer.max_steps=6", ranks=2)
    one, other = last(place.path("lbfgs-whole")), last(place.path("lbfgs-parts"))
    assert len(one.state["optimizer"]["state"][0]["old_dirs"]) > 3
    assert equal(one.weights, other.weights)
    assert all(equal(one.state[key], other.state[key]) for key in ("optimizer", "rng", "sums"))


@pytest.mark.slow
def test_a_sam_whose_signature_does_not_say_so_is_given_a_closure_on_request(train: Callable[..., Path]) -> None:
    sam = {"name": "SAM", "lr": 0.1, "rho": 0.2}
    run = train("bent-sam", **{"optimizer": sam, "trainer.closure": True})
    sys.modules.pop("bent")
    import bent

    expected = plain_loop(lambda items: bent.SAM(items, lr=0.1, rho=0.2), 2)
    for value, name in zip(expected, ("layer.weight", "layer.bias"), strict=True):
        torch.testing.assert_close(last(run).weights[name], value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_closure_whose_loss_is_not_finite_leaves_the_weights_as_they_were(train: Callable[..., Path]) -> None:
    """The 13th call is in the second step: two batches, then their evaluations again. Line counts calls in training."""
    spoilt = {"optimizer": LBFGS, "model": {"name": "Line", "bad_call": 13}}
    run = train("bent-skip", **spoilt | {"trainer.on_nonfinite": "skip", "trainer.max_steps": 2})
    once = train("bent-once", **{"optimizer": LBFGS, "trainer.max_steps": 1})
    assert equal(last(run).weights, last(once).weights) and last(run).state["skipped"] == 1
    assert equal(last(run).state["optimizer"], last(once).state["optimizer"])
    with pytest.raises(NonFiniteError, match=r"step 2: loss or gradient not finite .*the weights are those of before"):
        train("bent-stop", **spoilt)


@pytest.mark.slow
def test_what_a_closure_cannot_be_combined_with_is_said(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"LBFGS evaluates the loss itself, which torch's scaler of fp16 does not"):
        train("bent-fp16", **{"optimizer": LBFGS, "trainer.precision": "fp16"})
    with pytest.raises(AssertionError, match="requires closure"):
        train("bent-without", **{"optimizer": {"name": "SAM", "lr": 0.1, "rho": 0.2}})


@pytest.mark.parametrize(("name", "asks"), [("AdamW", False), ("SGD", False), ("LBFGS", True)])
def test_a_scheduler_around_its_step_makes_no_optimizer_ask_for_a_closure(name: str, asks: bool) -> None:
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert asks_for_closure(optimizer) is asks
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert asks_for_closure(optimizer) is asks
