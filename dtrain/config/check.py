"""Compares every call in a config with the signature of what it names, all at once; imports and calls nothing."""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import Parameter, cure, expectation, takes_mappings
from dtrain.config.errors import ConfigError, KeyPath, Mistake, did_you_mean, dotted, found, is_mapping, shown
from dtrain.config.load import notes_on
from dtrain.config.resolve import STANDARD, locate
from dtrain.config.schema import (
    PHASES,
    PURPOSES,
    RANGES,
    REQUIRED,
    TOP_LEVEL,
    Call,
    calls,
    is_component,
    mistake,
    nested,
    read_calls,
)
from dtrain.config.signatures import SOURCE, Callee, Dynamic, is_standard

MAX_NAME_BYTES = 200  # a moved-aside run folder has a time stamp, too, and file systems take 255; MLflow 250


def check(config: ConfigDict, purpose: str | None = "train") -> None:
    """Compare the whole config with the signatures of what it names, importing nothing.

    Args:
        config: The whole config.
        purpose: train, test or predict: what must be there. None: whichever the phases under `loaders` are for.

    Raises:
        ConfigError: Every mistake, each with its place.
    """
    mistakes: list[Mistake] = []
    described = read_calls(config, mistakes)
    if not any(item.text.startswith("metrics") for item in mistakes):
        mistakes += _monitor_mistakes(config, described)
    for call in described.values():
        mistakes += call_mistakes(config, call)
    mistakes += _shared_mistakes(config, described) + _top_level_mistakes(config) + module_mistakes(config)
    told = {item.text.partition(":")[0] for item in mistakes}
    mistakes += [item for item in _value_mistakes(config) if item.text.partition(":")[0] not in told]
    mistakes += strategy_mistakes(config, config.get("trainer"))
    mistakes += _name_mistakes(config) + _missing_mistakes(config, purpose or _purpose_of(config))
    if mistakes:
        # A key shared by several calls has one mistake, not one for each signature.
        first = {(item.place, item.text.partition("; ")[0]): item for item in reversed(mistakes)}
        raise ConfigError(sorted(first.values(), key=lambda item: (item.place is None, item.place or (), item.text)))


def _top_level_mistakes(config: ConfigDict) -> list[Mistake]:
    mistakes = []
    for key in config:
        if key not in TOP_LEVEL:
            text = f"unknown section{did_you_mean(key, TOP_LEVEL)}; possible: {', '.join(TOP_LEVEL)}"
            mistakes.append(mistake(config, (key,), text))
        elif TOP_LEVEL[key]:
            annotation = ast.parse(TOP_LEVEL[key], mode="eval").body
            if expected := expectation(config[key], annotation):
                text = f"expected {expected}, {found(config[key])}{cure(config[key], annotation)}"
                mistakes.append(mistake(config, (key,), text))
    device = config.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        text = f"{shown(device)} is no device; possible: auto, cpu, cuda, cuda:N, mps"
        mistakes.append(mistake(config, ("device",), text))
    return mistakes


def module_mistakes(config: ConfigDict) -> list[Mistake]:
    """The entries of `modules` that cannot be read."""
    value = config.get("modules")
    mistakes = []
    for index, module in enumerate(value if isinstance(value, list) else () if value is None else [value]):
        path: KeyPath = ("modules", index) if isinstance(value, list) else ("modules",)
        if wrong := _module_mistake(module):
            mistakes.append(mistake(config, path, wrong))
    return mistakes


def _module_mistake(module: Any) -> str | None:
    if not isinstance(module, str):
        return f"expected the name of a module, {found(module)}"
    if is_standard(module):
        return f"'{module}' is {STANDARD}"
    try:
        parents = [module.rpartition(".")[0]] if "." in module else []
        if all(SOURCE.module(item) for item in (*parents, module)):
            return None
    except SyntaxError as error:
        return _syntax_error(error)
    if "/" in module or module.endswith(".py"):
        name = ".".join(part for part in Path(module).with_suffix("").parts if part not in (".", "/"))
        return f"{shown(module)} is a path; a module is named as in Python, such as {name}"
    here = [item.stem for item in Path().iterdir() if item.suffix == ".py" or item.is_dir()]
    return f"there is no module {shown(module)} here or installed{did_you_mean(module, here)}"


def _syntax_error(error: SyntaxError) -> str:
    return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"


def call_mistakes(config: ConfigDict, call: Call) -> list[Mistake]:
    """What is wrong with one call and with the components inside it."""
    try:
        target = locate(config, call).target
    except SyntaxError as error:
        own = [mistake(config, call.path_of("name"), _syntax_error(error))]
    except ConfigError as error:
        own = error.mistakes
    else:
        if isinstance(target, Dynamic):
            return _nested_mistakes(config, call)
        if takes_config(target, call):
            return _shadowed(config, call.path, call.arguments)  # what it reads from the config, only the class knows
        plain = [item.name for item in target.parameters if takes_mappings(item.annotation)]
        return argument_mistakes(config, call, target) + _nested_mistakes(config, call, plain)
    if "." not in str(call.name) and module_mistakes(config):
        own = []  # what is not found for want of a module is no mistake of its own
    return own + _nested_mistakes(config, call)


