"""Compares every call in a config with the signature of what it names, all at once; imports and calls nothing."""

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import Parameter, takes_mapping, takes_mappings, takes_objects, wrong_type
from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, KeyPath, Mistake, dotted, found, is_mapping
from dtrain.config.ignored import ignored_differently
from dtrain.config.load import notes_on
from dtrain.config.metric_rules import mode_notes, monitor_mistakes, task_mistakes, task_notes
from dtrain.config.optimizers import freeze_mistakes, group_calls, group_mistakes
from dtrain.config.pytorch3dunet import OTHER_NAMES
from dtrain.config.resolve import module_mistake
from dtrain.config.rules import rule_mistakes, value_mistakes
from dtrain.config.schema import NOT_REBUILT, Call, calls, is_component, listed_modules, mistake, read, set_names
from dtrain.config.signatures import Callee, module_file
from dtrain.config.versions import changes_since, newer_version
from dtrain.config.yaml12 import HAS_DOT


def check(config: ConfigDict, purpose: str | None = "train") -> None:
    """Compare the whole config with the signatures of what it names, importing nothing.

    What its names lead to stays on the config, so that whatever is built from it afterwards need not look again.
    `purpose` is train, test or predict: what must be there; None: whichever the phases under `loaders` are for.
    A ConfigError has every mistake, each with its place.
    """
    if newer := newer_version(config):  # of whose keys nothing can be said
        raise ConfigError(newer)
    reading = read(config)
    mistakes = [*reading.mistakes]
    if not any(item.text.startswith("metrics") for item in mistakes):
        trains = purpose in ("train", None) and bool(set_names(reading.calls, "val"))
        mistakes += monitor_mistakes(config, reading.calls, trains)
        mistakes += task_mistakes(config, reading.calls)
    for call in (*reading.calls.values(), *group_calls(reading.calls)):
        mistakes += call_mistakes(call)
    mistakes += [*group_mistakes(reading.calls), *freeze_mistakes(config)]
    mistakes += [*_shared_mistakes(config, reading.calls), *_module_mistakes(config), *rule_mistakes(config, purpose)]
    wrong_keys = {item.text.partition(":")[0] for item in mistakes}
    mistakes += [item for item in value_mistakes(config) if item.text.partition(":")[0] not in wrong_keys]
    if mistakes:
        # A key shared by several calls has one mistake, not one for each signature.
        first = {(item.place, item.text.partition("; ")[0]): item for item in reversed(mistakes)}
        raise ConfigError(sorted(first.values(), key=lambda item: (item.place is None, item.place or (), item.text)))


def notes(config: ConfigDict) -> list[str]:
    """What is worth a line: another program's keys, void labels that a loss counts, names found in several places."""
    described = calls(config)
    result = [
        *notes_on(config),
        *changes_since(config),
        *task_notes(described),
        *mode_notes(config, described),
        *ignored_differently(described),
    ]
    for call in calls(config).values():
        target, also = call.found
        if also:
            name = dotted(call.path_of("name"))
            result.append(f"{name}: {call.name} is {target.module}.{target.name}; also found: {', '.join(also)}")
    return result


def _module_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """The entries of `modules` that cannot be read; those of `optional_modules` may be missing."""
    for path, module in listed_modules(config, "modules"):
        if wrong := module_mistake(module):
            yield mistake(config, path, wrong)
    for path, module in listed_modules(config, "optional_modules"):
        is_missing = isinstance(module, str) and module_file(module) is None
        if not is_missing and (wrong := module_mistake(module)):
            yield mistake(config, path, wrong)


