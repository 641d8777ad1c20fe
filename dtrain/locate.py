"""Where a name in the config leads: the user's modules, dtrain's components, the libraries; imports nothing of them."""

import functools
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dtrain.sections import SLOTS, Call, Slot, refused
from dtrain.source import SOURCE, Callee, Dynamic, module_file
from dtrain.yamlfile import KeyPath, did_you_mean, type_name


class Found(NamedTuple):
    """What a name leads to, and where else the same bare name would have been found."""

    target: Callee | Dynamic
    also: tuple[str, ...] = ()


@functools.cache
def _own_components() -> dict[str, str]:
    """Public classes and functions of dtrain's own components, name -> module; found by their first column."""
    root = Path(__file__).parent / "components"
    result: dict[str, str] = {}
    for file in sorted(root.glob("*/*.py")):
        module = f"dtrain.components.{file.parent.name}" + ("" if file.stem == "__init__" else f".{file.stem}")
        for name in re.findall(
            r"^(?:class|def) ([A-Za-z]\w*)|^([A-Z]\w*) = [A-Z]\w*$", file.read_text(encoding="utf-8"), re.M
        ):
            result.setdefault(name[0] or name[1], module)
    return result


def user_modules(config: ConfigDict) -> list[str]:
    """The names under `modules`, which are searched first."""
    value = config.get("modules")
    return [value] if isinstance(value, str) else [item for item in value or () if isinstance(item, str)]


def locate(config: ConfigDict, call: Call) -> Found:
    """What the call's name leads to: the user's `modules`, then dtrain's components, then the section's libraries.

    Raises:
        ConfigError: There is no such name, or it may not be used.
    """
    name, path = call.name, call.path_of("name")
    if not isinstance(name, str) or not name:
        raise refused(config, path, f"expected the name of a class or a function, found {type_name(name)} {name!r}")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?", name):
        raise refused(config, path, f"{name!r} is no name of a class or a function")
    if "." in name or ":" in name:
        return Found(_located_path(config, path, name))
    hits: list[Callee | Dynamic] = []
    for module in (*user_modules(config), _own_components().get(name, ""), *_libraries(call.slot)):
        found = SOURCE.lookup(module, name) if module else None
        if isinstance(found, Callee | Dynamic) and (isinstance(found, Callee) or found not in hits):
            hits.append(found)
    if not hits:
        raise refused(
            config, path, f"there is no '{name}'{_similar(config, call, name)}; searched {_searched(config, call)}"
        )
    first = next((item for item in hits if isinstance(item, Callee)), hits[0])
    others = dict.fromkeys(f"{item.module}.{item.name}" for item in hits if item.module != first.module)
    return Found(first, tuple(others))


def _libraries(slot: Slot) -> Iterator[str]:
    """The section's own libraries, then the others', so that a component inside a component is found as well."""
    yield from dict.fromkeys([*slot.libraries, *(module for item in SLOTS.values() for module in item.libraries)])


def _similar(config: ConfigDict, call: Call, name: str) -> str:
    own = set(_own_components()).union(*(SOURCE.names(module) for module in user_modules(config)))
    hint = did_you_mean(name, own | set().union(*(SOURCE.names(module) for module in call.slot.libraries)))
    return hint or did_you_mean(name, set().union(*(SOURCE.names(module) for module in _libraries(call.slot))))


def _searched(config: ConfigDict, call: Call) -> str:
    there = [module for module in call.slot.libraries if module_file(module)]
    return ", ".join([*user_modules(config), "dtrain.components", *there])


def _located_path(config: ConfigDict, path: KeyPath, name: str) -> Callee | Dynamic:
    """A full path, `package.module:Name` or `package.module.Name`, followed through the source text."""
    parts = re.split(r"[.:]", name)
    top = parts[0]
    if top in sys.stdlib_module_names:
        raise refused(config, path, f"'{name}' is of the standard library, which a config may not name")
    if module_file(top) is None:
        known = [*user_modules(config), *(item.partition(".")[0] for slot in SLOTS.values() for item in slot.libraries)]
        raise refused(config, path, f"there is no package '{top}'{did_you_mean(top, known)}")
    if not _is_installed(top) and not any(
        f"{name}.".startswith(f"{module}.") or name.startswith(f"{module}:") for module in user_modules(config)
    ):
        cure = name.partition(":")[0] if ":" in name else ".".join(parts[:-1])
        raise refused(
            config, path, f"'{top}' is neither installed nor under 'modules'; add it there: modules: [{cure}]"
        )
    module, done = top, 1
    found: Callee | Dynamic | str | None = top
    for part in parts[1:]:
        found = SOURCE.lookup(module, part)
        done += 1
        if not isinstance(found, str):
            break
        if found.partition(".")[0] in sys.stdlib_module_names:
            raise refused(
                config, path, f"'{name}' leads into the standard library ('{found}'), which a config may not name"
            )
        module = found
    if found is None:
        hint = did_you_mean(parts[done - 1], SOURCE.names(module))
        raise refused(config, path, f"'{module}' has no '{parts[done - 1]}'{hint}")
    if isinstance(found, str):
        raise refused(config, path, f"'{name}' is a module; expected a class or a function in it")
    return found if done == len(parts) else Dynamic(module, ".".join(parts[done - 1 :]))


@functools.cache
def _is_installed(top: str) -> bool:
    """Whether a top-level module was installed rather than merely lying in the current folder."""
    file = module_file(top)
    paths = sysconfig.get_paths()
    folders = [*site.getsitepackages(), site.getusersitepackages(), paths["purelib"], paths["platlib"]]
    if top == "dtrain" or (file and file.path and any(file.path.is_relative_to(folder) for folder in folders)):
        return True
    from importlib.metadata import packages_distributions  # slow, and only an editable installation needs it

    return top in packages_distributions()
