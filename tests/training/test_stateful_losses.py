"""Losses with parameters, buffers or counters: trained, shared by ranks, averaged, saved and resumed as models are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from whole_runs import EXACT, Place, equal, figures, last, same_training

from dtrain.checkpoint.checkpoint_files import load
from dtrain.checkpoint.weights import load_weights

pytestmark = pytest.mark.timeout(600)

# What a user might write: an uncertainty weight (Kendall et al., 2018), prototypes, running class counts, a ramp.
MINE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Line(nn.Module):
    """A model that begins with the same weights, wherever it is built."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(32.0).reshape(4, 8).sin())
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x)


class Learned(nn.Module):
    def __init__(self, width=4, dropout=0.0, ramp=0):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.prototypes = nn.Parameter(torch.arange(3.0 * width).reshape(3, width).cos())
        self.register_buffer("counts", torch.zeros(3))
        self.dropout, self.ramp, self.calls = dropout, ramp, 0

    def forward(self, output, target):
        if self.training:
            self.counts = self.counts + torch.bincount(target, minlength=3)
            self.calls += 1
        scores = F.linear(F.dropout(output, self.dropout, self.training), self.prototypes)
        share = min(1.0, self.calls / self.ramp) if self.ramp else 1.0
        ce = F.cross_entropy(scores, target)
        return {"ce": share * torch.exp(-self.log_variance) * ce, "variance": 1.0 * self.log_variance}


class Holder:
    """A loss that is not a module, but has some."""

    def __init__(self):
        torch.manual_seed(5)
        self.parts = [nn.Linear(3, 3)]
        self.factor = nn.Parameter(torch.ones(3))

    def __call__(self, output, target):
        return F.cross_entropy(self.parts[0](output) * self.factor, target)


def by_head(output, target, head=None):
    return F.cross_entropy(head(output), target)


class Part:
    def __init__(self):
        self.head, self.calls = nn.Linear(3, 3), 0


class Deep:
    """Its layers lie in an object, in lists within a dict, in slots and in a closure."""

    __slots__ = ("__dict__", "slot")

    def __init__(self):
        torch.manual_seed(5)
        self.part, self.part_again = Part(), None
        self.part_again = self.part
        self.lists = {"a.b": [[nn.Linear(3, 3)], self]}
        self.slot = nn.Linear(3, 3)
        inner = nn.Linear(3, 3)
        self.closure = lambda x: inner(x)

    def __call__(self, output, target):
        self.part.calls += 1
        x = self.lists["a.b"][0][0](self.part.head(output))
        return F.cross_entropy(self.closure(self.slot(x)), target)


class Layers(nn.Module):
    """torch's own layers, which have buffers: running statistics and the vectors of a spectral norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.ce = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, output, target):
        return self.ce(self.head(self.norm(output)), target)


class LateBuffer(nn.Module):
    """A loss without a state, until its first forward makes one."""

    def forward(self, output, target):
        if not hasattr(self, "counts"):
            self.register_buffer("counts", torch.zeros(3))
        if self.training:
            self.counts += torch.bincount(target, minlength=3)
        return F.cross_entropy(output, target)


class Steep(nn.Module):
    """A finite value, whose gradient is infinite in the loss's own parameter alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, target):
        return F.cross_entropy(output, target) + self.scale.sqrt()


class BestSoFar:
    """A metric that remembers over validations."""

    def __init__(self):
        self.best, self.history = 0.0, []
        self.reset()

    def reset(self):
        self.right = self.all = 0

    def update(self, output, target):
        self.right += int((output.argmax(1) == target).sum())
        self.all += len(target)

    def compute(self):
        self.history.append(self.right / self.all)
        self.best = max(self.best, self.history[-1])
        return {"best": self.best, "validations": len(self.history), "mean": sum(self.history) / len(self.history)}