def call_mistakes(call: Call) -> list[Mistake]:
    """What is wrong with one call and with the components inside it."""
    if call.stands_for_object:
        text = f"{call.name} is an object that was given to create_trainer in Python"
        return [mistake(call.config, call.path, text), Mistake(NOT_REBUILT)] if call.object is None else []
    own: list[Mistake] = []
    unbuilt: list[KeyPath] = []  # arguments that are passed on as they are
    try:
        target = call.target
    except ConfigError as error:
        if "." in str(call.name) or not any(_module_mistakes(call.config)):  # else the missing module is the mistake
            own += error.mistakes
    else:
        if isinstance(target, Callee):
            if takes_config(call, target):  # what it reads from the config, only the class knows
                return list(_shadowed(call.config, call.path, call.arguments))
            own += argument_mistakes(call, target)
            unbuilt = [call.path_of(item.name) for item in target.parameters if takes_mappings(item.annotation)]
    for path, component in call.components.items():
        if not any(path[: len(argument)] == argument for argument in unbuilt):
            own += call_mistakes(component)
    return own


def argument_mistakes(call: Call, callee: Callee) -> Iterator[Mistake]:
    """What is wrong with a call's own arguments: unexpected, missing, of the wrong type."""
    given, written = given_names(call, callee), {*call.arguments, "name"}
    taken = {item.name: item for item in callee.parameters if item.keyword and item.name not in given}
    for key, value in call.arguments.items():
        if key in given:
            text = f"'{key}' is supplied by dtrain; remove it"
        elif "." in key:
            text = f"the key '{key}' {HAS_DOT}"
        elif key in taken and (wrong := _wrong_argument(value, taken[key])):
            text = wrong if is_own(callee) else f"{wrong}; {callee.signature}"
        elif key == "_partial_" and call.is_partial:
            text = f"expected true or false, {found(value)}"
        elif key not in taken and key not in call.shared and not callee.open:
            hint = did_you_mean(key, {*taken, *call.others})
            if OTHER_NAMES.get(key) in written:
                hint = f"; '{key}' and '{OTHER_NAMES[key]}' are two names for one setting, keep one of them"
            subject = dotted(call.path) if is_own(callee) else callee.name
            text = f"{subject} got an unexpected argument '{key}'{hint}; {_possible(callee, given)}"
        else:
            continue
        yield mistake(call.config, call.path_of(key), text)
    present = {*call.arguments, *call.filled, "name"}  # a class that requires a name is given the one written
    missing = [f"'{key}'" for key, item in taken.items() if item.default is None and key not in present]
    if missing and not call.is_partial:
        required = f"required argument{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
        yield mistake(call.config, call.path, f"{callee.name} is missing {required}; {_possible(callee, given)}")


def _possible(callee: Callee, given: frozenset[str]) -> str:
    if is_own(callee):
        return f"possible: {', '.join(item.name for item in callee.parameters if item.name not in given)}"
    return callee.signature


def is_own(callee: Callee) -> bool:
    """Whether its arguments are dtrain's own settings, and it is not a component."""
    return callee.module.startswith("dtrain.") and not callee.module.startswith("dtrain.components.")


