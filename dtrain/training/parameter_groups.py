"""Which parameters an optimizer trains together, with which settings: `match`, `types`, `groups`, `layer_decay`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch.nn import Module, Parameter

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import first_few
from dtrain.config.optimizers import Rule

LOSS = "loss."  # what the names of a loss's parameters begin with
REST = "rest"  # the group of those that have the section's own settings
# What is at the input or at the output of a network, by the names that people give it, also where it is registered in
# another order than it is called: vit-pytorch's `transformer.norm` comes before `transformer.layers`.
_INPUT = re.compile(r"embed|token|patch|stem|conv1|conv_proj|norm_pre|pre_?norm|ln_pre|register|\bpos|\bw[tp]e\b")
_OUTPUT = re.compile(r"(^|\.)(norm|ln|layer_?norm|final_?norm|norm_post|ln_post|ln_f|head|classifier|fc|proj)(\.|$)")


def group_settings(
    *,
    match: str | list[str] | None = None,
    types: str | list[str] | None = None,
    groups: list[dict] | None = None,
    layer_decay: float | None = None,
) -> dict[str, Any]:
    """Dtrain's own keys under `optimizer`; the other keys are the optimizer's.

    Args:
        match: Patterns of the names of the parameters that this one of several optimizers trains. Default: the others.
        types: Class names of the modules whose parameters it trains.
        groups: Parameters with settings of their own: mappings with match or types, and lr, lr_scale or any argument.
        layer_decay: Each layer's rate is so many times that of the layer after it.
    """
    return dict(locals())


@dataclass(frozen=True, eq=False)
class Named:
    """A parameter with its full name; of a loss it begins with `loss.`."""

    name: str
    parameter: Parameter
    other_names: tuple[str, ...] = ()  # of a tied one
    types: frozenset[str] = frozenset()  # of the module that owns it: its class and those that it inherits from

    @property
    def is_of_loss(self) -> bool:
        """Whether it is a loss's own."""
        return self.name.startswith(LOSS)

    def fits(self, match: Sequence[str], types: Sequence[str]) -> bool:
        """Whether a pattern fits one of its names and its owner is of one of the types; () stands for any."""
        names = (self.name, *self.other_names)
        is_named = not match or any(fnmatchcase(name, pattern) for name in names for pattern in match)
        return is_named and (not types or not self.types.isdisjoint(types))


@dataclass(frozen=True)
class Group:
    """Parameters that are trained with the same settings."""

    name: str
    items: Sequence[Named]
    settings: Mapping[str, Any] = field(default_factory=dict)  # where they differ from the section's own
    rate_name: str = REST  # of the figure of its rate: what has the same name has the same rate

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(item.parameter.numel() for item in self.items)

    def described(self, made: Mapping[str, Any]) -> str:
        """Tensors, numbers, rate, decay and further settings; `made` is the group as the optimizer has it."""
        shown = {key: made[key] for key in ("lr", "weight_decay") if key in made} | dict(self.settings)
        texts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
        count = f"{len(self.items)} tensor{'' if len(self.items) == 1 else 's'}"
        return ", ".join([count, f"{self.size:,} parameters", *texts])


class _Part(NamedTuple):
    """A group that has no name yet."""

    items: list[Named]
    settings: dict[str, Any]
    labels: list[str]  # of the rules that fit
    of_rate: list[str]  # of those that give it its rate


@dataclass(frozen=True)
class Layers:
    """The order of a network's layers, for a rate that decays from the last to the first one."""

    blocks: str  # the name of the list of blocks
    kind: str  # the class of a block
    depth: int  # layers: the blocks, one before and one after them
    number: Mapping[str, int]  # of each parameter's layer, from 0

    def scale(self, name: str, decay: float) -> float:
        """What the rate of a parameter is multiplied with."""
        return float(decay ** (self.depth - 1 - self.number[name]))

    def __str__(self) -> str:
        middle = f"{self.depth - 2} blocks of {self.blocks} ({self.kind})"
        return f"0: {self._parts(0)}; then {middle}; {self.depth - 1}: {self._parts(self.depth - 1)}"

    def _parts(self, layer: int) -> str:
        """What lies in a layer: the outermost modules that lie in it whole, and parameters beside them."""
        outer = {name.partition(".")[0] for name, number in self.number.items() if number != layer}
        own = [name for name, number in self.number.items() if number == layer]
        parts = [name.rpartition(".")[0] or name if name.partition(".")[0] in outer else name.partition(".")[0]
                 for name in own]  # fmt: skip
        return first_few([*dict.fromkeys(parts)], 6)


