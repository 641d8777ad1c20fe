"""Models and settings that people bring: lazy modules, sparse gradients, weight_norm, late heads, sums, no epochs."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from whole_runs import Place, close, figures, last, write_config

import dtrain
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.distributed.ddp import hook_mistake
from dtrain.launch.rehearsal import rehearse
from dtrain.loss import get_loss_criterion

pytestmark = pytest.mark.timeout(600)

BROUGHT = '''
import torch
import torch.nn.functional as F
from torch import nn


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.LazyLinear(3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


class LazyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(3)

    def forward(self, output, target):
        return F.cross_entropy(self.head(output), target)


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 3)
        return self.head(x)


class LateLoss(nn.Module):
    """Nothing to train, until its first forward."""

    def forward(self, output, target):
        if not hasattr(self, "h"):
            self.h = nn.Linear(3, 3)
        return F.cross_entropy(self.h(output), target)


class LateObject:
    def __call__(self, output, target):
        if not hasattr(self, "h"):
            self.h = [nn.Linear(3, 3)]
        return F.cross_entropy(self.h[0](output), target)


class Remembers(nn.Module):
    """What it remembers of its inputs are plain attributes."""

    seen = []

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.mean, self.total, self.first, self.feature = torch.zeros(8), torch.zeros(8), None, None

    def forward(self, x):
        if self.training:
            Remembers.seen.append((self.mean.clone(), self.total.clone(), self.first))
            spoiled = x.detach() * spoil()
            self.mean = 0.5 * self.mean + 0.5 * spoiled.mean(0)
            self.total += spoiled.sum(0)
            self.first = spoiled[:, 0] if self.first is None else self.first
            x = x * spoiled / x
            self.feature = self.layer(x)
        return self.layer(x)


BAD, calls = (), 0


def spoil():
    global calls
    calls += 1
    return float("nan") if calls in BAD else 1.0


class RemembersLoss:
    def __init__(self):
        self.mean = torch.zeros(3)

    def __call__(self, output, target):
        self.mean = 0.5 * self.mean + 0.5 * output.detach().mean(0)
        return F.cross_entropy(output, target)


class Halved(nn.Module):
    """A loss around a loss."""

    def __init__(self, criterion, reduction="mean"):
        super().__init__()
        self.criterion = criterion

    def forward(self, output, target):
        return 0.5 * self.criterion(output, target)


def made_sum():
    from monai.losses import DiceCELoss

    return DiceCELoss(reduction="sum")


class Normed(nn.Module):
    """weight_norm and spectral_norm, of either kind."""

    def __init__(self, old=True):
        super().__init__()
        of = nn.utils if old else nn.utils.parametrizations
        self.first, self.last = of.weight_norm(nn.Linear(8, 4)), of.spectral_norm(nn.Linear(4, 3))

    def forward(self, x):
        return self.last(self.first(x))


class Words(nn.Module):
    """Several samples of a batch have the same word, so that gradients repeat rows."""

    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.head = nn.Embedding(10, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.words((x[:, :4] * 3).long().abs() % 10).mean(1))


class Reassigned(nn.Module):
    """Its running mean is a new tensor after each forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.seen = torch.cat([self.seen, x.detach()[:, 0]])
        return self.layer(x - self.mean)
