"""trainer.freeze: what is frozen does not move, modules stay in eval mode, thawing is exact on one rank and several."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from whole_runs import Place, close, equal, figures, last, same_training

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.training.freezing import Freezing
from dtrain.training.optimizer import freeze


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.head = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)


def frozen(wish: Any, model: nn.Module, loss: nn.Module | None = None) -> Freezing:
    config = from_mapping({"model": {"name": "Linear"}, "trainer": {"max_epochs": 1, "freeze": wish}})
    return freeze(config, model, loss)


def told(wish: Any) -> list[str]:
    sections = {
        "model": {"name": "Linear", "in_features": 2, "out_features": 1},
        "loaders": {"name": "TensorDataset", "train": {}},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "SGD"},
    }
    with pytest.raises(ConfigError) as caught:
        config = from_mapping(sections | {"trainer": {"max_epochs": 1, "freeze": wish}})
        check(config)
        freeze(config, Net())
    return [mistake.text for mistake in caught.value.mistakes]


def trained(model: nn.Module) -> list[str]:
    return [name for name, item in model.named_parameters() if item.requires_grad]


def test_modules_that_are_frozen_whole_stay_in_eval_mode() -> None:
    model = Net()
    frozen("body.*", model)
    assert trained(model) == ["head.weight", "head.bias"]
    for _ in range(2):
        model.train()
        assert [model.training, model.head.training, model.drop.training] == [True, True, True]
        assert not any(part.training for part in model.body.modules())
        model.eval()
        assert not any(part.training for part in model.modules())
    copied = copy.deepcopy(model).train()
    assert not copied.body[1].training and copied.head.training


def test_what_is_frozen_may_be_chosen_by_the_class_that_owns_it() -> None:
    model = Net()
    frozen({"types": ["BatchNorm1d"]}, model)
    assert trained(model) == ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert [part.training for part in model.train().body] == [True, False, True]
    frozen({"match": "*.bias", "types": "Linear"}, model := Net())
    assert trained(model) == ["body.0.weight", "body.1.weight", "body.1.bias", "head.weight"]


def test_of_a_module_that_is_frozen_in_part_the_parts_that_are_whole() -> None:
    model = Net()
    frozen(["body.1.*", "body.0.weight"], model)
    model.train()
    assert [part.training for part in model.body] == [True, False, True]
    assert trained(model) == ["body.0.bias", "head.weight", "head.bias"]


def test_until_an_epoch_and_exceptions() -> None:
    model, loss = Net(), nn.Linear(1, 1)
    model.head.bias.requires_grad_(False)  # of the user's own
    freezing = frozen(
        ["loss.bias", {"match": "*.weight", "until_epoch": 3}, {"match": "head.*", "until_epoch": 0},
         {"match": "body.*", "until_epoch": 2}],
        model, loss,
    )  # fmt: skip
    seen = []
    for epoch in range(4):
        changed = freezing.apply(epoch)
        model.train()
        seen.append((changed, trained(model), trained(loss), model.body[1].training))
    body = [f"body.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    assert seen == [
        (False, ["head.weight"], [], False),
        (False, ["head.weight"], [], False),
        (True, [*body, "head.weight"], [], True),
        (True, [*body, "head.weight"], ["weight"], True),
    ]
    assert freezing.thawed_later == {*body, "loss.weight"}
    assert [*freezing.lines()] == [
        "4 tensors, 15 parameters of body, until epoch 2",
        "1 tensor, 1 parameters of loss, until epoch 3",
        "1 tensor, 1 parameters of loss",
    ]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("bdy.*", "trainer.freeze: 'bdy.*' fits no parameter; did you mean 'body.*'?"),
        (["head.*", "body"], "trainer.freeze.1: 'body' is a module; its parameters are 'body.*'"),
        ("*", "trainer.freeze: freezes all parameters, so there is nothing to train"),
        ({"match": "*", "until_epoch": -1}, "trainer.freeze.until_epoch: must be at least 0, found -1"),
        ({"match": "*", "until": 1}, "trainer.freeze got an unexpected argument 'until'; did you mean 'until_epoch'?"),
        ([{"until_epoch": 1}], "trainer.freeze.0: needs 'match' (patterns of parameters' names) or 'types'"),
        ({"types": "BatchNorm2d"}, "no module with parameters is a 'BatchNorm2d'; did you mean 'BatchNorm1d'"),
        ({"match": "head.*", "types": "BatchNorm1d"}, "no parameter that 'match' fits is of a BatchNorm1d"),
        ({"match": []}, "trainer.freeze: needs 'match' (patterns of parameters' names) or 'types'"),
        ([{"match": 3}], "trainer.freeze.0.match: expected string or a list of strings or null, found int 3"),
        (3, "trainer.freeze: expected string or"),
    ],
)
def test_a_mistake_is_told(wish: Any, expected: str) -> None:
    texts = told(wish)
    assert len(texts) == 1 and expected in texts[0], texts


# What is trained: a body with running statistics, thawed after an epoch, with decay, momentum, averages, accumulation.
BODY = """
from torch import nn


