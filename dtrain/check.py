"""Compares every call in a config with the signature of what it names, all at once; imports and calls nothing."""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.annotations import expectation
from dtrain.config import to_plain
from dtrain.locate import locate, user_modules
from dtrain.sections import (
    ANY,
    LEAST,
    PHASES,
    READERS,
    REQUIRED,
    TOP_LEVEL,
    Call,
    call_at,
    calls,
    is_component,
    mistake,
    nested,
    nested_slot,
)
from dtrain.source import SOURCE, Callee, Dynamic, Parameter
from dtrain.yamlfile import ConfigError, KeyPath, Mistake, did_you_mean, dotted, type_name


def check(config: ConfigDict) -> None:
    """Compare the whole config with the signatures of what it names, importing nothing.

    Raises:
        ConfigError: Every mistake, each with its place.
    """
    mistakes = _top_level_mistakes(config)
    for call in _tolerant_calls(config, mistakes).values():
        mistakes += call_mistakes(config, call)
    mistakes += _shared_mistakes(config) + _range_mistakes(config) + _missing_mistakes(config)
    if mistakes:
        raise ConfigError(sorted(mistakes, key=lambda item: (item.place is None, item.place or ())))


def _tolerant_calls(config: ConfigDict, mistakes: list[Mistake]) -> dict[str, Call]:
    """The calls of all sections that have the shape of one; the others' mistakes are added to the list."""
    result: dict[str, Call] = {}
    for section in READERS:
        if isinstance(config.get(section), Mapping | ConfigDict | list | None):
            try:
                result |= calls(config, section)
            except ConfigError as error:
                mistakes += error.mistakes
    return result


def _top_level_mistakes(config: ConfigDict) -> list[Mistake]:
    mistakes = []
    for key in config:
        if key not in TOP_LEVEL:
            text = f"unknown section{did_you_mean(key, TOP_LEVEL)}; possible: {', '.join(TOP_LEVEL)}"
            mistakes.append(mistake(config, (key,), text))
        elif expected := expectation(config[key], ast.parse(TOP_LEVEL[key], mode="eval").body):
            wanted = {"dict": "a mapping", "str": "text"}.get(expected, expected).replace("dict", "a mapping")
            mistakes.append(
                mistake(config, (key,), f"expected {wanted}, found {type_name(config[key])} {config[key]!r}")
            )
    device = config.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        mistakes.append(
            mistake(config, ("device",), f"{device!r} is no device; possible: auto, cpu, cuda, cuda:N, mps")
        )
    for index, module in enumerate(user_modules(config)):
        path: KeyPath = ("modules", index) if isinstance(config.modules, list) else ("modules",)
        if wrong := _module_mistake(module):
            mistakes.append(mistake(config, path, wrong))
    return mistakes


def _module_mistake(module: str) -> str | None:
    if module.partition(".")[0] in sys.stdlib_module_names:
        return f"'{module}' is of the standard library, which a config may not name"
    try:
        if SOURCE.module(module) is None:
            here = [item.stem for item in Path().iterdir() if item.suffix == ".py" or item.is_dir()]
            return f"there is no module '{module}' here or installed{did_you_mean(module, here)}"
    except SyntaxError as error:
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    except (OSError, ValueError) as error:
        return f"'{module}' cannot be read: {error}"
    return None


