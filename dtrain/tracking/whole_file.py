"""Writes files whole or not at all, and reads JSON back; depends on the standard library alone."""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to; at the end of the block, what is there gets the file's own name.

    That may be a folder, as a Zarr store is one. Until then an older file of that name is untouched; after an error it
    still is, and nothing is left of the new one. The temporary name has the file's own ending, which some libraries
    choose a format by. What is `durable` survives a power failure, too.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        if durable:
            fsync_all(temporary)
        if path.is_dir():  # the one thing that no rename replaces
            remove(path)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk says so at a write, which knows no name
        remove(temporary)
        raise
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there; under its own name it is gone at once."""
    if path.is_dir() and not path.is_symlink():
        away = path.with_name(f".{os.getpid()}-{path.name}.old")
        path.replace(away)
        shutil.rmtree(away, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_all(path: Path) -> None:
    """Has a file, or a folder with all that is in it, written to the disk itself."""
    if path.is_dir():
        for entry in path.rglob("*"):
            fsync(entry)
    fsync(path)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size


def fsync(path: Path) -> None:
    """Has a file or folder written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, and say so.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file whole or not at all; see `whole_file`."""
    with whole_file(path, durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a text file, in UTF-8, whole or not at all; arguments and errors: see `whole_file`."""
    write_bytes(path, text.encode(), durable)


def write_json(path: Path, value: Mapping[str, Any], durable: bool = False) -> None:
    """Writes a JSON file whole or not at all; arguments and errors: see `whole_file`."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n", durable)


@functools.lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    """A file is read several times of which it is enough to hear once what is wrong with it."""
    _log.warning("%s", text)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} when it is not there, and, with a warning, when it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _warn_once(f"{path.absolute()} is damaged and is taken as empty: {error}")
        value = None
    return value if isinstance(value, dict) else {}