'''


@pytest.fixture
def train(here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The same as `here`, where the module `stateful_losses` is found."""
    (tmp_path / "stateful_losses.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "stateful_losses", raising=False)
    return lambda name, **changes: here(
        name, **{"modules": ["stateful_losses", "toy"], "trainer.pictures": False} | changes
    )


@pytest.fixture
def ranks(place: Place) -> Place:
    place.write("stateful_losses.py", MINE)
    return place


PLAIN: dict[str, Any] = {
    "modules": ["stateful_losses", "toy"], "model": {"name": "Line"}, "loss": {"name": "Learned"},
    "loaders.shuffle": False, "loaders.train": {"size": 29, "seed": 0}, "optimizer": {"name": "SGD", "lr": 0.5},
    "trainer.clip_grad_norm": 0.7, "trainer.max_epochs": 2, "trainer.pictures": False,
}  # fmt: skip


def by_hand(batch: int, epochs: int) -> dict[str, Tensor]:
    """The same training in plain torch: all parameters together, in the order of the data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(29, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    weight = torch.arange(32.0).reshape(4, 8).sin().requires_grad_()
    bias, variance = torch.zeros(4, requires_grad=True), torch.zeros((), requires_grad=True)
    prototypes = torch.arange(12.0).reshape(3, 4).cos().requires_grad_()
    everything = [weight, bias, variance, prototypes]
    for _ in range(epochs):
        for at in range(0, 29, batch):
            scores = (x[at : at + batch] @ weight.T + bias) @ prototypes.T
            value = torch.exp(-variance) * F.cross_entropy(scores, y[at : at + batch]) + variance
            gradients = torch.autograd.grad(value, everything)
            norm = torch.cat([item.flatten() for item in gradients]).norm()
            with torch.no_grad():
                for item, gradient in zip(everything, gradients, strict=True):
                    item -= 0.5 * gradient * min(1.0, 0.7 / float(norm))
    counts = torch.from_numpy(np.bincount(y.numpy(), minlength=3)) * float(epochs)
    return {"weight": weight, "bias": bias, "log_variance": variance, "prototypes": prototypes, "counts": counts}


@pytest.mark.parametrize(
    ("name", "count", "changes"),
    [
        ("one", 1, {"loaders.batch_size": 8}),
        ("two", 2, {"loaders.batch_size": 4}),
        ("accumulated", 2, {"loaders.batch_size": 2, "trainer.accumulate": 2}),
        pytest.param("sharded", 2, {"loaders.batch_size": 4, "trainer.strategy": "fsdp"}, marks=pytest.mark.slow),
    ],
)
def test_a_losss_parameters_are_trained_as_in_plain_torch(
    ranks: Place, name: str, count: int, changes: dict[str, Any]
) -> None:
    ranks.run(ranks.config(name, **PLAIN, **changes), ranks=count)
    folder, expected = ranks.path(name) / "checkpoints" / "last", by_hand(batch=8, epochs=2)
    found = load_file(folder / "loss.safetensors")
    for key in ("log_variance", "prototypes"):
        torch.testing.assert_close(found[key], expected[key].detach(), rtol=1e-4, atol=1e-6)
    of_model = load_weights(folder)
    assert set(of_model) == {"layer.weight", "layer.bias"}, "the model's weights alone"
    torch.testing.assert_close(of_model["layer.weight"], expected["weight"].detach(), rtol=1e-4, atol=1e-6)
    if count == 1:  # on several ranks it has rank 0's samples, as a model's running statistics
        assert torch.equal(found["counts"], expected["counts"]), "not one sample of the validation"


STATEFUL: dict[str, Any] = EXACT | {
    "loss": {"name": "Learned", "width": 3, "dropout": 0.2, "ramp": 9}, "metrics": {"name": "BestSoFar"},
    "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step", "T_max": 30}, "trainer.max_epochs": None,
    "trainer.monitor": "BestSoFar_best", "trainer.mode": "max", "trainer.validate_every_steps": 4,
    "trainer.log_every_steps": 4, "loaders.num_workers": 0, "trainer.pictures": False,
    "modules": ["stateful_losses", "toy"],
}  # fmt: skip


def test_a_stop_changes_nothing_of_a_loss_or_metric_that_holds_state(train: Callable[..., Path]) -> None:
    """Parameters, reassigned buffers, a counter, averages; a metric that remembers over validations."""
    whole = train("whole", **STATEFUL, **{"trainer.max_steps": 20})
    for steps in (4, 12, 20):  # each of them is logged, validated and saved in either
        parts = train("parts", **STATEFUL, **{"trainer.max_steps": steps})
    same_training(parts, whole)
    found, expected = figures(parts), figures(whole)
    assert expected["val/BestSoFar_validations"] == {step: step / 4 for step in (4, 8, 12, 16, 20)}
    del found["test/BestSoFar_validations"], expected["test/BestSoFar_validations"]  # the parts tested at their ends
    for key in ("train/loss", "train/loss_ce", "val/loss", "val/loss_variance", "val/BestSoFar_validations"):
        assert found[key] == expected[key], key
    weights = last(whole).others
    assert set(weights) == {"loss", "loss-ema"}
    assert not equal(weights["loss"]["prototypes"], weights["loss-ema"]["prototypes"])
    assert int(weights["loss"]["counts"].sum()) == 20 * 4 - 2 * 3, "training samples alone; 29 an epoch are 8 steps"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_resume_a_loss_with_state_bit_for_bit(ranks: Place, strategy: str) -> None:
    settings = STATEFUL | {"trainer.strategy": strategy}
    for name, ends in {f"whole-{strategy}": [8], f"parts-{strategy}": [4, 8]}.items():
        for steps in ends:
            ranks.run(ranks.config(name, **settings), f"trainer.max_steps={steps}", ranks=2)
    same_training(ranks.path(f"parts-{strategy}"), ranks.path(f"whole-{strategy}"))
    assert last(ranks.path(f"whole-{strategy}")).state["kept"]["loss"] == {"loss.calls": 16}, "two batches a step"


def test_what_is_tested_is_the_checkpoint_whole_with_its_loss(train: Callable[..., Path], tmp_path: Path) -> None:
    """val/loss is that of the averaged model and the averaged loss, by hand; so are fit's test and `dtrain test`."""
    import dtrain

    run = train("tested", **{
        "modules": ["stateful_losses", "toy"], "model": {"name": "Line"}, "loss": {"name": "Learned", "dropout": 0.5},
        "trainer.ema_decay": 0.5, "metrics": None, "loaders.test": {"size": 7, "seed": 2},
    })  # fmt: skip
    folder = run / "checkpoints" / "best"
    model, loss = load_file(folder / "ema.safetensors"), load_file(folder / "loss-ema.safetensors")

    def by_hand(size: int, seed: int) -> Any:
        x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
        y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
        scores = (x @ model["layer.weight"].T + model["layer.bias"]) @ loss["prototypes"].T
        value = torch.exp(-loss["log_variance"]) * F.cross_entropy(scores, y) + loss["log_variance"]
        return pytest.approx(float(value), rel=1e-5)

    assert figures(run)["val/loss"][load(folder).manifest["step"]] == by_hand(11, 1)
    expected = by_hand(7, 2)
    assert list(figures(run)["test/loss"].values()) == [expected]
    config = dtrain.load_config(tmp_path / "tested.yaml")
    assert dtrain.create_trainer(config, purpose="test").test()["test/loss"] == expected
    assert json.loads((run / "run.json").read_text())["state"] == "FINISHED"


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ({"name": "Holder"}, {"parts_0.weight", "parts_0.bias", "factor_"}),
        ({"name": "Deep"}, {f"{name}{key}" for key in ("weight", "bias") for name in (
            "part_head_.", "lists_a_b_0_0.", "slot_.", "closure_inner_.")}),
        ({"name": "by_head", "head": {"name": "torch.nn:Linear", "in_features": 3, "out_features": 3}},
         {"head_.weight", "head_.bias"}),
        ({"name": "WeightedSum", "losses": [{"name": "Learned", "width": 3},
                                            {"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 1.0]}]},
         {"parts.0.log_variance", "parts.0.prototypes", "parts.0.counts"}),
    ],
)  # fmt: skip
def test_parameters_are_found_wherever_a_loss_holds_them(
    train: Callable[..., Path], loss: dict[str, Any], names: set[str]
) -> None:
    run = train("held", loss=loss, **{"trainer.max_steps": 1})
    first = last(run).others["loss"]
    assert set(first) == names, "class weights are the config's"
    train("held", loss=loss, **{"trainer.max_steps": 9})
    later = last(run).others["loss"]
    assert all(not torch.equal(first[name], later[name]) for name in names)


def test_a_loss_without_state_costs_no_file_and_new_class_weights_hold(train: Callable[..., Path]) -> None:
    run = train("weighted", loss={"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 1.0]}, **{"trainer.max_steps": 3})
    checkpoint = load(run / "checkpoints" / "last")
    assert checkpoint.others == {} and not [*(run / "checkpoints" / "last").glob("loss*")]
    assert checkpoint.state["kept"] == {"loss": {}, "metrics": {}}
    assert len(checkpoint.state["optimizer"]["param_groups"]) == 1


def test_a_gradient_of_the_loss_alone_that_is_not_finite_stops_the_training(train: Callable[..., Path]) -> None:
    from dtrain.training.finite_step import NonFiniteError

    with pytest.raises(NonFiniteError, match="step 1: loss or gradient not finite"):
        train("steep", loss={"name": "Steep"}, **{"trainer.max_steps": 2})


def test_layers_of_torch_within_a_loss_keep_their_buffers(train: Callable[..., Path], tmp_path: Path) -> None:
    """Running statistics by hand; a stop changes nothing; `dtrain test` gives the figure of the training's own test."""
    import dtrain

    changes: dict[str, Any] = {
        "model": {"name": "Line"}, "loss": {"name": "Layers"}, "optimizer": {"name": "SGD", "lr": 0.0},
        "metrics": None, "loaders.shuffle": False, "loaders.batch_size": 8, "trainer.max_epochs": None,
        "loaders.train": {"size": 24, "seed": 0}, "loaders.test": {"size": 7, "seed": 2},
    }  # fmt: skip
    whole = train("whole", **changes, **{"trainer.max_steps": 6})
    for steps in (3, 6):  # an epoch, after which both are validated
        parts = train("parts", **changes, **{"trainer.max_steps": steps})
    same_training(parts, whole)
    found = last(whole).others["loss"]
    assert set(found) == {
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "head.bias",
        *(f"head.parametrizations.weight.{key}" for key in ("original", "0._u", "0._v")),
    }, "all but the class weights, which are the config's"  # fmt: skip
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    output = x @ torch.arange(32.0).reshape(4, 8).sin().T
    mean, var = torch.zeros(4), torch.ones(4)
    for at in (0, 8, 16) * 2:
        mean = 0.9 * mean + 0.1 * output[at : at + 8].mean(0)
        var = 0.9 * var + 0.1 * output[at : at + 8].var(0)
    torch.testing.assert_close(found["norm.running_mean"], mean)
    torch.testing.assert_close(found["norm.running_var"], var)
    (expected,) = figures(whole)["test/loss"].values()
    config = dtrain.load_config(tmp_path / "whole.yaml")
    assert dtrain.create_trainer(config, purpose="test").test()["test/loss"] == pytest.approx(expected, rel=1e-6)


def test_a_buffer_that_a_first_forward_makes_is_put_back(train: Callable[..., Path]) -> None:
    for steps in (3, 8):
        run = train("late-buffer", loss={"name": "LateBuffer"}, **{
            "loaders.train": {"size": 32, "seed": 0}, "loaders.batch_size": 4, "trainer.max_steps": steps,
        })  # fmt: skip
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)
    assert last(run).state["kept"]["loss"]["loss:buffers.counts"].tolist() == np.bincount(y, minlength=3).tolist()


def test_what_an_object_within_a_loss_counts_is_put_back(train: Callable[..., Path]) -> None:
    for steps in (2, 5):
        run = train("counts", loss={"name": "Deep"}, metrics=None, **{"loaders.val": None, "trainer.max_steps": steps})
    assert last(run).state["kept"]["loss"] == {"loss.part_.calls": 5}
