"""The one place where a name becomes an object: check it against the signature, import, call. No torch, no rank.

A section of the config is a call: `name` says what is called, the other keys are its arguments, its signature is the
schema (sections.py reads the calls, locate.py follows the names, check.py compares them with the source text).
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dtrain.annotations import expectation, is_numbers
from dtrain.check import argument_mistakes, call_mistakes, later, names_of, takes_config
from dtrain.config import to_config_dict, to_plain
from dtrain.locate import locate
from dtrain.sections import Call, call_at, calls, is_component, nested_slot, refused
from dtrain.source import Callee, Dynamic, Parameter
from dtrain.yamlfile import ConfigError, KeyPath


def build(config: ConfigDict, key: str, *given: Any, **given_names: Any) -> Any:
    """The object that one of the config's calls describes.

    Args:
        config: The whole config.
        key: Which call, as `calls` names them.
        given: Leading positional arguments.
        given_names: Keyword arguments that dtrain supplies.

    Raises:
        ConfigError: The name or an argument is wrong, a module cannot be imported, or the constructor raised.
    """
    return make(config, calls(config)[key], *given, **given_names)


def defaults(config: ConfigDict, key: str) -> dict[str, Any]:
    """The arguments of one of dtrain's own calls as plain values, with the signature's defaults for those left out."""
    call = calls(config)[key]
    found = import_object(config, call, locate(config, call).target)
    parameters = inspect.signature(found).parameters.values()
    values = {item.name: item.default for item in parameters if item.default is not item.empty}
    return values | {name: to_plain(value) for name, value in call.arguments.items()}


def make(config: ConfigDict, call: Call, *given: Any, **given_names: Any) -> Any:
    """Build the components inside a call, then call it. See `build`."""
    if mistakes := call_mistakes(config, call):
        raise ConfigError(mistakes)
    target = locate(config, call).target
    found = import_object(config, call, target)
    callee = target if isinstance(target, Callee) else _inspected(found, target)
    if takes_config(callee, call):
        section = to_config_dict({"name": call.name, **call.arguments})
        return _called(config, call, found, *given, section, **given_names)
    if isinstance(target, Dynamic) and (mistakes := argument_mistakes(config, call, callee)):
        raise ConfigError(mistakes)
    annotations = {item.name: item.annotation for item in callee.parameters}
    arguments = {
        key: _value(config, call, call.path_of(key), value, annotations.get(key))
        for key, value in call.arguments.items()
        if key not in call.shared or callee.open or key in names_of(callee)
    }
    if later(call, callee):
        return functools.partial(found, **arguments) if arguments else found
    return _called(config, call, found, *given, **arguments | given_names)


def _value(config: ConfigDict, call: Call, path: KeyPath, value: Any, annotation: ast.expr | None = None) -> Any:
    """An argument with the components inside it built; numbers become a tensor where a tensor is asked for."""
    if is_component(value):
        return make(config, call_at(config, path, value, nested_slot(call.slot)))
    if isinstance(value, list):
        if value and is_numbers(value) and _wants_tensor(value, annotation):
            return importlib.import_module("torch").tensor(value)
        return [_value(config, call, (*path, index), item) for index, item in enumerate(value)]
    if isinstance(value, Mapping | ConfigDict):
        result = to_config_dict({})
        for key in value:
            result[key] = _value(config, call, (*path, key), value[key])
        return result
    return value


def _wants_tensor(value: list[Any], annotation: ast.expr | None) -> bool:
    """Whether a list of numbers fits an annotation as a tensor only."""
    text = ast.unparse(annotation) if annotation else ""
    without = re.sub(r"(torch\.)?\bTensor\b", "None", text)
    return without != text and expectation(value, ast.parse(without, mode="eval").body) is not None


def import_object(config: ConfigDict, call: Call, target: Callee | Dynamic) -> Callable[..., Any]:
    """Import what was located, and look at the object itself, not only at its name.

    Raises:
        ConfigError: The import fails (with the user's own line), or the object may not be used.
    """
    path = call.path_of("name")
    try:
        found: Any = importlib.import_module(target.module)
        for part in target.name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise refused(config, path, f"importing {target.module} failed: {_told(error)}") from error
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise refused(config, path, f"'{call.name}' is a {type(found).__name__}; expected a class or a function")
    origin = (getattr(found, "__module__", None) or "builtins").partition(".")[0]
    if origin in sys.stdlib_module_names:
        raise refused(config, path, f"'{call.name}' is of the standard library, which a config may not name")
    return found


def _inspected(found: Callable[..., Any], target: Dynamic) -> Callee:
    """A callee whose source cannot be read, described by its signature at run time."""
    try:
        items = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return Callee(target.module, target.name, "", 0, inspect.isclass(found), open=True)
    parameters = []
    for item in items:
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            continue
        annotation = None if item.annotation is item.empty else inspect.formatannotation(item.annotation)
        try:
            node = ast.parse(annotation, mode="eval").body if annotation else None
        except SyntaxError:
            node = None
        default = None if item.default is item.empty else repr(item.default)
        parameters.append(
            Parameter(item.name, node, default, item.kind != item.KEYWORD_ONLY, item.kind != item.POSITIONAL_ONLY)
        )
    is_open = any(item.kind == item.VAR_KEYWORD for item in items)
    return Callee(target.module, target.name, "", 0, inspect.isclass(found), tuple(parameters), is_open)


def _called(config: ConfigDict, call: Call, found: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return found(*args, **kwargs)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        raise refused(config, call.path, f"{call.name}(...) raised {_told(error)}") from error


def _told(error: BaseException) -> str:
    """`ValueError: text (file:line)`, with the line that raised, or that asked for what could not be imported."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = [item for item in traceback.extract_tb(error.__traceback__) if not item.filename.startswith("<frozen")]
    frames = [item for item in frames if item.filename not in (__file__, importlib.__file__)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
