"""From a name in the config to an object: the user's own modules, nested components, config classes, errors, refusals."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile import EVIL, NAMES
from ml_collections import ConfigDict

from dtrain.config.build import build, defaults
from dtrain.config.check import check
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, load_config
from dtrain.config.resolve import is_installed
from dtrain.config.signatures import SOURCE

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """`write(**{"mine": text, "pack/part": text})`: Python files in the current folder, which nobody has packaged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    is_installed.cache_clear()

    def files(**texts: str) -> None:
        for name, text in texts.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")

    yield files
    for name, module in list(sys.modules.items()):
        if name not in known and str(tmp_path) in str(
            getattr(module, "__file__", "") or getattr(module, "__path__", "")
        ):
            del sys.modules[name]
    for name in [
        name for name, module in SOURCE._modules.items() if module is None or str(tmp_path) in str(module.file)
    ]:
        del SOURCE._modules[name]
    is_installed.cache_clear()


def made(section: str, text: str, *given: Any, modules: str = "mine", **names: Any) -> Any:
    """What a section of this text becomes."""
    config = from_mapping({"modules": [modules], section.partition(".")[0]: yaml.safe_load(text)})
    return build(config, section, *given, **names)


def refusal(section: str, text: str, *given: Any, modules: str = "mine") -> str:
    """The one line that a section of this text gives."""
    with pytest.raises(ConfigError) as caught:
        made(section, text, *given, modules=modules)
    assert len(caught.value.mistakes) == 1
    return str(caught.value)


# ----------------------------------------------------------------------------------------------- one's own components

