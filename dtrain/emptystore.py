"""New sqlite stores of MLflow as copies of an empty one: its own migrations take seconds; knows no run."""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any


def empty_store(mlflow_version: str) -> Path:
    """Where the empty store of that version of MLflow is kept: in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "dtrain" / f"mlflow-{mlflow_version}.db"


def begin_with(empty: Path, database: Path) -> None:
    """Make a new store of the empty one, if there is one; what does not work, MLflow's own way will show."""
    with contextlib.suppress(OSError, sqlite3.Error):
        _put(database, lambda new: _copy_whole(empty, new))


def keep(empty: Path, database: Path) -> None:
    """Keep a store that was just made, without its only row: that names a folder for artifacts beside it."""
    with contextlib.suppress(OSError, sqlite3.Error):
        empty.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _put(empty, lambda new: _copy_without_rows(database, new))


def _copy_whole(empty: Path, new: Path) -> None:
    shutil.copyfile(empty, new)
    with contextlib.closing(sqlite3.connect(new)) as copy:
        if copy.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(f"{empty} is damaged")


def _copy_without_rows(database: Path, new: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(new)) as target:
        source.backup(target)
        target.execute("DELETE FROM experiments")
        target.commit()
        target.execute("VACUUM")


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
