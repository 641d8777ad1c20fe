"""The one place where a name becomes an object: import what it leads to, and call it.

A section of the config is a call: `name` says what is called, the other keys are its arguments, its signature is the
schema (schema.py reads the calls, resolve.py follows the names, check.py compares them with the source text).
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import Parameter, is_numbers, takes_mapping, takes_mappings, wanted_as
from dtrain.config.check import argument_mistakes, call_mistakes, is_own, is_passed_on, supplied, takes_config
from dtrain.config.errors import ConfigError, KeyPath, bad_syntax, is_mapping, to_plain
from dtrain.config.load import to_config_dict
from dtrain.config.mixins import compose, mixin_mistakes
from dtrain.config.resolve import STANDARD
from dtrain.config.schema import OWN_SETTINGS, Call, Offer, calls, is_component, is_data, refused
from dtrain.config.signatures import Callee, Dynamic, is_standard

MAX_ERROR = 2000  # characters of a component's own error; some hold whole tensors
MAX_ARGUMENTS = 120  # characters of what a constructor was given


def build(config: ConfigDict, key: str, *given: Any, **given_names: Any) -> Any:
    """The object that one of the config's calls describes; `key` as in `calls`.

    `given` and `given_names` are what dtrain supplies to this section: parameters, optimizer, ... A ConfigError where
    the name or an argument is wrong, a module cannot be imported, or the constructor raised.
    """
    return make(calls(config)[key], *given, **given_names)


def version_of(package: str) -> str:
    """The version of an installed package, which is not imported; '' if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def defaults(config: ConfigDict, key: str) -> dict[str, Any]:
    """The arguments of one of dtrain's own calls as plain values, with the signature's defaults for those left out.

    A subclass that passes settings on (`**settings`) has the defaults of its base.
    """
    call = calls(config)[key]
    imported = _imported(call)
    bases = reversed(imported.__mro__[:-1]) if inspect.isclass(imported) else [imported]
    parameters = [item for base in bases for item in inspect.signature(base).parameters.values()]
    values = {item.name: item.default for item in parameters if item.default is not item.empty}
    return values | {name: to_plain(value) for name, value in call.arguments.items()}


def make(call: Call, *given: Any, **given_names: Any) -> Any:
    """The object that a call describes. See `build`."""
    if mistakes := call_mistakes(call):
        raise ConfigError(mistakes)
    return _made(call, given, given_names)


def _made(call: Call, given: tuple[Any, ...], given_names: dict[str, Any]) -> Any:
    """Build the components inside a call, then call it; what was given in Python is itself what is wanted."""
    if call.stands_for_object:
        return _called(call, call.object, (_wanted_by(call.object, given[0]),), {}) if given else call.object
    imported = _imported(call)
    callee = call.target if isinstance(call.target, Callee) else _inspected(imported, call.target)
    parameter = supplied(call, callee) if given else None
    offered = _asked_for(given[0], parameter) if parameter else None
    positional: tuple[Any, ...] = (offered,) if parameter and not parameter.keyword else ()
    by_name = {parameter.name: offered} if parameter and parameter.keyword else {}
    if takes_config(call, callee):
        positional = (*positional, to_config_dict({"name": call.name, **call.arguments}))
        return _called(call, imported, positional, by_name | given_names)
    if isinstance(call.target, Dynamic) and (mistakes := list(argument_mistakes(call, callee))):
        raise ConfigError(mistakes)
    annotations = {item.name: item.annotation for item in callee.parameters}
    arguments = {
        key: _value(call, call.path_of(key), value, given, annotations.get(key))
        for key, value in call.arguments.items()
        if key not in call.shared or callee.open or key in callee.keywords
    }
    if any(item.name == "name" and item.default is None for item in callee.parameters):
        arguments.setdefault("name", call.name)
    if is_passed_on(call, callee):
        return functools.partial(imported, **arguments) if arguments else imported
    return _called(call, imported, positional, arguments | by_name | given_names)


