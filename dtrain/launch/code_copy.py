"""Copies the code of the user's own that a config leads to, so that later edits do not reach a job that waits.

What pip installed stays where it is; a checkout that Python reads in place, such as an editable installation, is copied
like the modules of the current folder.
"""

import ast
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.config.errors import ConfigError, is_mapping
from dtrain.config.signatures import module_file, spec_folders

LINK_BYTES = 2**20  # larger files in a package are data: they are linked
MAX_FILES = 5000


def named_modules(value: Any) -> set[str]:
    """The top-level modules that a config's values name, under `modules` or as `package.module:Name`."""
    if is_mapping(value):
        listed = [value.get(key) for key in ("modules", "optional_modules")]
        names = [name for item in listed for name in (item if isinstance(item, list) else [item])]
        found = {str(name).partition(".")[0] for name in names}
        return found.union(*(named_modules(value[key]) for key in value))
    if isinstance(value, list):
        return set[str]().union(*map(named_modules, value))
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)+", value):
        parts = re.split(r"[.:]", value)
        heads = (module_file(".".join(parts[:end])) for end in range(1, len(parts)))
        return {parts[0]} if any(head and head.path for head in heads) else set()
    return set()


def copy_code(modules: Iterable[str], to: Path) -> None:
    """Copy top-level modules and all of the user's own that they import, at any depth; installed ones are left out.

    The copies are in a new folder, for the front of Python's path.

    Raises:
        ConfigError: There is more than a package's worth of files.
        OSError: A file cannot be read or written.
    """
    to.mkdir()
    for place, files in own_code(modules):
        _copy(place, files, to)
    # With this record the folder counts as a place of installed packages, which a config may name: the check on the
    # login node has let these pass.
    record = to / "dtrain_job.egg-info"
    record.mkdir()
    (record / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: dtrain-job\nVersion: 0\n")


def own_code(modules: Iterable[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Each module that is copied, and of the user's own what it imports: a file or a package's folder, and its files.

    Raises:
        ConfigError: There is more than a package's worth of files.
    """
    waiting, seen = list(modules), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or not name.isidentifier():
            continue
        seen.add(name)
        for place in _own_places(name):
            files = list(islice(_files(place), MAX_FILES + 1))
            if len(files) > MAX_FILES:
                text = f"{place} has more than {MAX_FILES} files, so it is not copied; put the code into a package"
                raise ConfigError(text)
            yield place, files
            waiting += [found for file in files if file.suffix == ".py" for found in _imports(file)]


def _own_places(name: str) -> list[Path]:
    """A module's file, or the folders of a package; nothing for an installed one."""
    origin, folders = spec_folders(name)
    places = folders or ([origin] if origin else [])
    is_installed = any({"site-packages", "dist-packages"} & set(place.parts) for place in places)
    return [] if is_installed else places


def _copy(place: Path, files: Iterable[Path], to: Path) -> None:
    """Copy a module's file, or a package's folder with all that lies in it."""
    for file in files:
        target = to / file.relative_to(place.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or file.stat().st_size > LINK_BYTES:
            target.symlink_to(file.resolve())
        else:
            shutil.copy(file, target)


def _files(place: Path) -> Iterator[Path]:
    if place.is_symlink() or not place.is_dir():
        yield place
        return
    for item in place.iterdir():
        if not item.name.startswith(".") and item.name != "__pycache__":
            yield from _files(item)


def _imports(file: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, OSError):  # nobody may need it; if somebody does, the check has reported it
        return set()
    plain = {item.name for node in nodes if isinstance(node, ast.Import) for item in node.names}
    others = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in plain | others}
