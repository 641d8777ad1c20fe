"""Objects given in Python in place of a config's sections: what of them is recorded, so that a resume can compare it.

In the config such a section is its object's name and a record under `_object_`. The objects themselves lie beside the
config's fields, as do the places of its keys, and never leave this process.
"""

import dis
import functools
import hashlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, KeyPath, Mistake, dotted, is_mapping, to_plain
from dtrain.config.load import to_config_dict
from dtrain.config.schema import OBJECT, PHASES, keys_of

MAX_REPR = 2000  # characters; MLflow's params take 6000
_INSTALLED = {"site-packages", "dist-packages"}
_PLAIN = (bool, int, float, str, type(None))


def with_objects(config: ConfigDict, objects: Mapping[str, Any]) -> ConfigDict:
    """The config with objects in place of sections, by the names of `create_trainer`'s arguments; None: not given.

    An object takes the place of its section, a dataset that of its phase's dataset; a loader's own keys, such as
    batch_size, stay. What stood there is told in a note.

    Raises:
        ConfigError: With everything that is not what its argument takes.
    """
    objects = {key: value for key, value in objects.items() if value is not None}
    if not objects:
        return config
    if mistakes := [*_mistakes(objects), *_unread(config.get("loaders"), objects.get("datasets", {}))]:
        raise ConfigError(mistakes)
    values, notes = to_plain(config), list(getattr(config, "_notes", ()))
    values["loaders"] = dict(values.get("loaders") or {})
    if "metrics" in objects:
        _note(notes, "metrics", values.pop("metrics", None))
    given = {path: (text, value) for path, text, value in _by_path(objects)}
    for path, (text, value) in given.items():
        _put(values, path, {"name": _name_of(value), OBJECT: _record(value, text)}, notes)
    found = {path: value for path, (_, value) in given.items()}
    result = to_config_dict(values, locked=True)
    kept = {name: getattr(config, name, {}) for name in ("_places", "_texts")}
    for name, value in {**kept, "_notes": notes, "_objects": found}.items():
        object.__setattr__(result, name, value)
    return result


def _by_path(objects: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str, Any]]:
    """Each object with the place in the config that is its, and as what it was given."""
    yield from (((key,), key, objects[key]) for key in ("model", "loss", "optimizer") if key in objects)
    for key, value in _labelled(objects.get("metrics", {})).items():
        yield ("metrics", key), f"metrics[{key!r}]", value
    for key, value in objects.get("datasets", {}).items():
        yield ("loaders", key), f"datasets[{key!r}]", value
    if "collate_fn" in objects:
        yield ("loaders", "collate_fn"), "collate_fn", objects["collate_fn"]


def _put(values: dict[str, Any], path: KeyPath, section: dict[str, Any], notes: list[str]) -> None:
    """Put a section where it belongs; beside a dataset the loader's own keys stay."""
    *above, key = path
    place: dict[Any, Any] = values.setdefault(str(above[0]), {}) if above else values
    before: Any = place.get(key)
    if path[0] == "loaders" and key in PHASES:
        own = before if is_mapping(before) else {}
        section = {name: own[name] for name in own if name in keys_of("loader")} | section
        before = {"name": place.get("name"), **own} if key in place else None
    _note(notes, dotted(path), before)
    place[key] = section


def _labelled(metrics: Any) -> dict[str, Any]:
    """Metrics by the names under which they are logged; of a list, by the names of their classes or functions."""
    if is_mapping(metrics):
        return dict(metrics)
    listed = metrics if isinstance(metrics, Sequence) else [metrics]
    names = [_name_of(item).rpartition(".")[2].strip("<>") for item in listed]
    several = Counter(names)
    return {f"{name}_{i}" if several[name] > 1 else name: listed[i] for i, name in enumerate(names)}


def _mistakes(objects: Mapping[str, Any]) -> Iterator[Mistake]:
    """Objects that are not what their argument takes."""
    for key in ("model", "loss"):
        value = objects.get(key)
        if inspect.isclass(value):
            yield Mistake(
                f"{key}: expected an object, found the class {value.__name__}; make one: {value.__name__}(...)"
            )
        elif value is not None and not callable(value):
            yield Mistake(f"{key}: expected a module{' or a function' * (key == 'loss')}, found a {_kind(value)}")
    for key in ("optimizer", "collate_fn"):
        value = objects.get(key)
        if value is not None and not callable(value):
            example = ", such as lambda params: torch.optim.AdamW(params, lr=1e-3)" if key == "optimizer" else ""
            yield Mistake(f"{key}: expected a function{example}; found a {_kind(value)}")
    datasets = objects.get("datasets", {})
    if not is_mapping(datasets):
        yield Mistake(f"datasets: expected a dict such as {{'train': ..., 'val': ...}}, found a {_kind(datasets)}")
        return
    for phase, dataset in datasets.items():
        if phase not in PHASES:
            hint = did_you_mean(str(phase), PHASES)
            yield Mistake(f"datasets: {phase!r} is not a phase{hint}; possible: {', '.join(PHASES)}")
        elif hasattr(dataset, "batch_sampler"):
            cure = "give its dataset; batch_size, num_workers and shuffle are keys under loaders"
            yield Mistake(f"datasets[{phase!r}]: expected a dataset, found a {_kind(dataset)}; {cure}")


