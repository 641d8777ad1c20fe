"""The one place where a name becomes an object: check it against the signature, import, call. No torch, no rank.

A section of the config is a call: `name` says what is called, the other keys are its arguments, its signature is the
schema (sections.py reads the calls, locate.py follows the names, check.py compares them with the source text).
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import Parameter, takes_mappings, wanted_as
from dtrain.config.check import argument_mistakes, call_mistakes, is_house, later, names_of, supplied, takes_config
from dtrain.config.errors import ConfigError, KeyPath, is_mapping, to_plain
from dtrain.config.load import to_config_dict
from dtrain.config.resolve import STANDARD, locate
from dtrain.config.schema import Call, calls, is_component, nested_call, refused
from dtrain.config.signatures import Callee, Dynamic, is_standard

MAX_ERROR = 2000  # characters of a component's own error; some hold whole tensors


def build(config: ConfigDict, key: str, *given: Any, **given_names: Any) -> Any:
    """The object that one of the config's calls describes.

    Args:
        config: The whole config.
        key: Which call, as `calls` names them.
        given: The object that dtrain supplies to this section, if any: parameters, optimizer, ...
        given_names: Keyword arguments that dtrain supplies.

    Raises:
        ConfigError: The name or an argument is wrong, a module cannot be imported, or the constructor raised.
    """
    return make(config, calls(config)[key], *given, **given_names)


def version_of(package: str) -> str:
    """The version of an installed package, which is not imported; '' if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def defaults(config: ConfigDict, key: str) -> dict[str, Any]:
    """The arguments of one of dtrain's own calls as plain values, with the signature's defaults for those left out."""
    call = calls(config)[key]
    callee = import_object(config, call, locate(config, call).target)
    parameters = inspect.signature(callee).parameters.values()
    values = {item.name: item.default for item in parameters if item.default is not item.empty}
    return values | {name: to_plain(value) for name, value in call.arguments.items()}


