"""Parameter groups, decay by layers, several optimizers: who is trained with what, against groups by hand."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from whole_runs import Place, equal, figures, last

from dtrain.components.models import ViT
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.training.optimizer import Built, get_optimizers, regrouped, require_one_optimizer, shown
from dtrain.training.parameter_groups import layers_of
from dtrain.training.schedule import get_schedule

# What a user's module holds. `modules: [test_parameter_groups]` finds it here.


def of_names(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
    """A function that makes the groups itself, by names."""
    decayed = [item for name, item in named_parameters if name.endswith("weight")]
    others = [item for name, item in named_parameters if not name.endswith("weight")]
    return SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr)


def of_model(model: nn.Module, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr)


def of_a_part(model: nn.Sequential, lr: float) -> Optimizer:
    return SGD(model[0].parameters(), lr)


class OwnSGD(SGD):
    """A user's own optimizer, one of whose arguments is not a group's."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, loud: bool = False) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def config_of(optimizer: dict[str, Any], **sections: Any) -> ConfigDict:
    base: dict[str, Any] = {
        "modules": ["test_parameter_groups"],
        "model": {"name": "Linear", "in_features": 2, "out_features": 1},
        "loss": {"name": "MSELoss"},
        "loaders": {"name": "TensorDataset", "train": {}, "val": {}},
        "optimizer": optimizer,
        "trainer": {"max_epochs": 4},
    }
    return from_mapping(base | sections)


def built_of(optimizer: dict[str, Any], model: nn.Module | None = None, loss: nn.Module | None = None) -> Built:
    config = config_of(optimizer)
    check(config)
    (built,) = get_optimizers(config, model or small(), loss).values()
    return built


def told(optimizer: dict[str, Any], model: nn.Module | None = None, **sections: Any) -> list[str]:
    """The mistakes that are found before anything is built, else those that building finds."""
    with pytest.raises(ConfigError) as caught:
        config = config_of(optimizer, **sections)
        check(config)
        get_optimizers(config, model or small())
    return [mistake.text for mistake in caught.value.mistakes]