def _nested_mistakes(config: ConfigDict, call: Call, plain: Iterable[str] = ()) -> list[Mistake]:
    return [wrong for inner in nested(call, plain) for wrong in call_mistakes(config, inner)]


def argument_mistakes(config: ConfigDict, call: Call, callee: Callee) -> list[Mistake]:
    """What is wrong with a call's own arguments: unknown, missing, of the wrong type."""
    given = _given(call, callee)
    taken = {item.name: item for item in callee.parameters if item.keyword and item.name not in given}
    mistakes = []
    for key, value in call.arguments.items():
        if key in given:
            text = f"'{key}' is supplied by dtrain; remove it"
        elif key in taken and (unexpected := _unexpected(value, taken[key])):
            text = unexpected + ("" if is_house(callee) else f"; {callee.signature}")
        elif key not in taken and key not in call.shared and not callee.open:
            hint = did_you_mean(key, {*taken, *call.others})
            subject = dotted(call.path) if is_house(callee) else callee.name
            text = f"{subject} takes no '{key}'{hint}; {_shown_signature(callee, given)}"
        else:
            continue
        mistakes.append(mistake(config, call.path_of(key), text))
    present = {*call.arguments, *call.filled}
    missing = [f"'{key}'" for key, item in taken.items() if item.default is None and key not in present]
    if missing:
        text = f"{callee.name} needs {' and '.join(missing)}; {_shown_signature(callee, given)}"
        mistakes.append(mistake(config, call.path, text))
    return mistakes


def is_house(callee: Callee) -> bool:
    """Whether it holds dtrain's own settings, and is no component."""
    return callee.module.startswith("dtrain.") and not callee.module.startswith("dtrain.components.")


def _shown_signature(callee: Callee, given: frozenset[str]) -> str:
    if is_house(callee):
        return f"possible: {', '.join(item.name for item in callee.parameters if item.name not in given)}"
    return callee.signature


def _unexpected(value: Any, parameter: Parameter) -> str:
    """What is wrong with a value's type; components, once built, may be anything."""
    if is_component(value) or (isinstance(value, list) and any(map(is_component, value))):
        return ""
    if value is None and parameter.default == "None":
        return ""
    expected = expectation(value, parameter.annotation)
    return f"expected {expected}, {found(value)}{cure(value, parameter.annotation)}" if expected else ""


def _given(call: Call, callee: Callee) -> frozenset[str]:
    """The names of the arguments that dtrain supplies, now or later."""
    first = [item.name for item in callee.parameters if item.positional]
    by_name = supplied(call, callee)
    own = {by_name} if by_name else {*first[:1]} if by_name == "" else set()
    return frozenset({*own, *first[: later(call, callee)]}) | call.slot.given_names


def supplied(call: Call, callee: Callee) -> str | None:
    """The name of the argument under which dtrain supplies an object; '': the first one; None: it does not.

    An optimizer is given the parameters, a scheduler the optimizer, and so are the optimizers or schedulers inside it.
    """
    name = call.slot.given
    if not name:
        return None
    if any(item.name == name and item.keyword for item in callee.parameters):
        return name
    first = next((item.name for item in callee.parameters if item.positional), None)
    return None if call.slot.nested or first in call.arguments else ""


def later(call: Call, callee: Callee) -> int:
    """How many leading arguments a function is still to get when it is itself what is wanted; 0: it is to be called.

    In a section of losses or metrics, that is a function whose first two arguments the config leaves open; inside a
    section, any function that lacks one. A factory is called: its first argument has a default, is in the config, or
    is a plain number or text.
    """
    if callee.is_class or not (call.slot.pairs or call.slot.nested):
        return 0
    positional = [item for item in callee.parameters if item.positional]
    if not positional:
        return int(callee.variadic) * (2 if call.slot.pairs else 1)
    if call.slot.nested:
        lacking = takewhile(lambda item: item.default is None and item.name not in call.arguments, positional)
        return len(list(lacking))
    first = positional[0]
    plain = first.annotation is not None and ast.unparse(first.annotation) in ("int", "float", "str", "bool")
    open_ = [item for item in positional[:2] if item.name not in call.arguments]
    enough = len(open_) == 2 or (len(open_) == len(positional) == 1 and callee.variadic)
    return len(open_) if enough and first.default is None and not plain else 0