def make(config: ConfigDict, call: Call, *given: Any, **given_names: Any) -> Any:
    """Build the components inside a call, then call it. See `build`."""
    if mistakes := call_mistakes(config, call):
        raise ConfigError(mistakes)
    target = locate(config, call).target
    imported = import_object(config, call, target)
    callee = target if isinstance(target, Callee) else _inspected(imported, target)
    name = supplied(call, callee) if given else None
    positional = given if name == "" else ()
    if takes_config(callee, call):
        arguments = given_names
        positional = (*positional, to_config_dict({"name": call.name, **call.arguments}))
    else:
        if isinstance(target, Dynamic) and (mistakes := argument_mistakes(config, call, callee)):
            raise ConfigError(mistakes)
        annotations = {item.name: item.annotation for item in callee.parameters}
        arguments = {
            key: _value(config, call, call.path_of(key), value, given, annotations.get(key))
            for key, value in call.arguments.items()
            if key not in call.shared or callee.open or key in names_of(callee)
        }
        if later(call, callee):
            return functools.partial(imported, **arguments) if arguments else imported
    arguments = arguments | ({name: given[0]} if name else {}) | given_names
    try:
        return imported(*positional, **arguments)
    except (ConfigError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        what = "" if is_house(callee) else f"{call.name}(...) raised "
        raise refused(config, _blamed(call, error), what + _told(error)) from error


def _blamed(call: Call, error: BaseException) -> KeyPath:
    """The key that an error's first word speaks of (`size is 3; ...`, `transformer.raw[1]: ...`), else the call's."""
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


def _value(
    config: ConfigDict,
    call: Call,
    path: KeyPath,
    value: Any,
    given: tuple[Any, ...],
    annotation: ast.expr | None = None,
) -> Any:
    """An argument with the components inside it built; a list becomes a tensor or tuple where only that is taken."""
    if takes_mappings(annotation) and isinstance(value, list):
        return to_plain(value)
    if is_component(value):
        return make(config, nested_call(call, path, value), *given)
    if isinstance(value, list):
        wanted = wanted_as(value, annotation)
        if wanted == "Tensor":
            return importlib.import_module("torch").tensor(value, dtype=importlib.import_module("torch").float32)
        items = [_value(config, call, (*path, index), item, given) for index, item in enumerate(value)]
        return tuple(items) if wanted == "tuple" else items
    if is_mapping(value):
        result = to_config_dict({})
        for key in value:
            result[key] = _value(config, call, (*path, key), value[key], given)
        return result
    return value


def import_object(config: ConfigDict, call: Call, target: Callee | Dynamic) -> Callable[..., Any]:
    """Import what was located, and look at the object itself, not only at its name.

    Raises:
        ConfigError: The import fails (with the user's own line), or the object may not be used.
    """
    path, before = call.path_of("name"), set(sys.modules)
    try:
        imported: Any = importlib.import_module(target.module)
        for part in target.name.split("."):
            imported = getattr(imported, part)
    except (Exception, SystemExit) as error:
        top = target.module.partition(".")[0]
        for name in [name for name in sys.modules if name not in before and f"{name}.".startswith(f"{top}.")]:
            del sys.modules[name]  # else a second try finds the half of a package that was imported, and succeeds
        raise refused(config, path, f"importing {target.module} failed: {_told(error)}") from error
    if not (inspect.isclass(imported) or inspect.isroutine(imported)):
        raise refused(config, path, f"'{call.name}' is a {type(imported).__name__}; expected a class or a function")
    if is_standard(_origin(imported)):
        raise refused(config, path, f"'{call.name}' is {STANDARD}")
    return imported


def _origin(imported: Any) -> str:
    """The module that an object is of; what hangs on an object without one is taken for Python's own."""
    of = getattr(imported, "__objclass__", None) or getattr(imported, "__self__", None)
    return str(getattr(imported, "__module__", None) or getattr(of, "__module__", None) or "builtins")


def _inspected(imported: Callable[..., Any], target: Dynamic) -> Callee:
    """A callee whose source cannot be read, described by its signature at run time."""
    callee = Callee(target.module, target.name, "", 0, inspect.isclass(imported), open=True, variadic=True)
    try:
        items = list(inspect.signature(imported).parameters.values())
    except (TypeError, ValueError):
        return callee
    kinds = {item.kind for item in items}
    parameters = [
        Parameter(
            item.name,
            _annotation(item),
            None if item.default is item.empty else repr(item.default),
            positional=item.kind != item.KEYWORD_ONLY,
            keyword=item.kind != item.POSITIONAL_ONLY,
        )
        for item in items
        if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
    ]
    is_open, variadic = inspect.Parameter.VAR_KEYWORD in kinds, inspect.Parameter.VAR_POSITIONAL in kinds
    return Callee(target.module, target.name, "", 0, callee.is_class, tuple(parameters), is_open, variadic)


def _annotation(item: inspect.Parameter) -> ast.expr | None:
    try:
        text = inspect.formatannotation(item.annotation)
        return None if item.annotation is item.empty else ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _told(error: BaseException) -> str:
    """`ValueError: text (file:line)`: the last line of the user's own code, and the one that raised."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = [item for item in traceback.extract_tb(error.__traceback__) if not item.filename.startswith("<frozen")]
    frames = [item for item in frames if item.filename not in (__file__, importlib.__file__)]
    own = [item for item in frames if not item.filename.startswith(_libraries())]
    where = ", in ".join(dict.fromkeys(f"{item.filename}:{item.lineno}" for item in [*own[-1:], *frames[-1:]]))
    text = str(error) if len(str(error)) <= MAX_ERROR else f"{str(error)[:MAX_ERROR]}..."
    return f"{type(error).__name__}: {text}" + (f" ({where})" if where else "")


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Folders of code that no user wrote."""
    paths = sysconfig.get_paths()
    return (*site.getsitepackages(), site.getusersitepackages(), paths["stdlib"], paths["platstdlib"], paths["purelib"])