def _wanted_by(function: Callable[..., Any], given: Any) -> Any:
    """The same for a function that was given in Python: the model where its first parameter is called as one is."""
    with contextlib.suppress(TypeError, ValueError):
        name = next(iter(inspect.signature(function).parameters), "")
        name = "model" if name in ("module", "net", "network") else name
        return given.get(name, next(iter(given.values()))) if isinstance(given, Offer) else given
    return next(iter(given.values())) if isinstance(given, Offer) else given


def _asked_for(given: Any, parameter: Parameter) -> Any:
    """What dtrain supplies; of an offer that which the parameter is named for, else the first."""
    return given.get(parameter.name, next(iter(given.values()))) if isinstance(given, Offer) else given


def _called(call: Call, imported: Callable[..., Any], positional: tuple[Any, ...], by_name: dict[str, Any]) -> Any:
    try:
        return imported(*positional, **by_name)
    except (ConfigError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        own = isinstance(call.target, Callee) and is_own(call.target)
        # What dtrain's own settings refuse is said for a user, who needs no line of ours.
        is_said = own and isinstance(error, ValueError)
        subject = "" if own else f"{call.name}({_arguments_text(call)}) raised "
        text = str(error) if is_said else subject + _explained(error)
        raise refused(call.config, _key_at_fault(call, error), text) from error


def _arguments_text(call: Call) -> str:
    """The arguments as the config has them, so that the one to change is seen."""
    text = ", ".join(f"{key}={to_plain(value)!r}" for key, value in call.arguments.items())
    return text if len(text) <= MAX_ARGUMENTS else f"{text[:MAX_ARGUMENTS]}..."


def _key_at_fault(call: Call, error: BaseException) -> KeyPath:
    """The key that an error's first word names (`size is 3; ...`, `transformer.raw[1]: ...`), else the call's."""
    word = re.match(r"[\w.\[\]]+", str(error))
    keys = [int(key) if key.isdecimal() else key for key in re.findall(r"\w+", word[0] if word else "")]
    while keys and keys[0] not in call.arguments:
        del keys[0]
    if not keys:
        return call.path
    value, path = call.arguments[str(keys[0])], call.path_of(str(keys[0]))
    for key in keys[1:]:
        if not (is_mapping(value) and key in value) and not (isinstance(value, list) and key in range(len(value))):
            break
        value, path = value[key], (*path, key)
    return path


def _value(call: Call, path: KeyPath, value: Any, given: tuple[Any, ...], annotation: ast.expr | None = None) -> Any:
    """An argument with the components inside it built; a list becomes a tensor or tuple where only that is taken."""
    if takes_mappings(annotation) and isinstance(value, list):
        return to_plain(value)
    if path in call.components:
        return _made(call.components[path], given, {})
    if is_data(value) or (is_component(value) and takes_mapping(annotation)):
        plain = to_plain(value)
        return {key: plain[key] for key in plain if key != "_data_"}
    if isinstance(value, list):
        wanted = "Tensor" if annotation is None and _is_weight(call, path, value) else wanted_as(value, annotation)
        if wanted == "Tensor":
            torch = importlib.import_module("torch")
            return torch.tensor(value, dtype=torch.float32)
        items = [_value(call, (*path, index), item, given) for index, item in enumerate(value)]
        return tuple(items) if wanted == "tuple" else items
    if is_mapping(value):
        result = to_config_dict({})
        for key in value:
            result[key] = _value(call, (*path, key), value[key], given)
        return result
    return value


def _is_weight(call: Call, path: KeyPath, value: list[Any]) -> bool:
    """Whether a loss wants a tensor without saying so: its classes' weights by the names that torch's losses have."""
    return call.path[0] == "loss" and path[-1] in ("weight", "pos_weight") and bool(value) and is_numbers(value)


def _imported(call: Call) -> Callable[..., Any]:
    """Import what a call's name leads to, and look at the object itself, not only at its name."""
    if call.parts:
        return _composed(call)
    target, path, modules_before = call.target, call.path_of("name"), set(sys.modules)
    try:
        imported: Any = importlib.import_module(target.module)
        for part in target.name.split("."):
            imported = getattr(imported, part)
    except (Exception, SystemExit) as error:
        package = target.module.partition(".")[0]
        for name in set(sys.modules) - modules_before:
            if f"{name}.".startswith(f"{package}."):
                del sys.modules[name]  # else a second try finds the half that was imported, and succeeds
        raise refused(call.config, path, f"importing {target.module} failed: {_explained(error)}") from error
    if not (inspect.isclass(imported) or inspect.isroutine(imported)):
        text = f"'{call.name}' is a {type(imported).__name__}; expected a class or a function"
        raise refused(call.config, path, text)
    of = getattr(imported, "__objclass__", None) or getattr(imported, "__self__", None)
    # What hangs on an object that is of no module is taken for Python's own.
    if is_standard(str(getattr(imported, "__module__", None) or getattr(of, "__module__", None) or "builtins")):
        raise refused(call.config, path, f"'{call.name}' is {STANDARD}")
    return imported


def _composed(call: Call) -> type:
    """One class of those that a list names."""
    classes: list[Any] = [_imported(part) for part in call.parts]
    module, name = OWN_SETTINGS["trainer"].split(":")
    base = getattr(importlib.import_module(module), name)
    for number, text in mixin_mistakes(classes, base):
        raise refused(call.config, call.parts[number].path, text)
    try:
        return compose(classes, base)
    except TypeError as error:
        text = f"do not become one class: {' '.join(str(error).split())}"
        raise refused(call.config, call.path_of("name"), text) from error


def _inspected(imported: Callable[..., Any], target: Dynamic) -> Callee:
    """A callee whose source cannot be read, described by its signature at run time."""
    where = (target.module, target.name, "", 0, inspect.isclass(imported))
    try:
        items = inspect.signature(imported).parameters.values()
    except (TypeError, ValueError):
        return Callee(*where, open=True, variadic=True)
    kinds = {item.kind for item in items}
    parameters = []
    for item in items:
        default = None if item.default is item.empty else repr(item.default)
        annotation: ast.expr | None = None
        if item.annotation is not item.empty:
            with contextlib.suppress(SyntaxError):
                annotation = ast.parse(inspect.formatannotation(item.annotation), mode="eval").body
        positional, keyword = item.kind != item.KEYWORD_ONLY, item.kind != item.POSITIONAL_ONLY
        if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            parameters.append(Parameter(item.name, annotation, default, positional, keyword))
    is_open = inspect.Parameter.VAR_KEYWORD in kinds or _takes_more(imported)
    return Callee(*where, tuple(parameters), is_open, inspect.Parameter.VAR_POSITIONAL in kinds)


def _takes_more(imported: Any) -> bool:
    """Whether a dataclass has an `__init__` around its own that takes any further key, as Hugging Face's configs."""
    init: Any = getattr(imported, "__init__", None)
    if not dataclasses.is_dataclass(imported) or not hasattr(init, "__wrapped__"):
        return False
    outer = inspect.signature(init, follow_wrapped=False).parameters.values()
    return any(item.kind is item.VAR_KEYWORD for item in outer)


def _explained(error: BaseException) -> str:
    """`ValueError: text (file:line)`: the last line of the user's own code, and the one that raised."""
    if isinstance(error, SyntaxError):
        return bad_syntax(error)
    ours = ("<frozen", __file__, str(importlib.__file__))
    frames = [item for item in traceback.extract_tb(error.__traceback__) if not item.filename.startswith(ours)]
    installed = [item for item in sys.path if item.endswith(("site-packages", "dist-packages"))]
    libraries = (*installed, *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib")))
    own = [item for item in frames if not item.filename.startswith(libraries)]
    where = ", in ".join(dict.fromkeys(f"{item.filename}:{item.lineno}" for item in [*own[-1:], *frames[-1:]]))
    text = str(error) if len(str(error)) <= MAX_ERROR else f"{str(error)[:MAX_ERROR]}..."
    return f"{type(error).__name__}: {text}" + (f" ({where})" if where else "")