'''
SUM = {"name": "CrossEntropyLoss", "reduction": "sum"}
SETTINGS: dict[str, Any] = {"modules": ["brought", "toy"], "trainer.pictures": False, "loaders.train": {"size": 28}}


@pytest.fixture
def train(here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (tmp_path / "brought.py").write_text(BROUGHT)
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    return lambda name, **changes: here(name, **SETTINGS | changes)


def points(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
    return x, (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(99))).argmax(1)


def test_lazy_modules_are_made_before_the_optimizer_and_resume(train: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"model": {"name": "Lazy"}, "trainer.ema_decay": 0.9, "trainer.validate_every_steps": 3}
    train("parts", **changes, **{"trainer.max_steps": 3, "trainer.max_epochs": None})
    weights = last(tmp_path / "run-parts").weights
    assert weights["first.weight"].shape == (16, 8) and weights["norm.num_batches_tracked"] == 3
    parts = train("parts", **changes, **{"trainer.max_steps": 6, "trainer.max_epochs": None})
    whole = train("whole", **changes, **{"trainer.max_steps": 6, "trainer.max_epochs": None})
    for name, value in last(whole).weights.items():
        assert torch.equal(last(parts).weights[name], value), name
    assert all(not torch.equal(weights[name], last(whole).weights[name]) for name in ("first.weight", "last.bias"))
    config = load_config(tmp_path / "whole.yaml", ["loaders.test={size: 5}"])
    assert "test/loss" in dtrain.create_trainer(config, purpose="test").test()


def test_a_lazy_loss_is_made_before_the_optimizer(train: Callable[..., Path]) -> None:
    run = train("lazy-loss", loss={"name": "LazyLoss"}, **{"trainer.max_steps": 2})
    assert last(run).others["loss"]["head.weight"].shape == (3, 3)
    assert len(last(run).state["optimizer"]["param_groups"]) == 2


def test_a_head_that_forward_makes_is_named_at_the_first_step(train: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match=r"never trained: head\.weight, head\.bias\. Make parameters in __init__"):
        train("late", model={"name": "Late"})


@pytest.mark.parametrize(
    ("loss", "names"), [("LateLoss", r"loss: h\.weight, loss: h\.bias"), ("LateObject", "loss: h_0")]
)
def test_a_head_that_a_losss_forward_makes_is_named_at_the_first_step(
    train: Callable[..., Path], tmp_path: Path, loss: str, names: str
) -> None:
    with pytest.raises(RuntimeError, match=f"never trained: {names}.*Make parameters in __init__"):
        train("late", loss={"name": loss})
    trainer = dtrain.create_trainer(load_config(tmp_path / "late.yaml", ["trainer.resume=none"]))
    with pytest.raises(RuntimeError, match=f"never trained: {names}"):
        list(rehearse(trainer, load_config(tmp_path / "late.yaml")))


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_goes_with_averaged_weights(train: Callable[..., Path], old: bool) -> None:
    """What is validated is the averaged g and v, from which the weight follows: w = g v / |v|."""
    run = train("normed", model={"name": "Normed", "old": old}, **{"trainer.ema_decay": 0.5, "trainer.max_steps": 5})
    ema = load_file(run / "checkpoints" / "last" / "ema.safetensors")
    g, v = ("first.weight_g", "first.weight_v") if old else [
        f"first.parametrizations.weight.original{number}" for number in (0, 1)
    ]  # fmt: skip
    first = ema[g] * ema[v] / ema[v].norm(dim=1, keepdim=True)
    if old:
        matrix, left, right = ema["last.weight_orig"], ema["last.weight_u"], ema["last.weight_v"]
    else:
        matrix, left, right = (ema[f"last.parametrizations.weight.{key}"] for key in ("original", "0._u", "0._v"))
    x, y = points(11, seed=1)
    hidden = x @ first.T + ema["first.bias"]
    expected = F.cross_entropy(hidden @ (matrix / (left @ matrix @ right)).T + ema["last.bias"], y)
    assert figures(run)["val/loss"][5] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"trainer.clip_grad_norm": 0.3}])
def test_sparse_gradients_train_as_dense_ones(train: Callable[..., Path], changes: dict[str, Any]) -> None:
    dense, sparse = (
        train(f"{kind}", model={"name": "Words", "sparse": kind == "sparse"}, **changes) for kind in ("dense", "sparse")
    )
    close(figures(sparse), figures(dense))


def test_sparse_gradients_and_compressed_ones_on_two_gloo_ranks(place: Place) -> None:
    place.write("brought.py", BROUGHT)
    settings = SETTINGS | {"model": {"name": "Words", "sparse": False}, "trainer.max_epochs": 1}
    place.run(place.config("words", **settings, **{"loaders.batch_size": 8}))
    settings |= {"loaders.batch_size": 4}
    place.run(place.config("words-sparse", **settings | {"model": {"name": "Words"}}), ranks=2)
    close(figures(place.path("words-sparse")), figures(place.path("words")))
    place.run(place.config("words-fp16", **settings), "trainer.ddp={comm_hook: fp16}", ranks=2)
    found, expected = figures(place.path("words-fp16"))["val/loss"], figures(place.path("words"))["val/loss"]
    assert found != expected, "16 bits of each gradient"
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-2)
    refused = place.run(place.config("words-bf16", **settings), "trainer.ddp={comm_hook: bf16}", ranks=2, expect=2)
    assert "trainer.ddp.comm_hook: bf16 needs NCCL, and these ranks use gloo; possible: no, fp16" in refused.stderr
    assert "Traceback" not in refused.text


def test_a_bad_step_leaves_nothing_in_buffers_that_are_reassigned(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.Tensor.mean

    def spoiled(run: str, bad: bool) -> Path:
        calls = Counter[str]()

        def mean(value: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            calls["all"] += value.shape[1:] == (8,)
            return original(value, *arguments, **named) * (float("nan") if bad and calls["all"] == 3 else 1.0)

        monkeypatch.setattr(torch.Tensor, "mean", mean)
        return train(run, model={"name": "Reassigned"}, **{"trainer.on_nonfinite": "skip", "trainer.max_epochs": 1})

    run = spoiled("bad", bad=True)
    assert set(figures(run)["skipped_steps"].values()) == {1.0}
    weights = last(run).weights
    assert torch.isfinite(weights["mean"]).all() and weights["seen"].shape == (28 - 4,), (
        "the bad step's samples are out"
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_leaves_nothing_in_plain_attributes(train: Callable[..., Path], tmp_path: Path, fused: bool) -> None:
    """The first step is bad, and the fourth: what the forwards remember is as if these two had never been."""
    sys.path.insert(0, str(tmp_path))
    try:
        brought = importlib.import_module("brought")
    finally:
        sys.path.remove(str(tmp_path))
    brought.BAD = (1, 4)
    run = train("remembers", model={"name": "Remembers"}, loss={"name": "RemembersLoss"}, metrics=None, **{
        "trainer.on_nonfinite": "skip", "trainer.max_epochs": 1, "loaders.shuffle": False, "loaders.val": None,
        "optimizer": {"name": "SGD", "lr": 0.0, "fused": fused}, "loaders.batch_size": 4,
    })  # fmt: skip
    assert figures(run)["skipped_steps"][7] == 2.0
    x, _ = points(28, seed=0)
    mean, total, first = torch.zeros(8), torch.zeros(8), None
    assert len(brought.Remembers.seen) == 7
    for step, (its_mean, its_total, its_first) in enumerate(brought.Remembers.seen, 1):
        torch.testing.assert_close((its_mean, its_total), (mean, total))
        assert (its_first is None) == (first is None) and (first is None or torch.equal(its_first, first)), step
        batch = x[4 * step - 4 : 4 * step]
        if step not in (1, 4):
            mean, total = 0.5 * mean + 0.5 * batch.mean(0), total + batch.sum(0)
            first = batch[:, 0] if first is None else first
    weights, of_loss = last(run).weights, torch.zeros(3)
    for step in (2, 3, 5, 6, 7):
        output = x[4 * step - 4 : 4 * step] @ weights["layer.weight"].T + weights["layer.bias"]
        of_loss = 0.5 * of_loss + 0.5 * output.mean(0)
    torch.testing.assert_close(last(run).state["kept"]["loss"]["loss.mean"], of_loss)


def test_no_epochs_validate_test_and_continue(train: Callable[..., Path]) -> None:
    schedule = {"name": "OneCycleLR", "max_lr": 0.1, "interval": "step"}
    changes: dict[str, Any] = {"lr_scheduler": schedule, "loaders.test": {"size": 5, "seed": 2}}
    run = train("none", **changes, **{"trainer.max_epochs": 0})
    assert {"val/loss": [0], "test/loss": [0]}.items() <= {key: list(at) for key, at in figures(run).items()}.items()
    assert "train/loss" not in figures(run) and last(run).manifest["step"] == 0
    run = train("none", **changes, **{"trainer.max_epochs": 1})
    assert last(run).manifest["step"] == 7


@pytest.mark.parametrize(
    ("changes", "key", "cure"),
    [
        ({"loss": {"name": "CrossEntropyLoss", "reduction": "sum"}}, "loss.reduction", "use reduction: mean"),
        ({"loss": {"name": "Halved", "criterion": SUM}}, "loss.criterion.reduction", "use reduction: mean"),
        (
            {"loss": {"name": "Halved", "criterion": {"name": "Halved", "criterion": SUM}}},
            "loss.criterion.criterion.reduction",
            "use reduction: mean",
        ),
        (
            {"loss": {"name": "WeightedSum", "losses": [{"name": "MSELoss"}, {"name": "Halved", "criterion": SUM}]}},
            "loss.losses.1.criterion.reduction",
            "use reduction: mean",
        ),
        (
            {"loss": {"name": "WeightedSum", "losses": [{"name": "monai.losses.DiceCELoss", "reduction": "sum"}]}},
            "loss.losses.0.reduction",
            "use reduction: mean",
        ),
        ({"loss": {"name": "Halved", "criterion": SUM | {"_partial_": True}}}, "loss.criterion.reduction", "use red"),
        ({"trainer.accumulate": 2, "trainer.ddp": {"static_graph": True}}, "trainer.ddp.static_graph", "issue 143580"),
    ],
)
def test_what_would_train_wrongly_is_refused(
    train: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], key: str, cure: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(load_config(write_config(tmp_path, "refused", {"modules": ["brought"]} | changes)))
    (line,) = (line for line in str(error.value).splitlines() if f" {key}: " in f" {line}")
    assert cure in line and "refused.yaml:" in line


def test_a_component_of_the_users_own_may_mean_another_reduction(train: Callable[..., Path], tmp_path: Path) -> None:
    inner = {"name": "Halved", "reduction": "sum", "criterion": {"name": "CrossEntropyLoss"}}
    changes = {"modules": ["brought", "toy"], "loss": {"name": "Halved", "criterion": inner}}
    check(load_config(write_config(tmp_path, "own", changes)))


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "WeightedSum", "losses": [{"name": "MSELoss"}, {"name": "CrossEntropyLoss", "reduction": "sum"}]},
        {"name": "MaskedLoss", "loss": {"name": "MSELoss", "reduction": "sum"}},
        {"name": "MSELoss", "size_average": False},
        {"name": "made_sum"},
        {"name": "WeightedSum", "losses": [{"name": "made_sum"}]},
    ],
)
@pytest.mark.filterwarnings("ignore:size_average")
def test_a_sum_within_a_sum_of_ours_is_refused(
    train: Callable[..., Path], tmp_path: Path, loss: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="adds its samples up"):
        get_loss_criterion(load_config(write_config(tmp_path, "inner", {"loss": loss, "modules": ["brought"]})))


def test_batched_power_sgd_is_refused_where_torchs_own_fails_after_a_thousand_steps() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    q = torch.ones(4, 1)  # as batched_powerSGD_hook makes it: square_side_length x matrix_approximation_rank
    try:
        powerSGD_hook._orthogonalize(q)
        works = True
    except AssertionError:
        works = False
    assert (hook_mistake("batched_power_sgd", "nccl") == "") is works
    assert (
        hook_mistake("power_sgd", "gloo") == hook_mistake("bf16", "cpu:gloo,cuda:nccl") == hook_mistake(None, "") == ""
    )