def _wrong_argument(value: Any, parameter: Parameter) -> str:
    """What is wrong with a value's type; components, once built, may be anything."""
    is_built = is_component(value) and not takes_mapping(parameter.annotation)
    if is_built or (isinstance(value, list) and any(map(is_component, value))):
        return ""
    if takes_objects(parameter.annotation) and (isinstance(value, str) or _are_texts(value)):
        return ""  # names, which `Call.components` follows
    return "" if value is None and parameter.default == "None" else wrong_type(value, parameter.annotation)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _shadowed(config: ConfigDict, path: KeyPath, values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Keys that a class would not find as attributes of its config, since ConfigDict has something of that name."""
    text = "is the name of a ConfigDict method, so a class that reads its config by attribute cannot see it; rename it"
    empty = ConfigDict()
    for key in values:
        if hasattr(empty, key):
            yield mistake(config, (*path, key), text)
        if is_mapping(values[key]):
            yield from _shadowed(config, (*path, key), values[key])


def _shared_mistakes(config: ConfigDict, described: Mapping[str, Call]) -> Iterator[Mistake]:
    """A key shared by several metrics that none of them takes."""
    metrics = [call for key, call in described.items() if key.startswith("metrics.") and call.shared]
    try:
        targets = [call.target for call in metrics]
    except ConfigError:
        return  # reported already
    callees = [item for item in targets if isinstance(item, Callee)]
    if len(callees) < len(targets) or any(item.open for item in callees):
        return
    taken = {name for item in callees for name in item.keywords}
    signatures = "; ".join(item.signature for item in callees)
    for key in dict.fromkeys(key for call in metrics for key in call.arguments if key in call.shared):
        if key not in taken:
            hint = did_you_mean(key, taken | {str(call.name) for call in metrics})
            text = f"unexpected argument '{key}', which no metric takes{hint}; {signatures}"
            yield mistake(config, ("metrics", key), text)


def supplied(call: Call, callee: Callee) -> Parameter | None:
    """The parameter by which dtrain supplies an object; by position where its `keyword` is false.

    An optimizer is given the parameters, a scheduler the optimizer, and so are the optimizers or schedulers inside it;
    a sampler the dataset, where it takes one. Where the first argument has another name that the slot knows, that is
    what is supplied (`named_parameters`).
    """
    name = call.slot.given
    if not name:
        return None
    if call.slot.named:
        return next((item for item in callee.parameters if _is_dataset(item) and item.name not in call.arguments), None)
    if callee.parameters and callee.parameters[0].name in call.slot.given_instead:
        name = callee.parameters[0].name
    for item in callee.parameters:
        if item.name == name and item.keyword:
            return item
    first = next((item.name for item in callee.positional), "")
    return None if call.slot.nested or first in call.arguments else Parameter(first, keyword=False)


def _is_dataset(parameter: Parameter) -> bool:
    """Whether a sampler's argument is the dataset: by the names that torch's samplers have, or by its type."""
    words = set(re.findall(r"\w+", ast.unparse(parameter.annotation))) if parameter.annotation is not None else set()
    return parameter.name in ("dataset", "data_source") or bool(words & {"Dataset", "Sized"})


def given_names(call: Call, callee: Callee) -> frozenset[str]:
    """The names of the arguments that dtrain supplies, now or when a function is used."""
    later = _left_open(call, callee) if is_passed_on(call, callee) else []
    now = supplied(call, callee)
    return call.slot.given_names.union(later, [now.name] if now else [])


def _left_open(call: Call, callee: Callee) -> list[str]:
    """The first arguments of a function, as far as the config leaves them out."""
    first = callee.positional[:2]
    if call.slot.nested:
        first = [*takewhile(lambda item: item.default is None and item.name not in call.arguments, callee.positional)]
    return [item.name for item in first if item.name not in call.arguments]


def is_passed_on(call: Call, callee: Callee) -> bool:
    """Whether a function is itself what is wanted.

    In a section of losses or metrics, that is a function whose first two arguments the config leaves open; inside a
    section, any function that lacks one. A factory is called: its first argument has a default, is in the config, or
    is a plain number or text.
    """
    if call.is_partial:
        return True
    if callee.is_class or not (call.slot.pairs or call.slot.nested):
        return False
    positional = callee.positional
    if not positional:
        return callee.variadic
    open_count = len(_left_open(call, callee))
    if call.slot.nested:
        return open_count > 0
    first = positional[0]
    is_plain = first.annotation is not None and ast.unparse(first.annotation) in ("int", "float", "str", "bool")
    takes_pair = open_count == 2 or (open_count == len(positional) == 1 and callee.variadic)
    return takes_pair and first.default is None and not is_plain


def takes_config(call: Call, callee: Callee) -> bool:
    """Whether the callee wants the whole section as one ConfigDict: its arguments do not fit, and one is called so."""
    given = given_names(call, callee)
    rest = [item for item in callee.parameters if item.name not in given]
    if not rest or not rest[0].positional or rest[0].name in call.arguments:
        return False
    needed = {item.name for item in rest if item.default is None} - call.filled
    fits = needed <= set(call.arguments) and (callee.open or set(call.arguments) <= callee.keywords | call.shared)
    if fits or not needed <= {rest[0].name}:
        return False
    if re.fullmatch(r".*(config|cfg|conf)|opts?|args|hparams", rest[0].name.lower()):
        return True
    return rest[0].annotation is not None and "ConfigDict" in ast.unparse(rest[0].annotation)