class Body(nn.Module):
    def __init__(self, norm="BatchNorm1d", dropout=0.3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), getattr(nn, norm)(16), nn.Tanh(), nn.Dropout(dropout))
        self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.middle(self.body(x)).relu())
"""
RUN: dict[str, Any] = {
    "modules": ["toy", "body"],
    "model": {"name": "Body"},
    "optimizer": {"name": "AdamW", "lr": 0.02, "weight_decay": 0.1, "groups": [{"match": "body.*", "lr_scale": 0.5}]},
    "lr_scheduler": {"name": "StepLR", "step_size": 1, "gamma": 0.7},
    "loaders": {"name": "Points", "global_batch_size": 8, "train": {"size": 48}, "val": {"size": 11, "seed": 1}},
    "trainer.max_epochs": 4, "trainer.ema_decay": 0.9, "trainer.accumulate": 2, "trainer.clip_grad_norm": 1.0,
    "trainer.freeze": ["middle.weight", {"match": "body.*", "until_epoch": 2}],
}  # fmt: skip


@pytest.fixture
def with_body(place: Place) -> Place:
    place.write("body.py", BODY)
    return place


@pytest.mark.timeout(600)
def test_thawing_resumes_exactly_before_and_after_it(here: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "body.py").write_text(BODY)
    start = last(here("freeze-start", **RUN | {"trainer.max_epochs": 0})).weights
    first = last(here("freeze-parts", **RUN | {"trainer.max_epochs": 1}))
    for name, value in first.weights.items():
        is_frozen = name.startswith("body.") or name == "middle.weight"
        assert equal(value, start[name]) is is_frozen, name
        assert not is_frozen or first.ema is None or equal(first.ema[name], start[name])
    for epochs in (3, 4):  # from the frozen phase through thawing, then from the thawed phase
        parts = here("freeze-parts", **RUN | {"trainer.max_epochs": epochs})
    whole = here("freeze-whole", **RUN)
    same_training(whole, parts)
    end = last(whole)
    assert equal(end.weights["middle.weight"], start["middle.weight"])
    assert not any(equal(end.weights[name], start[name]) for name in start if name.startswith("body."))
    steps = {name: float(end.state["optimizer"]["state"][number]["step"])
             for number, name in enumerate(end.state["parameters"])}  # fmt: skip
    assert steps["head.weight"] == 12 and steps["body.0.weight"] == 6 and "middle.weight" not in steps
    with pytest.raises(ConfigError, match=r"trainer.freeze.1.until_epoch: 2 -> 3"):
        here("freeze-whole", **RUN | {"trainer.freeze": ["middle.weight", {"match": "body.*", "until_epoch": 3}]})
    changes = {"trainer.freeze": "body.1.*", "trainer.max_epochs": 5, "trainer.resume": "last"}
    after = last(here("freeze-whole", **RUN | changes))
    steps = {name: float(after.state["optimizer"]["state"][number]["step"])
             for number, name in enumerate(after.state["parameters"])}  # fmt: skip
    assert steps["head.weight"] == 15 and steps["body.0.weight"] == 9 and steps["middle.weight"] == 3
    assert "body.1.weight" not in steps and equal(after.weights["body.1.weight"], end.weights["body.1.weight"])


@pytest.mark.slow
def test_thawing_is_that_of_a_loop_written_by_hand(here: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "body.py").write_text(BODY)
    changes: dict[str, Any] = RUN | {
        "model.dropout": 0.0,
        "loaders": {"name": "Points", "batch_size": 12, "train": {"size": 12}, "val": {"size": 11}},
        "optimizer": RUN["optimizer"] | {"name": "SGD", "lr": 0.2, "momentum": 0.9},
        "trainer.accumulate": 1, "trainer.clip_grad_norm": None, "trainer.ema_decay": None,
    }  # fmt: skip
    start = last(here("freeze-loop", **changes | {"trainer.max_epochs": 0})).weights
    found = last(here("freeze-loop", **changes | {"trainer.max_epochs": 4})).weights
    import body
    import toy

    model, data = body.Body(dropout=0.0), toy.Points(12)
    model.load_state_dict(start)
    model.middle.weight.requires_grad_(False)
    model.body.requires_grad_(False)
    rest = [model.middle.bias, *model.head.parameters()]
    optimizer = SGD(rest, lr=0.2, momentum=0.9, weight_decay=0.1)
    for epoch in range(4):
        model.train()
        if epoch < 2:
            model.body.eval()
        if epoch == 2:
            model.body.requires_grad_(True)
            optimizer.add_param_group({"params": [*model.body.parameters()]})
        for group, scale in zip(optimizer.param_groups, (1, 0.5), strict=False):
            group["lr"] = 0.2 * scale * 0.7**epoch
        nn.functional.cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.timeout(600)
def test_thawing_on_two_ranks_and_sharded_is_that_of_one(with_body: Place) -> None:
    place, run = with_body, RUN | {"model": {"name": "Body", "norm": "LayerNorm", "dropout": 0.0}}
    place.run(place.config("freeze-one", **run))
    place.run(place.config("freeze-two", **run), ranks=2)
    one = figures(place.path("freeze-one"))
    close(one, figures(place.path("freeze-two")))
    sharded = run | {"trainer.strategy": "fsdp", "trainer.fsdp": {"min_parameters": 1, "reshard_after_forward": False}}
    place.run(place.config("freeze-sharded", **sharded | {"trainer.max_epochs": 1}), ranks=2)
    text = place.run(place.config("freeze-sharded", **sharded), ranks=2).stdout
    assert "frozen: 4 tensors, 176 parameters of body, until epoch 2; 1 tensor, 256 parameters of middle" in text
    close(one, figures(place.path("freeze-sharded")))
    weights = last(place.path("freeze-one")).weights
    for name, value in last(place.path("freeze-sharded")).weights.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)


def test_check_and_config_show_what_is_frozen(with_body: Place) -> None:
    config = with_body.config("freeze-shown", **RUN)
    text = with_body.run("config", config).stdout
    assert (
        "# trainer.freeze.0:      frozen: middle.weight\n# trainer.freeze.1:      frozen: body.*, until epoch 2\n"
        in text
    )
    text = with_body.run("check", config).stdout
    assert "frozen: 4 tensors, 176 parameters of body, until epoch 2" in text
    assert "group rest: 3 tensors, 67 parameters, lr 0.02, weight_decay 0.1" in text
    assert "group body: 4 tensors, 176 parameters, lr 0.01, weight_decay 0.1" in text