def takes_config(callee: Callee, call: Call) -> bool:
    """Whether the callee wants the whole section as one ConfigDict: its arguments do not fit, and one is called so."""
    given = _given(call, callee)
    rest = [item for item in callee.parameters if item.name not in given]
    if not rest or not rest[0].positional or rest[0].name in call.arguments:
        return False
    needed = {item.name for item in rest if item.default is None} - call.filled
    fits = needed <= set(call.arguments) and (callee.open or set(call.arguments) <= names_of(callee) | call.shared)
    annotation = ast.unparse(rest[0].annotation) if rest[0].annotation else ""
    name = rest[0].name.lower()
    meant = name.endswith(("config", "cfg", "conf")) or name in ("opt", "opts", "args", "hparams")
    return not fits and needed <= {rest[0].name} and (meant or "ConfigDict" in annotation)


def _shadowed(config: ConfigDict, path: KeyPath, values: Mapping[str, Any]) -> list[Mistake]:
    """Keys that a class would not find as attributes of its config, since ConfigDict has something of that name."""
    text = "is the name of a ConfigDict method, so a class that reads its config by attribute cannot see it; rename it"
    own = ConfigDict()
    mistakes = [mistake(config, (*path, key), text) for key in values if hasattr(own, key)]
    inner = [(key, values[key]) for key in values if is_mapping(values[key])]
    return mistakes + [wrong for key, value in inner for wrong in _shadowed(config, (*path, key), value)]


def _shared_mistakes(config: ConfigDict, described: Mapping[str, Call]) -> list[Mistake]:
    """A key shared by several metrics that none of them takes."""
    metrics = [call for key, call in described.items() if key.startswith("metrics.") and call.shared]
    try:
        targets = [locate(config, call).target for call in metrics]
    except (ConfigError, SyntaxError):
        return []  # reported already
    mistakes = []
    for key in dict.fromkeys(key for call in metrics for key in call.arguments if key in call.shared):
        callees = [item for item in targets if isinstance(item, Callee)]
        if len(callees) < len(targets) or any(item.open or key in names_of(item) for item in callees):
            continue
        known = {name for item in callees for name in names_of(item)} | {str(call.name) for call in metrics}
        text = f"no metric takes '{key}'{did_you_mean(key, known)}; " + "; ".join(item.signature for item in callees)
        mistakes.append(mistake(config, ("metrics", key), text))
    return mistakes


def _monitor_mistakes(config: ConfigDict, described: Mapping[str, Call]) -> list[Mistake]:
    """A `trainer.monitor` that is no figure of the validation, where that can be known without building a metric."""
    monitor = _at(config.get("trainer"), "monitor")
    if not isinstance(monitor, str):
        return []
    labels = [key.removeprefix("metrics.") for key in described if key.startswith("metrics.")]
    known = [f"val/{label}" for label in (*labels, "loss")]
    wish = monitor if monitor.startswith("val/") else f"val/{monitor}"
    if any(wish == name or wish.startswith(f"{name}_") for name in known):  # an element of a vector, a term of a loss
        return []
    text = f"{shown(monitor)} is no figure of the validation{did_you_mean(wish, known)}; possible: {', '.join(known)}"
    return [mistake(config, ("trainer", "monitor"), text)]


def _value_mistakes(config: ConfigDict) -> list[Mistake]:
    """Values of the right type that cannot be: numbers out of range, two batch sizes, MLflow's old `file:` stores."""
    mistakes = []
    for section, ranges in RANGES.items():
        path: KeyPath = (section,) if section else ()
        values = config.get(section) if section else config
        for here, mapping in [(path, values), *(((*path, phase), _at(values, phase)) for phase in PHASES)]:
            for key, (least, most) in ranges.items():
                value = _at(mapping, key)
                if type(value) in (int, float) and not least <= value <= most:
                    possible = f"from {least} to {most}" if most < math.inf else f"at least {least}"
                    mistakes.append(mistake(config, (*here, key), f"must be {possible}, found {value}"))
            if _at(mapping, "batch_size") is not None and _at(mapping, "global_batch_size") is not None:
                text = "excludes 'batch_size'; keep one of them, or set the other to null"
                mistakes.append(mistake(config, (*here, "global_batch_size"), text))
    uri = _at(config.get("mlflow"), "tracking_uri")
    if isinstance(uri, str) and uri.lower().startswith("file:"):
        text = f"MLflow 3 no longer writes to {shown(uri)}; name the folder alone (sqlite is put in it), or a server"
        mistakes.append(mistake(config, ("mlflow", "tracking_uri"), text))
    return mistakes