PARTS = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self, dim: int = 3, block=None, blocks=(), options=None):
            super().__init__()
            self.dim, self.block, self.blocks, self.options = dim, block, blocks, options

    class Block:
        def __init__(self, size: int = 1, inner=None):
            self.size, self.inner = size, inner

        @classmethod
        def large(cls, size: int = 100):
            return cls(size)

    class Outer:
        class Inner(Block):
            pass

    def make_net(dim: int):
        return Net(dim * 2)

    def square(x, factor=1):
        return x * x * factor

    def make_square(factor=1):
        return lambda x: square(x, factor)

    def own_loss(output, target, power: int = 2):
        return ((output - target) ** power).sum()
    """


def test_a_class_and_a_function_of_a_module_in_the_current_folder(write: Write) -> None:
    write(mine=PARTS)
    assert made("model", "{name: Net, dim: 4}").dim == 4
    assert made("model", "{name: make_net, dim: 4}").dim == 8
    assert made("model", "{name: mine.Net}").dim == 3
    assert made("model", "{name: 'mine:Net'}").dim == 3
    assert made("model", "{name: 'mine:Block.large', size: 5}").size == 5
    assert made("model", "{name: mine.Outer.Inner, size: 6}").size == 6


def test_a_module_that_may_be_missing(write: Write) -> None:
    write(mine=PARTS)
    values = {"optional_modules": ["not_here", "mine"], "model": {"name": "Net"}}
    assert type(build(from_mapping(values), "model")).__module__ == "mine"
    check_only = from_mapping({"modules": "not_here", "model": {"name": "Net"}})
    with pytest.raises(ConfigError, match=r"no module 'not_here' .*may be missing is listed under optional_modules"):
        check(check_only, None)
    write(broken="def (")
    with pytest.raises(ConfigError, match="optional_modules: SyntaxError"):
        check(from_mapping({"optional_modules": "broken", "model": {"name": "torch.nn.ReLU"}}), None)


def test_a_package_in_the_current_folder(write: Write) -> None:
    write(**{"pack/__init__": "from .nets import Net", "pack/nets": PARTS, "pack/more": "class More: ..."})
    assert made("model", "{name: Net, dim: 4}", modules="pack").dim == 4
    assert type(made("model", "{name: More}", modules="pack.more")).__name__ == "More"
    assert made("model", "{name: pack.nets.Net, dim: 5}", modules="pack").dim == 5
    assert type(made("model", "{name: 'pack.more:More'}", modules="pack")).__module__ == "pack.more"


def test_a_folder_without_init_is_a_package_too(write: Write) -> None:
    write(**{"loose/nets": PARTS})
    assert made("model", "{name: Net, dim: 4}", modules="loose.nets").dim == 4


def test_components_and_lists_of_components_inside_are_built(write: Write) -> None:
    write(mine=PARTS)
    net = made(
        "model",
        "{name: Net, block: {name: Block, inner: {name: Block, size: 7}}, blocks: [{name: Block, size: 1}, 3, [{name: Block, size: 2}]]}",
    )
    assert net.block.inner.size == 7
    assert (net.blocks[0].size, net.blocks[1], net.blocks[2][0].size) == (1, 3, 2)


def test_a_component_deep_in_a_plain_mapping_is_built(write: Write) -> None:
    write(mine=PARTS)
    options = made("model", "{name: Net, options: {a: {b: [{c: {name: Block, size: 5}}]}, d: 1}}").options
    assert options.a.b[0].c.size == 5
    assert (options.d, options["d"]) == (1, 1)


def test_inside_a_section_any_library_will_do() -> None:
    joined = made(
        "loaders.train", "{train: {name: ConcatDataset, datasets: [{name: Digits, split: val}]}}", modules="torch.nn"
    )
    assert type(joined.datasets[0]).__name__ == "Digits"
    inner = made(
        "model",
        "{name: torch.nn.TransformerEncoder, encoder_layer: {name: TransformerEncoderLayer, d_model: 4, nhead: 2, batch_first: true}, num_layers: 1}",
    )
    assert isinstance(inner.layers[0], torch.nn.TransformerEncoderLayer)


def test_a_function_inside_is_itself_what_is_wanted_until_nothing_lacks(write: Write) -> None:
    write(mine=PARTS)
    net = made(
        "model",
        "{name: Net, blocks: [{name: square}, {name: square, factor: 2}, {name: make_square, factor: 3}, {name: torch.nn.functional.gelu}, {name: torch.relu}]}",
    )
    assert [block(3) for block in net.blocks[:3]] == [9, 18, 27]
    assert isinstance(net.blocks[1], functools.partial)
    assert net.blocks[3] is torch.nn.functional.gelu
    assert net.blocks[4] is torch.relu


def test_a_loss_may_be_a_class_a_function_or_made_by_one(write: Write) -> None:
    write(mine=PARTS + "\n    def make_loss(scale: float):\n        return lambda output, target: scale\n")
    assert isinstance(made("loss", "{name: CrossEntropyLoss}"), torch.nn.CrossEntropyLoss)
    assert made("loss", "{name: own_loss}")(torch.ones(1) * 3, 1) == 4
    assert made("loss", "{name: own_loss, power: 3}")(torch.ones(1) * 3, 1) == 8
    assert made("loss", "{name: make_loss, scale: 5}")(1, 2) == 5
    assert made("loss", "{name: l1_loss, reduction: sum}")(torch.ones(3), torch.zeros(3)) == 3
    assert (
        refusal("loss", "{name: make_loss}")
        == "loss: make_loss is missing required argument 'scale'; make_loss(scale: float)"
    )


def test_numbers_become_a_tensor_or_a_tuple_where_only_that_is_taken(write: Write) -> None:
    write(
        mine="from typing import Optional\nclass Pair:\n    def __init__(self, sizes: tuple[int, int], rest: Optional[list] = None): self.sizes, self.rest = sizes, rest\n"
    )
    loss = made("loss", "{name: CrossEntropyLoss, weight: [1, 5, 1]}")
    assert torch.equal(loss.weight, torch.tensor([1.0, 5.0, 1.0]))
    assert loss(torch.ones(2, 3), torch.tensor([0, 1])) > 0
    pair = made("model", "{name: Pair, sizes: [1, 2], rest: [3]}")
    assert (pair.sizes, pair.rest) == ((1, 2), [3])


def test_a_list_of_weights_becomes_a_tensor_where_a_loss_does_not_say_what_it_takes(write: Write) -> None:
    write(
        mine="""
        import torch
        class Weighted(torch.nn.Module):
            def __init__(self, weight=None, pos_weight=None, sizes=()):
                super().__init__()
                self.sizes = sizes
                self.ce = torch.nn.CrossEntropyLoss(weight=weight)
                self.bce = torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight)
        """
    )
    loss = made("loss", "{name: Weighted, weight: [1, 5, 1], pos_weight: [2], sizes: [3, 4]}")
    assert torch.equal(loss.ce.weight, torch.tensor([1.0, 5.0, 1.0])) and loss.bce.pos_weight.tolist() == [2.0]
    assert loss.sizes == [3, 4]
    inner = made("loss", "{name: Weighted, sizes: [{name: Weighted, weight: [1, 2]}]}").sizes[0]
    assert inner.ce.weight.tolist() == [1.0, 2.0]


ARGUMENTS = """
    from collections.abc import Callable
    import torch
    def padded(samples): return samples
    def halve(epoch: int, by: float = 0.5) -> float: return by**epoch
    def ready(by: float = 0.5): return by
    class Norm(torch.nn.Module):
        def __init__(self, features, eps=1e-5):
            super().__init__()
            self.features, self.eps = features, eps
    class Net(torch.nn.Module):
        def __init__(self, norm: Callable[[int], torch.nn.Module] | None = None, act: torch.nn.Module | None = None,
                     kind: type[torch.nn.Module] = Norm, stages: list[Callable] = (), notes=None, table: dict | None = None):
            super().__init__()
            self.norm, self.act, self.kind, self.stages, self.notes, self.table = norm, act, kind, stages, notes, table
    class Named(torch.nn.Module):
        def __init__(self, name, names=None, dataset=None, valid=False, size=1):
            super().__init__()
            self.given = (name, names, dataset, valid, size)
    class Rated(torch.optim.SGD):
        def __init__(self, params, learning_rate): super().__init__(params, lr=learning_rate)