def _unread(loaders: Any, datasets: Mapping[str, Any]) -> Iterator[Mistake]:
    """Keys beside the given datasets that are not a loader's, where no dataset is named whose they could be."""
    if not is_mapping(loaders) or not is_mapping(datasets) or "name" in loaders:
        return
    known = {*keys_of("loader"), *PHASES}
    own = [(key, "loaders") for key in loaders if not (set(PHASES) & set(loaders)) - set(datasets)]
    for phase in datasets:
        values = loaders.get(phase)
        own += [(key, f"loaders.{phase}") for key in (values if is_mapping(values) and "name" not in values else ())]
    for key, where in own:
        if key not in known:
            yield Mistake(f"{where}: unexpected key '{key}' beside a dataset given in Python{did_you_mean(key, known)}")


def _note(notes: list[str], where: str, before: Any) -> None:
    """Say what an object replaces."""
    if before:
        named = before.get("name") if is_mapping(before) else None
        notes.append(f"{where}: the object given in Python takes the place of {named or 'what the config says'}")


def _kind(value: Any) -> str:
    return value.__name__ if inspect.isclass(value) else type(value).__name__


def _definition(value: Any) -> Any:
    """The function or class that a reader would look up."""
    while isinstance(value, functools.partial):
        value = value.func
    return value if inspect.isclass(value) or inspect.isroutine(value) else type(value)


def _name_of(value: Any) -> str:
    definition = _definition(value)
    return f"{getattr(definition, '__module__', None) or 'builtins'}.{definition.__qualname__}"


def _record(value: Any, given_as: str) -> dict[str, Any]:
    """What can be said of an object in plain values: where its definition stands, what it is made of, how it looks."""
    record: dict[str, Any] = {"given": f"to create_trainer in Python as {given_as}; this config does not rebuild it"}
    definition = _definition(value)
    with suppress(TypeError, OSError):
        file = Path(inspect.getsourcefile(definition) or "")
        record |= {"file": str(file), "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    if code := _code_of(value):
        digest = hashlib.sha256(_without_addresses(repr(code)).encode()).hexdigest()[:16]
        record["code"] = f"{sys.implementation.cache_tag} {digest}"
    with suppress(Exception):  # a repr of the user's own
        text = _without_addresses(repr(value))
        record["repr"] = text if len(text) <= MAX_REPR else f"{text[:MAX_REPR]}..."
    if given_as.startswith("datasets"):
        with suppress(TypeError):
            record["length"] = len(value)
    return record


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _code_of(value: Any) -> list[Any]:
    """All that somebody wrote of an object: the code of its class, its bases and a module's parts, or of a function.

    Nothing of what is installed.
    """
    parts = value.modules() if hasattr(value, "modules") and not inspect.isclass(value) else [value]
    definitions = dict.fromkeys(_definition(part) for part in parts)
    found: list[Any] = []
    for definition in definitions:
        for each in inspect.getmro(definition) if inspect.isclass(definition) else [definition]:
            if _is_installed(each):
                continue
            members = vars(each).values() if inspect.isclass(each) else [each]
            found += [_of_function(inspect.unwrap(item)) for item in map(_function_in, members) if item is not None]
    return found


def _is_installed(definition: Any) -> bool:
    """Whether somebody else wrote it; what stands in `__main__`, a script or a notebook, is the user's own."""
    name = getattr(definition, "__module__", None) or "builtins"
    file, top = getattr(sys.modules.get(name), "__file__", None), name.partition(".")[0]
    if top == "__main__":
        return False
    return not file or top in {*sys.stdlib_module_names, "dtrain"} or bool(_INSTALLED & set(Path(file).parts))


def _function_in(member: Any) -> FunctionType | None:
    """The function in a member of a class, such as a property's or a static method's."""
    for name in ("fget", "__func__"):
        member = getattr(member, name, member)
    return member if isinstance(member, FunctionType) else None


def _of_function(function: Any) -> Any:
    """A function's code, its defaults, and the plain values that it takes from globals and closures."""
    outside: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty
            outside[name] = cell.cell_contents
    names = {item.argval for item in dis.get_instructions(function.__code__) if item.opname == "LOAD_GLOBAL"}
    outside |= {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    plain = {name: value for name, value in outside.items() if isinstance(value, _PLAIN)}
    return _of_code(function.__code__), repr(function.__defaults__), plain


def _of_code(code: CodeType) -> Any:
    """What a function does, without where it stands: so that a blank line or another cell changes nothing."""
    constants = list(map(_of_constant, code.co_consts))
    return code.co_code, code.co_names, code.co_varnames, constants


def _of_constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _of_code(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