def strategy_mistakes(config: ConfigDict, options: Any) -> list[Mistake]:
    """What cannot be had together with `trainer.strategy`.

    Args:
        config: The whole config.
        options: What it has under `trainer`, and what came from elsewhere.
    """
    if _at(options, "strategy") != "fsdp":
        text = "says what is gathered at a time under `trainer.strategy: fsdp`, which is not asked for"
        own = _at(options, "fsdp") if is_mapping(_at(options, "fsdp")) else {}
        given = _at(options, "strategy") == "ddp" and any(value is not None for value in own.values())
        return [mistake(config, ("trainer", "fsdp"), text)] if given else []
    unfit = {
        "compile": "is not possible with the model shared out (strategy: fsdp)",
        "sync_batchnorm": "has not been tried with the model shared out (strategy: fsdp)",
    }
    found = [mistake(config, ("trainer", key), text) for key, text in unfit.items() if _at(options, key)]
    if _at(options, "precision") == "fp16":
        text = "fp16 needs its gradients scaled, which is not possible with strategy: fsdp; possible: bf16, fp32"
        found.append(mistake(config, ("trainer", "precision"), text))
    text = "is DistributedDataParallel's; with strategy: fsdp possible: backend, timeout_seconds, broadcast_buffers"
    own = {"backend", "timeout_seconds", "broadcast_buffers"}
    ddp = _at(options, "ddp") if is_mapping(_at(options, "ddp")) else {}
    given = [key for key, value in ddp.items() if value is not None and key not in own]
    return found + [mistake(config, ("trainer", "ddp", key), text) for key in given]


def _name_mistakes(config: ConfigDict) -> list[Mistake]:
    """Names that MLflow, a log line or a file system could not hold, and an experiment whose folder would leave runs/.

    With a `checkpoint_dir` of its own an experiment is no folder, but the next config of the same name may lack it.
    """
    places: list[KeyPath] = [("experiment",), ("run_name",), ("trainer", "checkpoint_dir")]
    mistakes = []
    for path in places:
        name = _at(config.get("trainer"), str(path[-1])) if len(path) > 1 else config.get(path[0])
        if not isinstance(name, str):
            continue
        size = len(name.encode("utf-8", "replace"))
        text = ""
        if not name.isprintable():
            text = f"must be one line of printable characters, found {shown(name)}"
        elif len(path) == 1 and size > MAX_NAME_BYTES:
            text = f"must have at most {MAX_NAME_BYTES} bytes, found {size}: {shown(name)}"
        elif len(path) > 1 and any(len(part.encode()) > MAX_NAME_BYTES for part in Path(name).parts):
            text = f"must have at most {MAX_NAME_BYTES} bytes in each folder's name, found {shown(name)}"
        elif path[0] == "experiment" and ".." in Path(name).parts:
            text = f"must have no '..', it names the run folder where there is no trainer.checkpoint_dir; {found(name)}"
        if text:
            mistakes.append(mistake(config, path, text))
    return mistakes


def _at(values: Any, key: str) -> Any:
    return values.get(key) if is_mapping(values) else None


def _purpose_of(config: ConfigDict) -> str:
    """What a config can be for: the first of train, predict and test whose data it has, else train."""
    return next((phase for phase in ("train", "predict", "test") if _at(config.get("loaders"), phase)), "train")


def _missing_mistakes(config: ConfigDict, purpose: str) -> list[Mistake]:
    """What a training, a test or a prediction cannot do without."""
    sections, phases = PURPOSES[purpose]
    missing = [name for name in sections if config.get(name) is None]
    if purpose == "test" and config.get("loss") is None and config.get("metrics") is None:
        missing.append("loss")
    mistakes = [mistake(config, (name,), f"missing, such as {name}: {REQUIRED[name]}") for name in missing]
    loaders, trainer = config.get("loaders"), config.get("trainer")
    if is_mapping(loaders) and all(loaders.get(phase) is None for phase in phases):
        text = f"has no {' and no '.join(map(repr, phases))}, so there is nothing to {purpose}"
        mistakes.append(mistake(config, ("loaders",), text + ("" if purpose == "predict" else " on")))
    if purpose != "train":
        return mistakes
    limits = [_at(trainer, key) for key in ("max_epochs", "max_steps")]
    if (trainer is None or is_mapping(trainer)) and limits == [None, None]:
        mistakes.append(mistake(config, ("trainer",), "needs max_epochs or max_steps, such as max_epochs: 10"))
    return mistakes


def names_of(callee: Callee) -> set[str]:
    """The names of its keyword arguments."""
    return {item.name for item in callee.parameters if item.keyword}


def notes(config: ConfigDict) -> list[str]:
    """What is worth a line: how another program's keys were read; each bare name that is found in several places."""
    result = notes_on(config)
    for call in calls(config).values():
        target, also = locate(config, call)
        if also:
            name = dotted(call.path_of("name"))
            result.append(f"{name}: {call.name} is {target.module}.{target.name}; also found: {', '.join(also)}")
    return result