def named_parameters(model: Module, loss: Module | None = None) -> list[Named]:
    """All parameters of the model, then those of the loss, each once, in the order in which they are registered."""
    result: list[Named] = []
    for prefix, module in (("", model), (LOSS, loss)):
        names: dict[int, list[str]] = {}
        parameters: dict[int, Parameter] = {}
        for name, item in module.named_parameters(remove_duplicate=False) if module is not None else ():
            names.setdefault(id(item), []).append(prefix + name)
            parameters[id(item)] = item
        owners = {name: _class_names(part) for name, part in module.named_modules()} if module is not None else {}
        for key, item in parameters.items():
            first, *others = names[key]
            types = frozenset().union(*(owners.get(_owner(name.removeprefix(prefix)), ()) for name in names[key]))
            result.append(Named(first, item, tuple(others), types))
    return result


def _owner(name: str) -> str:
    """The module that owns a parameter; of a parametrized one (weight_norm) the layer itself."""
    layer, is_parametrized, _ = f".{name}".partition(".parametrizations.")
    return layer.removeprefix(".") if is_parametrized else name.rpartition(".")[0]


def _class_names(module: Module) -> frozenset[str]:
    return frozenset(kind.__name__ for kind in type(module).__mro__ if kind not in (Module, object))


def wrong_pattern(items: Iterable[Named], match: Sequence[str], types: Sequence[str]) -> tuple[str, str] | None:
    """The first key, match or types, of which an entry fits no parameter, and what is wrong with it."""
    items = list(items)
    names = [name for item in items for name in (item.name, *item.other_names)]
    for pattern in match:
        if not any(fnmatchcase(name, pattern) for name in names):
            folders = {f"{name.rsplit('.', depth)[0]}.*" for name in names for depth in range(1, name.count(".") + 1)}
            if f"{pattern}.*" in folders:
                return "match", f"'{pattern}' is a module; its parameters are '{pattern}.*'"
            near = did_you_mean(pattern, {*names, *folders})
            return "match", f"'{pattern}' fits no parameter{near or f'; there are {first_few(names, 5)}'}"
    kinds = frozenset().union(*(item.types for item in items))
    for kind in types:
        if kind not in kinds:
            near = did_you_mean(kind, kinds)
            return (
                "types",
                f"no module with parameters is a '{kind}'{near or f'; there are {first_few(sorted(kinds), 9)}'}",
            )
    if match and types and not any(item.fits(match, types) for item in items):
        return "types", f"no parameter that 'match' fits is of a {' or '.join(types)}"
    return None


def divided(
    items: Sequence[Named],
    rules: Sequence[Rule],
    defaults: Mapping[str, Any],
    rate: float | None,
    layers: tuple[Layers, float] | None = None,
) -> list[Group]:
    """Those with the same resulting settings together; first those with the section's own, then as they are registered.

    Args:
        items: What the optimizer trains.
        rules: All that fit apply, later ones win.
        defaults: The section's own settings, which need not be written into a group.
        rate: The section's own learning rate, of which `lr_scale` is a factor.
        layers: The order of the layers and the decay of the rate, which is a factor besides `lr_scale`.
    """
    found: dict[tuple[bool, str], _Part] = {}
    for item in items:
        settings, labels, of_rate = _settings_of(item, rules, rate, layers)
        settings = {key: settings[key] for key in settings if key not in defaults or defaults[key] != settings[key]}
        plain = {key: float(value) if type(value) is int else value for key, value in settings.items()}
        key = item.is_of_loss, repr(sorted(plain.items()))
        found.setdefault(key, _Part([], settings, labels, of_rate)).items.append(item)
    return _with_names([found[key] for key in sorted(found, key=lambda key: bool(found[key].settings))])


