"""New sqlite stores of MLflow, as copies of an empty one: MLflow's own migrations take seconds."""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

from dtrain.tracking.whole_file import write_bytes


def begin_store(database: Path, mlflow_version: str, make: Callable[[Path], object]) -> None:
    """Writes a new store, whole or not at all: a kill amid MLflow's migrations would leave one that it cannot use.

    An empty one, made by `make` once for each version of MLflow, is kept in the user's cache folder. What does not work
    here, MLflow's own way will show.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    kept = cache / "dtrain" / f"mlflow-{mlflow_version}.db"
    with contextlib.suppress(Exception):
        content = _whole(kept)
        if content is None:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # MLflow has it open still
                make(Path(folder) / "mlflow.db")
                content = _without_rows(Path(folder) / "mlflow.db")
            with contextlib.suppress(OSError):
                kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_bytes(kept, content, durable=True)
        new = database.with_name(f".{database.name}.new")
        write_bytes(new, content, durable=True)
        try:
            os.link(new, database)  # which fails where another program, which knows no lock, has made one meanwhile
        finally:
            new.unlink()


def _whole(kept: Path) -> bytes | None:
    """The empty store, if there is one and it is not damaged."""
    with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(sqlite3.connect(":memory:")) as copy:
        if content := kept.read_bytes():
            copy.deserialize(content)
            if copy.execute("PRAGMA quick_check").fetchone() == ("ok",):
                return content
    return None


def _without_rows(database: Path) -> bytes:
    """A store that was just made without its only row: that names a folder for artifacts beside it."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as store:
        store.execute("DELETE FROM experiments")
        store.execute("VACUUM")
        return store.serialize()