"""


def test_a_bare_name_where_only_a_function_or_an_object_is_taken(write: Write) -> None:
    write(mine=ARGUMENTS)
    net = made("model", "{name: Net, norm: Norm, act: torch.nn.ReLU, kind: LayerNorm, stages: [ready, gelu]}")
    assert (net.norm.__name__, net.kind) == ("Norm", torch.nn.LayerNorm)  # the class itself, not what it makes
    assert isinstance(net.act, torch.nn.ReLU)
    assert [stage.__name__ for stage in net.stages] == ["ready", "gelu"]
    schedule = made("lr_scheduler", "{name: LambdaLR, lr_lambda: halve}", torch.optim.SGD([torch.ones(1)], lr=8.0))
    assert [schedule.optimizer.step(), schedule.step(), schedule.get_last_lr()][2] == [4.0]
    assert refusal("model", "{name: Net, norm: Norrm}").startswith(
        "model.norm: there is no 'Norrm'; did you mean 'Norm'?"
    )


def test_a_partial_fixes_some_arguments_and_calls_nothing(write: Write) -> None:
    write(mine=ARGUMENTS)
    net = made(
        "model", "{name: Net, norm: {name: Norm, _partial_: true, eps: 0.1}, kind: {name: Norm, _partial_: true}}"
    )
    assert (net.norm(3).features, net.norm(3).eps) == (3, 0.1) and net.kind.__name__ == "Norm"
    assert made("model", "{name: Net, act: {name: Norm, _partial_: false, features: 2}}").act.features == 2
    wrong = refusal("model", "{name: Net, norm: {name: Norm, _partial_: true, epsilon: 1}}")
    assert wrong.startswith("model.norm.epsilon: Norm got an unexpected argument 'epsilon'; did you mean 'eps'?")
    wrong = refusal("model", "{name: Net, norm: {name: Norm, _partial_: 3}}")
    assert wrong.endswith("model.norm._partial_: expected true or false, found int 3")


def test_a_mapping_that_is_data_keeps_its_name_and_its_dots(write: Write) -> None:
    write(mine=ARGUMENTS)
    notes = made("model", "{name: Net, notes: {_data_: true, name: me, '^net[.]': {name: Norm}}}").notes
    assert notes == {"name": "me", "^net[.]": {"name": "Norm"}} and type(notes) is dict
    assert made("model", "{name: Net, table: {name: me, a.b: 1}}").table == {"name": "me", "a.b": 1}
    assert "contains a dot" in refusal("model", "{name: Net, act.inplace: true}")


def test_arguments_whose_names_look_like_settings(write: Write) -> None:
    write(mine=ARGUMENTS)
    text = "{name: Named, names: [a], dataset: b, valid: true, size: 2}"
    assert made("model", text).given == ("Named", ["a"], "b", True, 2)
    config = from_mapping(
        {"modules": ["mine"], "loaders": {"name": "Named", "dataset": {"name": "Named"}, "valid": 3, "val": {}}}
    )
    name, _, dataset, valid, _ = build(config, "loaders.val").given
    assert (name, dataset.given[0], valid) == ("Named", "Named", 3)
    for key in ("learning_rate", "lr"):
        optimizer = made("optimizer", f"{{name: Rated, {key}: 0.5}}", [torch.ones(1)])
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert "'names' and 'name' are two" in refusal("metrics.MSE", "{name: MSE, names: [Dice]}")
    assert "'learning_rate' and 'lr' are two" in refusal("optimizer", "{name: SGD, lr: 1, learning_rate: 2}")
    subset = from_mapping(
        {"loaders": {"name": "Subset", "dataset": {"name": "Digits", "split": "val"}, "indices": [5, 7], "test": {}}}
    )
    assert len(build(subset, "loaders.test")) == 2


def test_a_dataclass_and_a_named_tuple(write: Write) -> None:
    write(
        mine="from dataclasses import dataclass, field\nfrom typing import NamedTuple\n@dataclass\nclass D:\n    a: int\n    b: list = field(default_factory=list)\nclass T(NamedTuple):\n    a: int\n    b: int = 2\n"
    )
    assert made("model", "{name: D, a: 1}").b == []
    assert made("model", "{name: T, a: 1}") == (1, 2)
    assert refusal("model", "{name: D, a: 1, c: 2}").startswith("model.c: D got an unexpected argument 'c'")


def test_what_the_caller_gets_is_a_copy(write: Write) -> None:
    write(mine=PARTS)
    config = from_mapping({"modules": ["mine"], "model": {"name": "Net", "options": {"a": [1]}, "blocks": [1]}})
    net = build(config, "model")
    net.options.a.append(2)
    net.options.new = 3
    net.blocks.append(4)
    assert to_plain(config.model) == {"name": "Net", "options": {"a": [1]}, "blocks": [1]}


# ---------------------------------------------------------------------------------------------- what dtrain supplies


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2))]


def test_an_optimizer_gets_the_parameters_and_a_scheduler_the_optimizer() -> None:
    optimizer = made("optimizer", "{name: AdamW, lr: 0.5, betas: [0.8, 0.9]}", parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    scheduler = made("lr_scheduler", "{name: CosineAnnealingLR}", optimizer, T_max=7)
    assert (scheduler.T_max, scheduler.optimizer) == (7, optimizer)


@pytest.mark.parametrize("outer", ["SequentialLR, milestones: [2]", "ChainedScheduler"])
def test_schedulers_inside_a_scheduler_get_the_optimizer_too(outer: str) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    inner = "[{name: LinearLR, start_factor: 0.5, total_iters: 2}, {name: StepLR, step_size: 1}]"
    scheduler = made("lr_scheduler", f"{{name: {outer}, schedulers: {inner}}}", optimizer)
    assert [type(item).__name__ for item in scheduler._schedulers] == ["LinearLR", "StepLR"]
    assert all(item.optimizer is optimizer for item in scheduler._schedulers)
    for _ in range(4):
        optimizer.step()
        scheduler.step()


def test_an_optimizer_around_an_optimizer(write: Write) -> None:
    write(mine="class Around:\n    def __init__(self, base, k: int = 5): self.base, self.k = base, k\n")
    around = made("optimizer", "{name: Around, base: {name: SGD, lr: 0.1}, k: 3}", parameters())
    assert isinstance(around.base, torch.optim.SGD)
    assert around.k == 3


def test_a_schedulers_function_argument() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    text = "{name: LambdaLR, lr_lambda: {name: mine2.half}}"
    with pytest.raises(ConfigError, match="there is no package 'mine2'"):
        made("lr_scheduler", text, optimizer)


def test_what_dtrain_supplies_cannot_be_given() -> None:
    assert (
        refusal("optimizer", "{name: SGD, params: [1]}", parameters())
        == "optimizer.params: 'params' is supplied by dtrain; remove it"
    )


def test_the_settings_of_dtrains_own_calls_have_their_defaults() -> None:
    config = from_mapping({"trainer": {"max_epochs": 3}})
    settings = defaults(config, "trainer")
    assert settings["max_epochs"] == 3
    assert settings["accumulate"] == 1
    assert "parts" not in settings


def test_the_settings_of_a_subclass_have_the_defaults_of_its_base(write: Write) -> None:
    code = """