def call_mistakes(config: ConfigDict, call: Call) -> list[Mistake]:
    """What is wrong with one call and with the components inside it."""
    try:
        target = locate(config, call).target
    except ConfigError as error:
        return error.mistakes + _nested_mistakes(config, call)
    except SyntaxError as error:
        return [mistake(config, call.path_of("name"), f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}")]
    if isinstance(target, Dynamic):
        return _nested_mistakes(config, call)
    if takes_config(target, call):
        return _shadowed(config, call)  # what it reads from the config, only the class knows
    return argument_mistakes(config, call, target) + _nested_mistakes(config, call)


def argument_mistakes(config: ConfigDict, call: Call, callee: Callee) -> list[Mistake]:
    """What is wrong with a call's own arguments: unknown, missing, of the wrong type."""
    given = _given(call, callee)
    taken = {item.name: item for item in callee.parameters if item.keyword and item.name not in given}
    mistakes = []
    for key, value in call.arguments.items():
        if key not in taken and key in call.shared:
            continue
        if key in given:
            text = f"'{key}' is supplied by dtrain; remove it"
        elif key not in taken and not callee.open:
            hint = did_you_mean(key, {*taken, *call.others})
            text = f"{callee.name} takes no '{key}'{hint}; {_shown_signature(callee, given)}"
        elif key in taken and (expected := _unexpected(value, taken[key])):
            text = f"expected {expected}, found {type_name(value)} {_short(value)}; {_shown_signature(callee, given)}"
        else:
            continue
        mistakes.append(mistake(config, call.path_of(key), text))
    present = {*call.arguments, *call.filled}
    missing = [key for key, item in taken.items() if item.default is None and key not in present]
    if missing:
        names = " and ".join(f"'{key}'" for key in missing)
        mistakes.append(mistake(config, call.path, f"{callee.name} needs {names}; {_shown_signature(callee, given)}"))
    return mistakes


def _shown_signature(callee: Callee, given: frozenset[str]) -> str:
    if callee.module.startswith("dtrain.") and "components" not in callee.module:
        return "possible: " + ", ".join(str(item) for item in callee.parameters if item.name not in given)
    return callee.signature


def _unexpected(value: Any, parameter: Parameter) -> str | None:
    if is_component(value) or (isinstance(value, list) and any(map(is_component, value))):
        return None
    if value is None and parameter.default == "None":
        return None
    return expectation(value, parameter.annotation)


def _short(value: Any) -> str:
    text = repr(to_plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _given(call: Call, callee: Callee) -> frozenset[str]:
    """The names of the arguments that dtrain supplies, now or later."""
    positional = [item.name for item in callee.parameters if item.positional]
    return frozenset(positional[: call.slot.given or later(call, callee)]) | call.slot.given_names


def later(call: Call, callee: Callee) -> int:
    """How many leading arguments a function is still to get when it is itself what is wanted; 0: it is to be called."""
    if callee.is_class or call.slot.later is None:
        return 0
    missing = [
        item.default is None and item.positional and item.name not in call.arguments for item in callee.parameters
    ]
    leading = missing.index(False) if False in missing else len(missing)
    return leading if call.slot.later == ANY else min(leading, call.slot.later)


def takes_config(callee: Callee, call: Call) -> bool:
    """Whether the callee wants the whole section as one ConfigDict: its arguments do not fit, and one is called so."""
    required = [item for item in callee.parameters if item.default is None and item.name not in _given(call, callee)]
    if len(required) != 1 or required[0].name in call.arguments or callee.open:
        return False
    annotation = ast.unparse(required[0].annotation) if required[0].annotation else ""
    name = required[0].name.lower()
    return (
        "ConfigDict" in annotation
        or name.endswith(("config", "cfg", "conf"))
        or name in ("opt", "opts", "args", "hparams")
    )


def _shadowed(config: ConfigDict, call: Call) -> list[Mistake]:
    """Keys that a class would not find as attributes of its config, since ConfigDict has methods of that name."""
    text = "is the name of a ConfigDict method, so a class that reads its config by attribute cannot see it; rename it"
    return [mistake(config, call.path_of(key), text) for key in call.arguments if hasattr(ConfigDict, key)]


def _nested_mistakes(config: ConfigDict, call: Call) -> list[Mistake]:
    inner = [call_at(config, path, value, nested_slot(call.slot)) for path, value in nested(call)]
    return [wrong for item in inner for wrong in call_mistakes(config, item)]


def _shared_mistakes(config: ConfigDict) -> list[Mistake]:
    """A key shared by several metrics that none of them takes."""
    try:
        metrics = [call for key, call in calls(config).items() if key.startswith("metrics.") and call.shared]
        targets = [locate(config, call).target for call in metrics]
    except (ConfigError, SyntaxError):
        return []  # reported already
    mistakes = []
    for key in dict.fromkeys(key for call in metrics for key in call.arguments if key in call.shared):
        callees = [item for item in targets if isinstance(item, Callee)]
        if len(callees) < len(targets) or any(item.open or key in names_of(item) for item in callees):
            continue
        known = {name for item in callees for name in names_of(item)} | {call.name for call in metrics}
        text = f"no metric takes '{key}'{did_you_mean(key, known)}; " + "; ".join(item.signature for item in callees)
        mistakes.append(mistake(config, ("metrics", key), text))
    return mistakes


def _range_mistakes(config: ConfigDict) -> list[Mistake]:
    """Numbers that are too small, wherever in their section they stand."""
    mistakes = []
    for section, least in LEAST.items():
        values = config.get(section)
        places = [((section,), values), *(((section, phase), _section(values, phase)) for phase in PHASES)]
        for path, mapping in places:
            for key, smallest in least.items() if isinstance(mapping, Mapping | ConfigDict) else ():
                value = mapping.get(key)
                if type(value) in (int, float) and not value >= smallest:
                    mistakes.append(mistake(config, (*path, key), f"must be at least {smallest}, found {value}"))
    return mistakes


def _section(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping | ConfigDict) else None


def _missing_mistakes(config: ConfigDict) -> list[Mistake]:
    """What a training cannot do without."""
    mistakes = [
        Mistake(f"{name}: missing, such as {name}: {example}")
        for name, example in REQUIRED.items()
        if config.get(name) is None
    ]
    loaders, trainer = config.get("loaders"), config.get("trainer")
    if isinstance(loaders, Mapping | ConfigDict) and loaders.get("train") is None:
        mistakes.append(mistake(config, ("loaders",), "has no 'train', so there is nothing to train on"))
    limits = [_section(trainer, key) for key in ("max_epochs", "max_steps")]
    if trainer is None or (isinstance(trainer, Mapping | ConfigDict) and limits == [None, None]):
        mistakes.append(mistake(config, ("trainer",), "needs max_epochs or max_steps, such as max_epochs: 10"))
    return mistakes


def names_of(callee: Callee) -> set[str]:
    """The names of its keyword arguments."""
    return {item.name for item in callee.parameters if item.keyword}


def notes(config: ConfigDict) -> list[str]:
    """One line for each bare name that is found in more than one place."""
    result = []
    for call in calls(config).values():
        found = locate(config, call)
        if found.also:
            first = f"{found.target.module}.{found.target.name}"
            result.append(
                f"{dotted(call.path_of('name'))}: {call.name} is {first}; also found: {', '.join(found.also)}"
            )
    return result
