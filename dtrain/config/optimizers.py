"""Which parameters are trained, and how: `optimizer`, one or several, the groups in each, and `trainer.freeze`."""

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.difference import defaults_of
from dtrain.config.errors import ConfigError, KeyPath, Mistake, dotted, found, is_mapping, to_plain
from dtrain.config.schema import Call, mistake
from dtrain.config.signatures import Callee

_NEEDS = "needs 'match' (patterns of parameters' names) or 'types' (class names of modules)"
ONE = "optimizer"  # the name of an optimizer that is the only one
Calls = Mapping[str, Call]


class Rule(NamedTuple):
    """One entry of `groups`: the parameters that it is about, and what they have."""

    path: KeyPath
    match: tuple[str, ...]  # patterns of full names; () for all
    types: tuple[str, ...]  # class names of the modules that own them; () for all
    label: str  # what its figures are called
    rate: float | None  # of their own
    rate_scale: float | None  # times the section's
    settings: Mapping[str, Any]  # further arguments of the optimizer, by name


class Frozen(NamedTuple):
    """One entry of `trainer.freeze`."""

    path: KeyPath
    match: tuple[str, ...]  # patterns of the names of parameters; () for all
    types: tuple[str, ...]  # class names of the modules that own them; () for all
    until_epoch: int | None  # the number of epochs; None: always


def frozen_entries(config: ConfigDict) -> list[Frozen]:
    """What `trainer.freeze` says: patterns and mappings, one or a list; without what is of another type."""
    trainer = to_plain(config.get("trainer"))
    wish = trainer.get("freeze") if isinstance(trainer, dict) else None
    entries: list[tuple[KeyPath, Any]] = [(("trainer", "freeze"), wish)]
    if isinstance(wish, list):
        entries = [(("trainer", "freeze", index), item) for index, item in enumerate(wish)]
    result = []
    for path, item in entries:
        if isinstance(item, str):
            result.append(Frozen(path, (item,), (), None))
        elif isinstance(item, dict):
            chosen = _texts(item.get("match")), _texts(item.get("types"))
            result.append(Frozen(path, *chosen, item.get("until_epoch")))
    return result


def freeze_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Values under `trainer.freeze` of the right type that cannot be."""
    for entry in frozen_entries(config):
        if isinstance(entry.until_epoch, int) and entry.until_epoch < 0:
            yield mistake(config, (*entry.path, "until_epoch"), f"must be at least 0, found {entry.until_epoch}")
        wish = functools.reduce(lambda value, key: value[key], entry.path, config)
        if is_mapping(wish) and not wish.get("match") and not wish.get("types"):
            yield mistake(config, entry.path, _NEEDS)


def optimizer_keys(calls: Calls) -> dict[str, str]:
    """The keys of the optimizers among the calls, by the optimizers' names; a single one is called `optimizer`."""
    if ONE in calls:
        return {ONE: ONE}
    return {key.removeprefix(f"{ONE}."): key for key in calls if key.startswith(f"{ONE}.")}


def rules(calls: Calls, key: str) -> list[Rule]:
    """The groups of one optimizer, as written."""
    result = []
    for path, values in _written(calls, key):
        match, types = _texts(values.get("match")), _texts(values.get("types"))
        rest = {name: values[name] for name in values if name not in ("match", "types", "label", "lr", "lr_scale")}
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in rest.items()}
        label = values.get("label") or label_of((*match, *types))
        result.append(Rule(path, match, types, label, values.get("lr"), values.get("lr_scale"), settings))
    return result


def label_of(patterns: tuple[str, ...]) -> str:
    """What a figure may be called after patterns: `backbone.*` -> 'backbone', `*.bias` -> 'bias'."""
    words = (re.sub(r"[^\w.-]+", "", re.sub(r"[*?]", "", pattern)).strip(".") or "all" for pattern in patterns)
    return "_".join(words)


def own_rate(call: Call) -> float | None:
    """The rate of an optimizer's section, else its default as far as the source says it."""
    values = {**defaults_of(call), **call.arguments}
    rate = values.get("lr", values.get("learning_rate"))
    return float(rate) if isinstance(rate, int | float) and not isinstance(rate, bool) else None


def what_is_taken(call: Call) -> str:
    """`params`, `named_parameters` or `model`: what an optimizer asks for by the name of its first argument."""
    with suppress(ConfigError):  # reported elsewhere
        parameters = call.target.parameters if isinstance(call.target, Callee) else ()
        if parameters and parameters[0].name in call.slot.given_instead:
            return parameters[0].name
    return call.slot.given