from dtrain.trainer import Trainer

class Mine(Trainer):
    def __init__(self, parts, *, share: float = 0.5, keep_last: int = 7, **settings):
        super().__init__(parts, keep_last=keep_last, **settings)
"""
    write(mine=code)
    config = from_mapping({"modules": ["mine"], "trainer": {"name": "Mine", "max_steps": 7}})
    settings = defaults(config, "trainer")
    assert (settings["share"], settings["keep_last"], settings["keep_best"]) == (0.5, 7, 1)
    assert (settings["max_steps"], settings["precision"]) == (7, None)


# ----------------------------------------------------------------------------- classes that take one config object

DOUBLE = """
    import ml_collections
    import torch

    def triple(value):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3

    class Head:
        pass

    class VisionTransformer(torch.nn.Module):
        '''Touches its config in each of the ways in which such classes do.'''

        def __init__(self, config, zero_head=False, vis=False):
            super().__init__()
            assert isinstance(config, ml_collections.ConfigDict)
            self.config, self.zero_head, self.vis = config, zero_head, vis
            self.attributes = config.hidden_size, config.transformer.num_layers
            self.items = config['n_classes'], config.transformer["num_heads"]
            self.gets = config.patches.get("grid"), config.get("used_multiple_backbone", False)
            self.missing = getattr(config, "final_activation", "tanh")
            self.has = "backbone_seg" in config
            self.all = {**config, "hidden_size": -1}
            self.encoders = self.create_encoders(**config.backbone_model1)
            config.skip_channels[3] = 0
            config.backbone.patches = config.patches
            self.conv = torch.nn.Conv3d(1, 2, kernel_size=config.patches["size"], stride=triple(config.patches["size"]))
            self.head = globals()[config.get("decoder", "Head")]()
            self.name = config.name

        def create_encoders(self, depth, width=1):
            return depth * width

    class Strict:
        def __init__(self, hidden_size: int): self.hidden_size = hidden_size

    class Open:
        def __init__(self, **kwargs): self.kwargs = kwargs

    class ConfigAndMore:
        def __init__(self, config: ml_collections.ConfigDict, img_size: int = 224): self.config, self.img_size = config, img_size

    class Optional:
        def __init__(self, cfg=None): self.cfg = cfg

    class Annotated:
        def __init__(self, settings: ml_collections.ConfigDict): self.settings = settings

    class ConfigAndKwargs:
        def __init__(self, config, **kwargs): self.config, self.kwargs = config, kwargs

    class Raises:
        def __init__(self, config):
            len(3)

    class RaisesToo:
        def __init__(self, hidden_size: int):
            self.helper(hidden_size, wrong=1)
        def helper(self, size): ...

    def function(config):
        return config.hidden_size
    """
SEED = """
    name: VisionTransformer
    hidden_size: 48
    n_classes: 2
    img_size: 32
    skip_channels: [32, 16, 8, 8]
    patches: {grid: [4, 4, 4], size: [8, 8, 8]}
    transformer: {num_heads: 4, num_layers: 1}
    backbone: {depth: 1}
    backbone_model1: {depth: 3, width: 2}
    decoder: Head
    """


def test_a_class_that_takes_one_config_gets_it_as_such_classes_read_it(write: Write) -> None:
    write(mine=DOUBLE)
    config = from_mapping({"modules": ["mine"], "model": yaml.safe_load(SEED)})
    before = to_plain(config)
    check_section_is_good(config)
    model = build(config, "model")
    assert isinstance(model.config, ConfigDict)
    assert model.attributes == (48, 1)
    assert model.items == (2, 4)
    assert model.gets == ([4, 4, 4], False)
    assert (model.missing, model.has, model.encoders) == ("tanh", False, 6)
    assert model.all["hidden_size"] == -1
    assert model.config.skip_channels == [32, 16, 8, 0]
    assert model.conv.kernel_size == (8, 8, 8)
    assert (model.zero_head, model.vis) == (False, False), "other arguments stay at their defaults"
    assert model.name == "VisionTransformer", "the name is in the config"
    assert to_plain(config) == before, "the run's own config is as it was"
    assert config.is_locked


def check_section_is_good(config: ConfigDict) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert not [line for line in str(caught.value).split("\n") if line.startswith("model")]


def test_a_strict_class_gets_arguments_without_the_name(write: Write) -> None:
    write(mine=DOUBLE)
    assert made("model", "{name: Strict, hidden_size: 3}").hidden_size == 3
    assert refusal("model", "{name: Strict, hidden_sise: 3, hidden_size: 3}").startswith(
        "model.hidden_sise: Strict got an unexpected argument"
    )


def test_a_class_with_kwargs_gets_arguments_and_never_a_config(write: Write) -> None:
    write(mine=DOUBLE)
    assert made("model", "{name: Open, hidden_size: 3, deep: {a: 1}}").kwargs == {
        "hidden_size": 3,
        "deep": ConfigDict({"a": 1}),
    }


def test_the_third_form_gives_the_config_by_name(write: Write) -> None:
    write(mine=DOUBLE)
    model = made("model", "{name: ConfigAndMore, config: {hidden_size: 3, layers: [{a: 1}]}, img_size: 32}")
    assert (model.config.hidden_size, model.config.layers[0].a, model.img_size) == (3, 1, 32)
    assert isinstance(model.config, ConfigDict)
    assert not model.config.is_locked


def test_other_ways_to_ask_for_a_config(write: Write) -> None:
    write(mine=DOUBLE)
    whole = made("model", "{name: ConfigAndMore, hidden_size: 3, img_size: 32}")
    assert (whole.config.img_size, whole.img_size) == (32, 224)
    assert made("model", "{name: Optional, hidden_size: 3}").cfg.hidden_size == 3
    assert made("model", "{name: Optional}").cfg is None
    assert made("model", "{name: Annotated, hidden_size: 3}").settings.hidden_size == 3
    assert made("model", "{name: ConfigAndKwargs, hidden_size: 3}").config.hidden_size == 3
    assert made("model", "{name: function, hidden_size: 3}") == 3
    assert made("loss", "{name: function, hidden_size: 3}") == 3


def test_an_error_inside_is_told_as_itself(write: Write, tmp_path: Path) -> None:
    write(mine=DOUBLE)
    lines = textwrap.dedent(DOUBLE).split("\n")
    raising = lines.index("        len(3)") + 1
    assert refusal("model", "{name: Raises, hidden_size: 3}") == (
        f"model: Raises(hidden_size=3) raised TypeError: object of type 'int' has no len() ({tmp_path}/mine.py:{raising})"
    )
    helper = lines.index("        self.helper(hidden_size, wrong=1)") + 1
    assert refusal("model", "{name: RaisesToo, hidden_size: 3}") == (
        "model: RaisesToo(hidden_size=3) raised TypeError: RaisesToo.helper() got an unexpected keyword argument 'wrong' "
        f"({tmp_path}/mine.py:{helper})"
    )


# -------------------------------------------------------------------------------------------- errors of the components


def test_a_constructors_error_has_the_key_the_users_line_and_the_raising_line(write: Write, tmp_path: Path) -> None:
    write(
        mine="import torch\nclass Net:\n    def __init__(self, dim: int = 1):\n        self.layer = torch.nn.Conv2d(3, dim, 1, groups=2)\n"
    )
    Path("c.yaml").write_text("modules: [mine]\nmodel:\n  name: Net\n  dim: 4\n")
    with pytest.raises(ConfigError) as caught:
        build(load_config("c.yaml"), "model")
    line = str(caught.value)
    assert line.startswith("c.yaml:2:1: model: Net(dim=4) raised ValueError: in_channels must be divisible by groups (")
    assert f"({tmp_path}/mine.py:4, in " in line
    assert line.rpartition("/torch/nn/modules/conv.py:")[2].rstrip(")").isdecimal()
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_in_a_nested_component_names_the_nested_key(write: Write) -> None:
    write(
        mine="class Bad:\n    def __init__(self, p: int = 1): raise RuntimeError('several\\nlines')\nclass Net:\n    def __init__(self, blocks): ...\n"
    )
    Path("c.yaml").write_text("modules: [mine]\nmodel:\n  name: Net\n  blocks:\n    - {name: Bad}\n")
    with pytest.raises(ConfigError) as caught:
        build(load_config("c.yaml"), "model")
    assert str(caught.value).startswith("c.yaml:5:7: model.blocks.0: Bad() raised RuntimeError: several lines (")


def test_sys_exit_in_a_constructor_is_an_error_like_others(write: Write) -> None:
    write(mine="import sys\nclass Net:\n    def __init__(self): sys.exit(0)\n")
    assert "raised SystemExit: 0" in refusal("model", "{name: Net}")


@pytest.mark.parametrize(
    ("said", "place", "path"),
    [
        ("size is wrong", "4:3", "model.size"),
        ("steps[1].p: too much", "7:17", "model.steps.1.p"),
        ("recipe.steps[0] is unknown", "6:7", "model.steps.0"),
        ("steps[7] is not there", "5:3", "model.steps"),
        ("Net: size is wrong", "2:1", "model"),
        ("", "2:1", "model"),
    ],
)
def test_an_error_that_begins_with_an_argument_is_told_at_its_key(
    write: Write, said: str, place: str, path: str
) -> None:
    write(
        mine=f"""
        from collections.abc import Mapping, Sequence
        class Net:
            def __init__(self, size: int, steps: Sequence[Mapping[str, float]]) -> None:
                raise ValueError({said!r})
    """
    )
    text = "modules: [mine]\nmodel:\n  name: Net\n  size: 3\n  steps:\n    - {p: 1}\n    - {name: A, p: 2}\n"
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(load_config("c.yaml"), "model")
    assert str(caught.value).startswith(
        f"c.yaml:{place}: {path}: Net(size=3, steps=[{{'p': 1}}, {{'name': 'A', 'p': 2}}]) raised ValueError: {said}"
    )


@pytest.mark.parametrize("wanted", ["list[dict]", "Sequence[Mapping[str, Any]] | None", "'list[dict] | list[Mapping]'"])
def test_a_list_of_mappings_is_handed_over_as_it_stands_where_that_is_wanted(write: Write, wanted: str) -> None:
    write(
        mine=f"""
        from collections.abc import Mapping, Sequence
        from typing import Any
        class Net:
            def __init__(self, steps: {wanted}) -> None:
                self.steps = steps
    """
    )
    steps = made("model", "{name: Net, steps: [{name: nothing.of.that.name, p: 1}, {q: {name: B}}]}").steps
    assert steps == [{"name": "nothing.of.that.name", "p": 1}, {"q": {"name": "B"}}]
    assert type(steps[0]) is dict
    assert "expected" in refusal("model", "{name: Net, steps: [{p: 1}, 3]}")


def test_other_lists_are_built(write: Write) -> None:
    write(
        mine="""
        class Part:
            pass
        class Net:
            def __init__(self, parts: list, more: "list[dict | Part]", rest: list[dict] | Part) -> None:
                self.parts = [*parts, *more, *rest]
    """
    )
    net = made("model", "{name: Net, parts: [{name: Part}], more: [{name: Part}], rest: [{name: Part}]}")
    assert [type(part).__name__ for part in net.parts] == ["Part", "Part", "Part"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import no_such_package_here\nclass Net: ...\n",
            "importing mine failed: ModuleNotFoundError: No module named 'no_such_package_here' ({folder}/mine.py:1)",
        ),
        (
            "\nfrom torch.nn import NoSuchLayer\nclass Net: ...\n",
            "importing mine failed: ImportError: cannot import name 'NoSuchLayer' from 'torch.nn' ",
        ),
        (
            "class Net: ...\n\n1 / 0\n",
            "importing mine failed: ZeroDivisionError: division by zero ({folder}/mine.py:3)",
        ),
        ("class Net: ...\nraise SystemExit('bye')\n", "importing mine failed: SystemExit: bye ({folder}/mine.py:2)"),
        ("from helper import x\nclass Net: ...\n", "importing mine failed: SyntaxError: "),
        (
            "from helper2 import x\nclass Net: ...\n",
            "importing mine failed: NameError: name 'undefined' is not defined ({folder}/helper2.py:2)",
        ),
        ("Net = 3\n", "'Net' is a int; expected a class or a function"),
        ("import torch\nNet = torch.nn.Linear(1, 1)\n", "'Net' is a Linear; expected a class or a function"),
        (
            "def __getattr__(name): raise AttributeError(name)\n",
            "importing mine failed: AttributeError: Net ({folder}/mine.py:1)",
        ),
    ],
)
def test_a_module_that_fails_shows_its_own_error_and_the_users_own_line(
    write: Write, tmp_path: Path, text: str, expected: str
) -> None:
    write(mine=text, helper="def f(:\n", helper2="\nundefined\n")
    line = refusal("model", "{name: Net}")
    assert line.startswith(f"model.name: {expected.format(folder=tmp_path)}")
    assert str(tmp_path) in line or "expected a class" in line


def test_a_module_that_is_no_python_is_told_with_its_line(write: Write, tmp_path: Path) -> None:
    write(mine="x = 1\nclass Net(:\n")
    config = from_mapping({"modules": ["mine"], "model": {"name": "Net"}})
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert f"modules.0: SyntaxError: invalid syntax ({tmp_path}/mine.py:2)" in str(caught.value).split("\n")


def test_a_package_that_fails_half_way_fails_the_second_time_too(write: Write) -> None:
    """Python keeps the submodules of a package whose import failed, so that a second import of one succeeds."""
    write(**{"half/__init__": "from . import good\nimport no_such_package_here\n", "half/good": "class Net: ...\n"})
    for _ in range(2):
        assert "No module named 'no_such_package_here'" in refusal("model", "{name: half.good.Net}", modules="half")
    assert not [name for name in sys.modules if name.startswith("half")]


def test_what_is_known_at_run_time_only_is_checked_then(write: Write) -> None:
    write(
        mine="""
        import functools
        def logged(function):
            @functools.wraps(function)
            def inner(*args, **kwargs): return function(*args, **kwargs)
            return inner
        @logged
        def net(dim: int, depth: int = 1): return dim
        class Made(type): ...
        class Meta(metaclass=Made):
            def __init__(self, dim: int): self.dim = dim
        """
    )
    assert made("model", "{name: net, dim: 3}") == 3
    assert made("model", "{name: Meta, dim: 3}").dim == 3
    assert (
        refusal("model", "{name: net, dim: 3, dpth: 1}")
        == "model.dpth: net got an unexpected argument 'dpth'; did you mean 'depth'?; net(dim: int, depth: int = 1)"
    )
    assert refusal("model", "{name: Meta, dim: a}") == "model.dim: expected int, found string 'a'; Meta(dim: int)"
    assert refusal("model", "{name: Meta}") == "model: Meta is missing required argument 'dim'; Meta(dim: int)"


def test_a_module_beside_the_listed_ones_is_not_the_configs_to_name(write: Write) -> None:
    write(mine="class A: ...\n", other="class B: ...\n")
    assert (
        refusal("model", "{name: other.B}")
        == "model.name: 'other' is neither installed nor under 'modules'; add it there: modules: [other]"
    )
    assert refusal("model", "{name: 'other:B'}").endswith("add it there: modules: [other]")


# ------------------------------------------------------------------------------------------------------- installed


@pytest.mark.parametrize("record", ["pth", "direct_url", "egg-info beside it", "none"])
def test_an_editable_installation_is_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    source, site = tmp_path / "my project" / "src", tmp_path / "site-packages"
    (source / "editable_one").mkdir(parents=True)
    (source / "editable_one" / "__init__.py").write_text("class Net: ...\n")
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(source))
    if record == "pth":
        (site / "__editable__.one.pth").write_text(f"import sys\n{source}\n")
    elif record == "direct_url":
        (site / "one-1.0.dist-info").mkdir()
        facts = {"url": (tmp_path / "my project").as_uri(), "dir_info": {"editable": True}}
        (site / "one-1.0.dist-info" / "direct_url.json").write_text(json.dumps(facts))
        (site / "broken-1.0.dist-info").mkdir()
        (site / "broken-1.0.dist-info" / "direct_url.json").write_text("{")
    elif record == "egg-info beside it":
        (source / "one.egg-info").mkdir()
    is_installed.cache_clear()
    assert is_installed("editable_one") is (record != "none")
    is_installed.cache_clear()


def test_what_is_installed() -> None:
    for name in ("torch", "yaml", "ml_collections", "dtrain", "torchmetrics"):
        assert is_installed(name), name
    for name in ("os", "no_such_package_here"):
        assert not is_installed(name), name


# --------------------------------------------------------------------------------- the standard library, by any route


def test_there_are_enough_hostile_names() -> None:
    assert len(set(NAMES)) >= 150


@pytest.mark.slow
def test_nothing_of_the_standard_library_is_imported_or_called_by_any_name(tmp_path: Path) -> None:
    """Each name as a model, inside a component, as a metric, a trainer and a module, while an audit hook listens."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    code = """
