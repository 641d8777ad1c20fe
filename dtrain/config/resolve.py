"""Where a name in the config leads: the user's modules, dtrain's components, the libraries; imports nothing of them."""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from ml_collections import ConfigDict

from dtrain.config.errors import KeyPath, did_you_mean, found, shown
from dtrain.config.schema import EVERYWHERE, Call, refused
from dtrain.config.signatures import SOURCE, Callee, Dynamic, is_standard, module_file, spec_folders

STANDARD = "of the standard library, which a config may not name"


class Found(NamedTuple):
    """What a name leads to, and where else the same bare name would have been found."""

    target: Callee | Dynamic
    also: tuple[str, ...] = ()


def user_modules(config: ConfigDict) -> list[str]:
    """The names under `modules`, which are searched first."""
    value = config.get("modules")
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def locate(config: ConfigDict, call: Call) -> Found:
    """What the call's name leads to: the user's `modules`, then dtrain's components, then the section's libraries.

    Raises:
        ConfigError: There is no such name, or it may not be used.
        SyntaxError: A module on the way is no Python.
    """
    name, path = call.name, call.path_of("name")
    if not isinstance(name, str) or not name:
        raise refused(config, path, f"expected the name of a class or a function, {found(name)}")
    parts = re.split(r"[.:]", name)
    if not all(part.isidentifier() and not part.startswith("__") for part in parts) or name.count(":") > 1:
        raise refused(config, path, f"{shown(name)} is no name of a class or a function")
    if len(parts) > 1:
        return Found(_located_path(config, path, name, parts))
    hits = {module: SOURCE.lookup(module, name) for module in user_modules(config)}
    libraries = dict.fromkeys((*call.slot.libraries, *(EVERYWHERE if call.slot.nested else ())))
    hits |= {module: _in_library(module, name) for module in libraries}
    targets = list(dict.fromkeys(item for item in hits.values() if isinstance(item, Callee | Dynamic)))
    certain = [item for item in targets if isinstance(item, Callee) or item.certain]
    if targets:
        first, *others = certain or targets
        return Found(first, tuple(f"{item.module}.{item.name}" for item in others))
    for module, item in hits.items():
        if isinstance(item, str) and is_standard(item):
            raise refused(config, path, f"'{name}' of {module} is '{item}' {STANDARD}")
    raise refused(
        config, path, f"there is no '{name}'{_similar(config, call, name)}; searched {_searched(config, call)}"
    )


def _in_library(module: str, name: str) -> Callee | Dynamic | str | None:
    try:
        return SOURCE.lookup(module, name)
    except SyntaxError:  # an optional library for another Python is no library; the user's own mistakes are told
        return None


def _similar(config: ConfigDict, call: Call, name: str) -> str:
    """The nearest names of where it was looked for; of all libraries if none of those is near."""
    near = set().union(*(SOURCE.names(module) for module in (*user_modules(config), *call.slot.libraries)))
    if hint := did_you_mean(name, near):
        return hint
    for library in EVERYWHERE:
        if name in SOURCE.names(library):
            return f"; {library} has one, if {library}.{name} is meant"
    return did_you_mean(name, set().union(*map(SOURCE.names, EVERYWHERE)))


def _searched(config: ConfigDict, call: Call) -> str:
    there = [module for module in call.slot.libraries if module_file(module)]
    others = " and the other sections' libraries" if call.slot.nested else ""
    return ", ".join([*user_modules(config), *there]) + others


def _located_path(config: ConfigDict, path: KeyPath, name: str, parts: list[str]) -> Callee | Dynamic:
    """A full path, `package.module:Name` or `package.module.Name`, followed through the source text."""
    top = parts[0]
    if is_standard(top):
        raise refused(config, path, f"'{name}' is {STANDARD}")
    if module_file(top) is None:
        known = [*user_modules(config), *(library.partition(".")[0] for library in EVERYWHERE)]
        raise refused(config, path, f"there is no package '{top}'{did_you_mean(top, known)}")
    written = name.replace(":", ".")
    if not any(f"{written}.".startswith(f"{module}.") for module in user_modules(config)) and not is_installed(top):
        cure = name.partition(":")[0] if ":" in name else ".".join(parts[:-1])
        text = f"'{top}' is neither installed nor under 'modules'; add it there: modules: [{cure}]"
        raise refused(config, path, text)
    module, there = "", None
    for done, part in enumerate(parts):
        there = SOURCE.lookup(module, part) if module else top
        if isinstance(there, str) and is_standard(there):
            raise refused(config, path, f"'{name}' leads to '{there}' {STANDARD}")
        if there is None:
            hint = did_you_mean(part, SOURCE.names(module))
            raise refused(config, path, f"'{module}' has no '{part}'{hint}")
        if not isinstance(there, str):
            rest = parts[done + 1 :]
            return Dynamic(there.module, ".".join([there.name, *rest])) if rest else there
        module = there
    raise refused(config, path, f"'{name}' is a module; expected a class or a function in it")


@functools.cache
def is_installed(top: str) -> bool:
    """Whether a top-level module was installed, also as editable, rather than merely lying in the current folder.

    It is, where it is dtrain itself, or its folder holds other installations' records, is one of those, or is on a
    `.pth` file's list.
    """
    if top == __name__.partition(".")[0]:  # a checkout on PYTHONPATH does
        return True
    origin, folders = spec_folders(top)
    homes = [folder.parent for folder in folders] or ([origin.parent] if origin else [])
    if any(home.name in ("site-packages", "dist-packages") or _has_records(home) for home in homes):
        return True
    return any(home.is_relative_to(folder) for home in homes for folder in _editable_folders())


def _has_records(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.dist-info", "*.egg-info"))


def _editable_folders() -> Iterator[Path]:
    """Where editable installations lie: pip records it (PEP 610), older tools put the folder on the path."""
    for site in (Path(item) for item in sys.path if Path(item).name in ("site-packages", "dist-packages")):
        for record in site.glob("*.dist-info/direct_url.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
                facts = json.loads(record.read_bytes())
                if facts["dir_info"]["editable"]:
                    yield Path(unquote(urlparse(facts["url"]).path))
        for file in site.glob("*.pth"):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            yield from (Path(line) for line in lines if Path(line).is_absolute() and Path(line).is_dir())