def group_calls(calls: Calls) -> Iterator[Call]:
    """For each group the call of its optimizer with the group's own arguments, to be checked like the section's."""
    for key in optimizer_keys(calls).values():
        call = calls[key]
        for path, values in _written(calls, key):
            own = {name: value for name, value in values.items() if name not in ("match", "types", "label", "lr_scale")}
            paths = {name: (*path, name) for name in own}
            if "lr" in own and "lr" not in call.annotations and "learning_rate" in call.annotations:
                own["learning_rate"], paths["learning_rate"] = own.pop("lr"), paths.pop("lr")
            others = call.others | {"match", "types", "label", "lr_scale"}
            yield replace(call, arguments={**call.arguments, **own}, paths={**call.paths, **paths}, others=others)


def group_mistakes(calls: Calls) -> Iterator[Mistake]:
    """What is wrong with the groups beside their arguments, and with several optimizers."""
    keys = optimizer_keys(calls)
    for key in keys.values():
        call, own = calls[key], calls[f"groups.{key}"].arguments
        asked = [name for name in ("groups", "layer_decay") if own.get(name) is not None]
        if asked and (taken := what_is_taken(call)) != call.slot.given:
            text = f"{call.name} takes '{taken}' and makes its groups itself; remove '{asked[0]}'"
            yield mistake(call.config, (*call.path, asked[0]), text)
        elif "layer_decay" in asked and own_rate(call) is None:
            yield mistake(call.config, (*call.path, "layer_decay"), f"is about 'lr', which {dotted(call.path)} lacks")
        for path, values in _written(calls, key):
            for where, text in _of_group(call, values):
                yield mistake(call.config, (*path, *where), text)
    selecting = [{"match", "types"} & {*calls[f"groups.{key}"].arguments} for key in keys.values()]
    if selecting.count(set()) > 1:
        text = "only one of several optimizers may be without 'match' or 'types': it takes what the others leave"
        yield mistake(calls[next(iter(keys.values()))].config, (ONE,), text)


def _of_group(call: Call, values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with one group's own keys."""
    if "match" not in values and "types" not in values:
        yield (), _NEEDS
    for key in ("match", "types"):
        value = values.get(key, "*")
        if not isinstance(value, str) and not (isinstance(value, list) and value and _all_texts(value)):
            yield (key,), f"expected a string or a list of strings, {found(value)}"
    scale, label = values.get("lr_scale"), values.get("label", "a")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0):
        yield ("lr_scale",), f"expected a number of at least 0, {found(scale)}"
    elif scale is not None and "lr" in values:
        yield ("lr_scale",), "cannot be combined with 'lr'; keep one of them"
    elif scale is not None and own_rate(call) is None:
        yield ("lr_scale",), f"is a factor of 'lr', which {dotted(call.path)} lacks"
    if not isinstance(label, str) or not re.fullmatch(r"[\w. -]+", label):
        yield (
            ("label",),
            f"expected letters, digits, '_', '-', '.' or spaces, as a figure is called by it, {found(label)}",
        )
    if not values.keys() - {"match", "types", "label"}:
        yield (), f"sets nothing; add lr, lr_scale or another argument of {call.name}"


def group_lines(config: ConfigDict, calls: Calls) -> Iterator[tuple[str, str]]:
    """For each group, and what is frozen, its key and what it says, as far as the config alone can tell."""
    for key in optimizer_keys(calls).values():
        call, own = calls[key], calls[f"groups.{key}"].arguments
        of = dotted(call.path)
        if chosen := [*_texts(own.get("match")), *_texts(own.get("types"))]:
            yield of, f"trains {', '.join(chosen)}"
        if own.get("layer_decay") is not None:
            yield f"{of}.layer_decay", f"each layer's lr is {own['layer_decay']:g} times that of the next one"
        for rule in rules(calls, key):
            rate = rule.rate if rule.rate_scale is None else (own_rate(call) or 0.0) * rule.rate_scale
            settings = ({} if rate is None else {"lr": f"{rate:.4g}"}) | dict(rule.settings)
            yield dotted(rule.path), f"{_of_whom(rule)}: " + shown_settings(settings)
    for entry in frozen_entries(config):
        when = "" if entry.until_epoch is None else f", until epoch {entry.until_epoch}"
        yield dotted(entry.path), f"frozen: {_of_whom(entry)}{when}"


def _of_whom(entry: Rule | Frozen) -> str:
    """`*.bias of LayerNorm`."""
    return ", ".join(entry.match or ("*",)) + (f" of {', '.join(entry.types)}" if entry.types else "")


def shown_settings(settings: Mapping[str, Any]) -> str:
    """`lr 0.0001, weight_decay 0`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _written(calls: Calls, key: str) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """The mappings under `groups` of one optimizer, each with its path."""
    call = calls.get(f"groups.{key}")
    listed = call.arguments.get("groups") if call else None
    for index, values in enumerate(listed if isinstance(listed, list) else ()):
        if is_mapping(values):
            yield (*calls[key].path, "groups", index), to_plain(values)


def _texts(value: Any) -> tuple[str, ...]:
    """A text or a list of them; what is neither is reported elsewhere."""
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(item for item in listed if isinstance(item, str))


def _all_texts(values: list[Any]) -> bool:
    return all(isinstance(item, str) for item in values)