def table(built: Built) -> list[tuple[list[str], float, float]]:
    """Names, rate and decay of each of torch's groups."""
    return [
        ([item.name for item in group.items], made["lr"], made["weight_decay"])
        for group, made in zip(built.groups, built.optimizer.param_groups, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- groups


def test_all_that_match_apply_and_equal_settings_are_one_group() -> None:
    groups = [
        {"match": "0.*", "lr_scale": 0.1},
        {"types": "BatchNorm2d", "weight_decay": 0},
        {"match": "*.bias", "weight_decay": 0.0},
    ]
    built = built_of({"name": "AdamW", "lr": 1e-3, "weight_decay": 0.05, "groups": groups})
    assert table(built) == [
        (["2.weight"], 1e-3, 0.05),
        (["0.weight"], pytest.approx(1e-4), 0.05),
        (["0.bias"], pytest.approx(1e-4), 0),
        (["1.weight", "1.bias", "2.bias"], 1e-3, 0),
    ]
    assert [group.name for group in built.groups] == ["rest", "0", "0-bias", "BatchNorm2d"]


def test_later_groups_win() -> None:
    groups = [
        {"match": "*", "lr": 1.0, "betas": [0.5, 0.6]},
        {"match": "0.*", "lr_scale": 2},
        {"match": "0.bias", "lr": 7},
    ]
    built = built_of({"name": "AdamW", "lr": 1e-3, "groups": groups})
    assert [(names, rate) for names, rate, _ in table(built)] == [
        (["0.weight"], 2e-3), (["0.bias"], 7), (["1.weight", "1.bias", "2.weight", "2.bias"], 1.0),
    ]  # fmt: skip
    assert [group["betas"] for group in built.optimizer.param_groups] == [(0.5, 0.6)] * 3


def test_settings_that_equal_the_sections_own_make_no_group() -> None:
    written = built_of({"name": "AdamW", "groups": [{"match": "0.*", "lr_scale": 1.0, "weight_decay": 1e-2}]})
    assert len(written.optimizer.param_groups) == 1  # 1e-2 is AdamW's default


def test_the_rate_of_which_lr_scale_is_a_factor_may_be_the_optimizers_default() -> None:
    assert table(built_of({"name": "OwnSGD", "groups": [{"match": "0.*", "lr_scale": 0.5}]}))[1][1] == 0.05


def test_tied_and_parametrized_parameters_are_found_by_their_layers() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    groups = [{"match": "2.weight", "lr": 5.0}, {"types": "Linear", "weight_decay": 0.3}]
    built = built_of({"name": "SGD", "lr": 1.0, "groups": groups}, model)
    found = {name: (rate, decay) for names, rate, decay in table(built) for name in names}
    assert found["1.weight"] == (5.0, 0.3) and found["2.bias"] == (1.0, 0.3)
    assert found["0.parametrizations.weight.original0"] == (1.0, 0.3)


def test_a_losss_parameters_are_matched_by_names_under_loss() -> None:
    loss = nn.Linear(3, 1)
    plain = built_of({"name": "SGD", "lr": 1.0}, small(), loss)
    assert [names for names, _, _ in table(plain)][1] == ["loss.weight", "loss.bias"]
    built = built_of({"name": "SGD", "lr": 1.0, "groups": [{"match": "loss.*", "lr_scale": 10}]}, small(), loss)
    assert table(built)[1] == (["loss.weight", "loss.bias"], 10.0, 0)
    assert [group.name for group in built.groups] == ["rest", "loss"]


def test_a_function_is_given_what_its_first_argument_is_named_for() -> None:
    model, loss = small(), nn.Linear(2, 1)
    assert table(built_of({"name": "of_names", "lr": 0.5}, model)) == [
        (["0.weight", "1.weight", "2.weight"], 0.5, 0.1), (["0.bias", "1.bias", "2.bias"], 0.5, 0),
    ]  # fmt: skip
    built = built_of({"name": "of_model", "lr": 0.5}, model, loss)
    assert [len(names) for names, _, _ in table(built)] == [6, 2]
    text = "optimizer.groups: of_model takes 'model' and makes its groups itself; remove 'groups'"
    assert told({"name": "of_model", "lr": 1, "groups": [{"match": "*", "lr": 2}]}) == [text]
    assert (
        "1.weight, 1.bias, 2.weight, 2.bias would be trained, but no optimizer has them"
        in told({"name": "of_a_part", "lr": 0.5})[0]
    )


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"match": "backbone.*", "lr": 1}, "groups.0.match: 'backbone.*' fits no parameter; there are 0.weight"),
        ({"match": "0", "lr": 1}, "optimizer.groups.0.match: '0' is a module; its parameters are '0.*'"),
        ({"match": ["*", "0.wieght"], "lr": 1}, "'0.wieght' fits no parameter; did you mean '0.weight'?"),
        ({"types": "BatchNorm3d", "lr": 1}, "no module with parameters is a 'BatchNorm3d'; did you mean 'BatchNorm2d'"),
        ({"match": "*"}, "optimizer.groups.0: sets nothing; add lr, lr_scale or another argument of AdamW"),
        ({"lr": 1}, "optimizer.groups.0: needs 'match' (patterns of parameters' names) or 'types'"),
        ({"match": "*", "lr": 1, "lr_scale": 2}, "optimizer.groups.0.lr_scale: cannot be combined with 'lr'"),
        ({"match": "*", "lr_scael": 2}, "an unexpected argument 'lr_scael'; did you mean 'lr_scale'"),
        ({"match": "*", "eps": "a"}, "optimizer.groups.0.eps: expected float, found string 'a'"),
        ({"match": 3, "lr": 1}, "optimizer.groups.0.match: expected a string or a list of strings, found int 3"),
        ({"match": "*", "lr": 1, "label": "a*"}, "optimizer.groups.0.label: expected letters, digits"),
        ({"match": "0.*", "lr": -1}, "optimizer.groups: group 0: Invalid learning rate: -1"),
        ({"match": "0.*", "betas": [0.9, 1.5]}, "optimizer.groups: group 0: Invalid beta parameter at index 1: 1.5"),
        ({"match": "*", "lr_scale": -1}, "optimizer.groups.0.lr_scale: expected a number of at least 0, found int -1"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_group_is_told(group: dict[str, Any], expected: str) -> None:
    texts = told({"name": "AdamW", "lr": 1e-3, "groups": [group]})
    assert len(texts) == 1 and expected in texts[0], texts


def test_an_argument_that_an_optimizer_has_for_all_groups_alone() -> None:
    text = told({"name": "OwnSGD", "groups": [{"match": "0.*", "loud": True}]})[0]
    assert text.startswith("optimizer.groups: OwnSGD has no 'loud' of each group; possible: lr, ")


# -------------------------------------------------------------------------------------------------------- layer decay


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(2), nn.Linear(2, 2)


class Named(nn.Module):
    """Modules and parameters by dotted names, as somebody's ViT has them."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names.split():
            *parents, own = name.split(".")
            parent: nn.Module = self
            for part in parents:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            if own.startswith("P"):
                parent.register_parameter(own[1:], nn.Parameter(torch.zeros(2)))
            else:
                kind = nn.ModuleList([Block() for _ in range(3)]) if own.startswith("B") else nn.LayerNorm(2)
                parent.add_module(own.removeprefix("B"), kind)


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        ("Pcls_token Ppos_embed patch_embed.proj Bblocks norm head", "cls_token pos_embed patch_embed", "norm head"),
        ("Ppos_embedding to_patch_embedding.1 transformer.norm transformer.Blayers mlp_head",
         "pos_embedding to_patch_embedding.1", "transformer.norm mlp_head"),
        ("vit.embeddings.Pcls_token vit.embeddings.patches.projection vit.encoder.Blayer vit.layernorm classifier",
         "vit.embeddings.cls_token vit.embeddings.patches.projection", "vit.layernorm classifier"),
        ("Pclass_embedding Pproj conv1 ln_pre net.Bresblocks ln_post", "class_embedding conv1 ln_pre", "proj ln_post"),
    ],
    ids=["timm", "vit_pytorch", "hugging_face", "open_clip"],
)  # fmt: skip
def test_what_counts_as_a_layer(model: str, first: str, last: str) -> None:
    layers = layers_of(Named(model))
    assert layers is not None and layers.depth == 5 and layers.kind == "Block"
    for word, number in [*((word, 0) for word in first.split()), *((word, 4) for word in last.split())]:
        assert {layers.number[name] for name in layers.number if name.startswith(word)} == {number}, word
    block = model.partition("B")[0].split(" ")[-1] + model.partition("B")[2].split(" ")[0]
    assert [layers.number[f"{block}.{index}.attn.weight"] for index in range(3)] == [1, 2, 3]


def vit() -> nn.Module:
    return ViT(image_size=4, patch_size=2, num_classes=3, dim=4, depth=2, heads=1, mlp_dim=4, channels=1)


def test_the_rate_decays_from_the_last_layer_to_the_first() -> None:
    groups = [{"match": "*.bias", "weight_decay": 0}, {"match": "mlp_head.*", "lr_scale": 10}]
    built = built_of({"name": "AdamW", "lr": 1.0, "layer_decay": 0.5, "groups": groups}, vit())
    found = {name: (rate, decay) for names, rate, decay in table(built) for name in names}
    assert found["cls_token"] == (0.125, 0.01)
    assert found["transformer.layers.0.0.norm.bias"] == (0.25, 0)
    assert found["transformer.layers.1.0.to_qkv.weight"] == (0.5, 0.01)
    assert found["transformer.norm.weight"] == (1.0, 0.01)
    assert found["mlp_head.weight"] == (10.0, 0.01)
    assert "0: cls_token, pos_embedding, to_patch_embedding; then 2 blocks of transformer.layers (" in str(built.layers)
    assert len([label for label, _ in shown({"optimizer": built}, most=4)]) == 2
    assert told({"name": "AdamW", "layer_decay": 0.5})[0].startswith("optimizer.layer_decay: the model has no list of")
    assert told({"name": "AdamW", "layer_decay": 1.5}) == ["optimizer.layer_decay: must be from 0 to 1, found 1.5"]


# --------------------------------------------------------------------------------------------------- several by name


TWO = {"body": {"name": "AdamW", "lr": 1e-3, "match": ["0.*", "1.*"]}, "head": {"name": "SGD", "lr": 0.1}}


def test_several_optimizers_divide_the_parameters() -> None:
    config = config_of(TWO | {"head": {"name": "SGD", "lr": 0.1, "groups": [{"match": "2.bias", "lr": 0.7}]}})
    check(config)
    built = get_optimizers(config, small())
    assert [type(each.optimizer) for each in built.values()] == [AdamW, SGD]
    assert [each.names for each in built.values()] == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["2.weight", "2.bias"],
    ]
    assert [group["lr"] for group in built["head"].optimizer.param_groups] == [0.1, 0.7]
    labels = [label for label, _ in shown(built)]
    assert labels == ["body: group rest", "head: group rest", "head: group 2.bias"]
    with pytest.raises(ConfigError, match=r"optimizer: has several \(body, head\): trainer.name must name a subclass"):
        require_one_optimizer(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head": {"name": "SGD", "match": "1.*"}}, "head.match: 1.weight, 1.bias is trained by 'body' already"),
        ({"body": {"name": "AdamW", "match": "0.*"}, "head": {"name": "SGD", "match": "1.*"}},
         "optimizer: 2.weight, 2.bias would be trained, but no optimizer has them"),
        ({"body": {"name": "AdamW"}}, "optimizer: only one of several optimizers may be without 'match' or 'types'"),
        ({"body": {"name": "AdamW", "match": "*"}}, "optimizer.head: the other optimizers leave nothing to train"),
        ({"head": {"lr": 0.1}}, "optimizer.head: has no 'name'"),
        ({"head": {"name": "SGD", "momentun": 0.1}}, "got an unexpected argument 'momentun'; did you mean 'momentum'"),
    ],
)  # fmt: skip
def test_a_mistake_in_several_optimizers_is_told(changes: dict[str, Any], expected: str) -> None:
    assert expected in told(TWO | changes)[0]


def test_a_scheduler_for_all_or_one_for_each() -> None:
    config = config_of(TWO, lr_scheduler={"name": "StepLR", "step_size": 1, "gamma": 0.1})
    check(config)
    schedule = get_schedule(config, get_optimizers(config, small()), 40, 4)
    schedule.tick("epoch")
    with schedule.rate_of(0) as rate:
        assert rate == pytest.approx(1e-4)
    assert schedule.rates_by_group() == {"body": pytest.approx(1e-4), "head": pytest.approx(0.01)}
    own = {"head": {"name": "StepLR", "step_size": 1, "gamma": 0.5, "interval": "step", "warmup_steps": 2}}
    config = config_of(TWO, lr_scheduler=own)
    check(config)
    schedule = get_schedule(config, get_optimizers(config, small()), 40, 4)
    with schedule.rate_of(0):
        assert schedule.rates_by_group() == {"body": 1e-3, "head": 0.05}
    schedule.tick("step")
    saved = schedule.state_dict()
    fresh = get_schedule(config, get_optimizers(config, small()), 40, 4)
    fresh.load_state_dict(saved)
    assert fresh.rates_by_group() == {"body": 1e-3, "head": 0.05}
    wrong = told(TWO, lr_scheduler={"haed": own["head"]})
    assert wrong == ["lr_scheduler.haed: is not the name of an optimizer; the config's optimizers are body, head"]


# ----------------------------------------------------------------------------------------------- schedules and resuming


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "OneCycleLR", "max_lr": [0.5, 0.05], "interval": "step", "warmup_steps": 4},
        {"name": "CosineAnnealingLR", "interval": "step"},
        {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.1, "min_lr": [0.05, 0.0]},
    ],
)
def test_schedules_have_rates_per_group_and_resume_with_them(scheduler: dict[str, Any]) -> None:
    optimizer = {"name": "SGD", "lr": 0.1, "groups": [{"match": "0.*", "lr_scale": 0.1, "label": "body"}]}
    config = config_of(optimizer, lr_scheduler=scheduler)
    check(config)

    def made() -> tuple[Built, Any]:
        built = get_optimizers(config, small())
        return built["optimizer"], get_schedule(config, built, 10, 4)

    def run(schedule: Any, steps: range) -> list[list[float]]:
        rates = []
        for step in steps:
            with schedule.rate_of(step):
                rates.append([group["lr"] for group in schedule.optimizer.param_groups])
                assert list(schedule.rates_by_group().values()) == rates[-1]
            schedule.tick("step")
            schedule.tick("validation", float(step))
        return rates

    whole = run(made()[1], range(10))
    built, schedule = made()
    first = run(schedule, range(4))
    new, resumed = made()
    new.optimizer.load_state_dict(built.optimizer.state_dict())
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert list(resumed.rates_by_group()) == ["rest", "body"]
    assert first + run(resumed, range(4, 10)) == whole
    if scheduler["name"] == "ReduceLROnPlateau":
        assert whole[:3] == [pytest.approx(rates) for rates in ([0.1, 0.01], [0.1, 0.01], [0.05, 0.001])]
    if scheduler["name"] == "CosineAnnealingLR":
        assert whole[3] == pytest.approx(
            [0.1 * (1 + math.cos(0.3 * math.pi)) / 2, 0.01 * (1 + math.cos(0.3 * math.pi)) / 2]
        )


def test_a_state_follows_its_parameters_into_other_groups() -> None:
    model = small()
    before = built_of({"name": "SGD", "lr": 0.1, "momentum": 0.9}, model)
    for item in model.parameters():
        item.grad = torch.full_like(item, item.numel())
    before.optimizer.step()
    groups = [{"match": "2.*", "lr_scale": 0.1}, {"match": "1.*", "weight_decay": 1.0}]
    after = built_of({"name": "SGD", "lr": 0.1, "momentum": 0.9, "groups": groups}, model)
    after.optimizer.load_state_dict(regrouped(after, before.optimizer.state_dict(), before.names))  # type: ignore[arg-type]
    state = after.optimizer.state
    assert [state[item]["momentum_buffer"].flatten()[0] for item in model.parameters()] == [
        item.numel() for item in model.parameters()
    ]
    assert [group["weight_decay"] for group in after.optimizer.param_groups] == [0, 1.0, 0]


GROUPS = [{"match": "layers.0.*", "lr_scale": 0.1}, {"match": "*.bias", "weight_decay": 0, "momentum": 0.5}]
RUN: dict[str, Any] = {
    "optimizer": {"name": "SGD", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.1, "groups": GROUPS},
    "lr_scheduler": {"name": "StepLR", "step_size": 1, "gamma": 0.5},
}


@pytest.mark.slow
def test_a_training_with_groups_is_that_of_a_loop_written_by_hand(here: Callable[..., Path]) -> None:
    one_batch = {"loaders": {"name": "Points", "batch_size": 12, "train": {"size": 12}, "val": {"size": 5}}}
    start = last(here("groups-start", **RUN, **one_batch, **{"trainer.max_epochs": 0})).weights
    folder = here("groups-loop", **RUN, **one_batch, **{"trainer.max_epochs": 3})
    import toy

    model, data = toy.MLP(), toy.Points(12)
    model.load_state_dict(start)
    named = dict(model.named_parameters())
    optimizer = SGD(
        [
            {"params": [named["layers.0.weight"]], "lr": 0.02},
            {"params": [named["layers.0.bias"]], "lr": 0.02, "weight_decay": 0, "momentum": 0.5},
            {"params": [named["layers.4.weight"]]},
            {"params": [named["layers.4.bias"]], "weight_decay": 0, "momentum": 0.5},
        ],
        lr=0.2, momentum=0.9, weight_decay=0.1,
    )  # fmt: skip
    for _ in range(3):
        output: Tensor = model(data.x)  # type: ignore[assignment]
        nn.functional.cross_entropy(output, data.y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    for name, value in last(folder).weights.items():
        torch.testing.assert_close(value, named[name].detach(), rtol=1e-5, atol=1e-6)
    found = figures(folder)
    assert found["lr"] == found["lr/rest"] == {1: 0.2, 2: 0.1, 3: 0.05}
    assert found["lr/layers.0"] == pytest.approx({1: 0.02, 2: 0.01, 3: 0.005})


def test_a_training_with_groups_resumes_in_the_middle(
    here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = here("groups-whole", **RUN, **{"trainer.max_steps": 13})
    assert (
        "group layers.0-bias: 1 tensor, 16 parameters, lr 0.02, weight_decay 0, momentum 0.5" in capsys.readouterr().out
    )
    here("groups-part", **RUN, **{"trainer.max_steps": 5})
    part = here("groups-part", **RUN, **{"trainer.max_steps": 13})
    assert equal(last(part).weights, last(whole).weights)
    assert equal(last(part).state["optimizer"], last(whole).state["optimizer"])
    changed = copy.deepcopy(RUN)
    changed["optimizer"]["groups"][0]["lr_scale"] = 0.2
    with pytest.raises(ConfigError, match=r"optimizer.groups.0.lr_scale: 0.1 -> 0.2"):
        here("groups-part", **changed, **{"trainer.max_steps": 20})
    changed["optimizer"]["groups"] = [{"match": "*.bias", "lr_scale": 0.1}]  # continues in other groups
    folder = here("groups-part", **changed, **{"trainer.max_steps": 20, "trainer.resume": "last"})
    assert [len(group["params"]) for group in last(folder).state["optimizer"]["param_groups"]] == [2, 2]
    assert last(folder).state["parameters"] == ["layers.0.weight", "layers.4.weight", "layers.0.bias", "layers.4.bias"]


def test_config_shows_groups_and_several_optimizers_need_a_step_of_their_own(place: Place) -> None:
    config = place.config("groups-shown", **RUN)
    text = place.run("config", config).stdout
    assert "optimizer.groups.0:    layers.0.*: lr 0.02\n" in text
    assert "optimizer.groups.1:    *.bias: weight_decay 0, momentum 0.5\n" in text
    two = {"a": {"name": "SGD", "lr": 0.1, "match": "layers.0.*"}, "b": {"name": "SGD", "lr": 0.1}}
    result = place.run(place.config("groups-two", optimizer=two), expect=2)
    assert "optimizer: has several (a, b): trainer.name must name a subclass of Trainer" in result.stderr