import json, sys
sys.path.insert(0, "")
import torch, torchmetrics, dtrain.trainer, dtrain.tracking.journal  # what a config may name is there; what it may not, is not
from dtrain.config.build import build
from dtrain.config.check import check
from dtrain.config.load import from_mapping
from dtrain.config.schema import calls
from dtrain.config.errors import ConfigError

CALLS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "shutil.rmtree",
         "ctypes.dlopen", "socket.connect", "socket.bind", "webbrowser.open", "pickle.find_class")
seen = []

def listen(event, args):
    if event in CALLS:
        seen.append((event, repr(args)[:200]))
    elif event == "import" and args[0] in sys.stdlib_module_names and args[0] not in sys.modules:
        seen.append((event, args[0]))

sys.addaudithook(listen)
arguments = {"command": "touch marker", "args": "touch marker", "source": "open('marker', 'w')", "p": 1}
refused = 0
for name in json.load(open("names.json")):
    call = {"name": name}
    for section in (
        {"model": call | arguments},
        {"model": {"name": "torch.nn.ModuleList", "modules": [call]}},
        {"metrics": {"name": [name]}},
        {"trainer": call | {"max_epochs": 1}},
    ):
        config = from_mapping({"modules": ["evil"]} | section)
        try:
            build(config, next(one for one in calls(config) if one.partition(".")[0] in section))
            print("BUILT", repr(name), section)
        except ConfigError as error:
            assert all(len(str(one).splitlines()) == 1 for one in error.mistakes), error
            refused += 1
    module = from_mapping({"modules": [name]})
    try:
        check(module)
    except ConfigError as error:
        pass
print("refused", refused)
print("seen", seen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.stderr == ""
    assert done.stdout == f"refused {4 * len(NAMES)}\nseen []\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pyc" and path.name != "__pycache__") == [
        "evil.py",
        "names.json",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "torch.relu",
        "torch.nn.functional.conv2d",
        "torch.nn.init.kaiming_normal_",
        "torch.from_numpy",
        "torch.Tensor.add",
        "numpy.load",
    ],
)
def test_functions_of_installed_packages_are_no_strangers(write: Write, name: str) -> None:
    write(mine="class Keeps:\n    def __init__(self, function): self.function = function\n")
    assert callable(made("model", f"{{name: Keeps, function: {{name: {name}}}}}").function)