def _settings_of(
    item: Named, rules: Sequence[Rule], rate: float | None, layers: tuple[Layers, float] | None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the rules give a parameter, the labels of those that fit, and of those that give it its rate."""
    fitting = [rule for rule in rules if item.fits(rule.match, rule.types)]
    settings: dict[str, Any] = {}
    scale: float | None = None
    for rule in fitting:
        settings |= rule.settings
        if rule.rate is not None:
            settings["lr"], scale = rule.rate, None
        elif rule.rate_scale is not None:
            settings.pop("lr", None)
            scale = rule.rate_scale
    labels = [rule.label for rule in fitting]
    of_rate = [rule.label for rule in fitting if rule.rate is not None or rule.rate_scale is not None]
    if layers and "lr" not in settings and not item.is_of_loss:
        factor = layers[0].scale(item.name, layers[1])
        if factor != 1:
            number = f"layer_{layers[0].number[item.name]:02d}"
            labels, of_rate, scale = [number, *labels], [number, *of_rate], factor * (1 if scale is None else scale)
    if scale is not None and rate is not None:
        settings["lr"] = rate * scale
    return settings, labels, of_rate


def _with_names(parts: list[_Part]) -> list[Group]:
    """Groups, each with a name of its own; one that says where its rate comes from is shared by equal rates."""
    groups: list[Group] = []
    rates: dict[str, Any] = {}
    for items, settings, labels, of_rate in parts:
        of_loss = [LOSS[:-1]] if items[0].is_of_loss and not any(map(LOSS[:-1].__eq__, labels)) else []
        plain = "-".join([*of_loss, *labels]) if settings or of_loss else REST
        name, number = plain or REST, 1
        while name in {group.name for group in groups}:
            number += 1
            name = f"{plain}_{number}"
        rate_name = "-".join(of_rate) if "lr" in settings and of_rate else REST
        if rates.setdefault(rate_name, settings.get("lr")) != settings.get("lr"):
            rate_name = name
        groups.append(Group(name, items, settings, rate_name))
    return groups


def layers_of(model: Module) -> Layers | None:
    """The layers of a network with a list of equal blocks, such as a ViT; None where there is no such list.

    The list is the one with the most parameters among the containers whose children, two or more, are all of one class:
    `blocks` of timm, `transformer.layers` of vit-pytorch, `encoder.layer` of Hugging Face. Block i is layer i + 1. What
    is registered before the blocks is layer 0 (the embedding), what follows them the last layer, whose rate is the
    section's own; so is a norm or a head that is registered earlier (BEiT, arXiv:2106.08254, counts in the same way).
    """
    best: tuple[int, str, list[tuple[str, Module]]] = (0, "", [])
    for name, part in model.named_modules():
        children = [(key, child) for key, child in part.named_children() if any(True for _ in child.parameters())]
        is_container = isinstance(part, torch.nn.ModuleList | torch.nn.Sequential | torch.nn.ModuleDict)
        if is_container and len(children) > 1 and len({type(child) for _, child in children}) == 1:
            size = sum(item.numel() for item in part.parameters())
            if size > best[0]:
                best = size, name, children
    _, blocks, children = best
    if not children:
        return None
    prefix = f"{blocks}." if blocks else ""
    starts = [f"{prefix}{key}." for key, _ in children]
    depth, number, has_begun = len(children) + 2, dict[str, int](), False
    for item in named_parameters(model):
        block = next((index for index, start in enumerate(starts) if item.name.startswith(start)), None)
        has_begun |= block is not None
        is_last = has_begun or (_OUTPUT.search(item.name) is not None and not _INPUT.search(item.name))
        number[item.name] = block + 1 if block is not None else depth - 1 if is_last else 0
    return Layers(blocks or "the model", type(children[0][1]).__name__, depth, number)
