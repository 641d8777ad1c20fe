"""New sqlite stores of MLflow are copies of an empty one that is kept, and are there whole or not at all."""

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import REPOSITORY

from dtrain.tracking.sqlite_template import begin_store

SCRIPT = """
import json, sys
from dtrain.tracking.mlflow_store import connect

client = connect(f"sqlite:///{sys.argv[1]}/mlflow.db")
run = client.create_run("0")
client.log_metric(run.info.run_id, "a", 1.0)
found = client.search_experiments()
print(json.dumps([[each.name, each.artifact_location] for each in found]))
"""


def store(folder: Path, clean_env: dict[str, str], cache: Path) -> list[list[str]]:
    """Make one in another process, with a run in it; its experiments."""
    folder.mkdir()
    env = clean_env | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], env=env, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def schema(database: Path) -> dict[str, list[str]]:
    """Tables and their columns; MLflow's migrations write some constraints in an order of chance."""
    with closing(sqlite3.connect(database)) as found:
        tables = [name for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(row[1] for row in found.execute(f"PRAGMA table_info({name})")) for name in tables}


def rows(database: Path, table: str) -> int:
    with closing(sqlite3.connect(database)) as found:
        return int(found.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.mark.slow
def test_the_second_store_is_a_copy_of_the_first_before_it_had_rows(tmp_path: Path, clean_env: dict[str, str]) -> None:
    cache = tmp_path / "cache"
    for name in ("first", "second"):
        assert store(tmp_path / name, clean_env, cache) == [["Default", str(tmp_path / name / "mlruns" / "0")]]
        assert rows(tmp_path / name / "mlflow.db", "runs") == 1
    (empty,) = (cache / "dtrain").iterdir()
    assert schema(tmp_path / "first" / "mlflow.db") == schema(tmp_path / "second" / "mlflow.db") == schema(empty)
    assert [rows(empty, table) for table in ("runs", "experiments", "metrics")] == [0, 0, 0]
    empty.write_bytes(b"")  # damaged: it is made again
    assert store(tmp_path / "third", clean_env, cache)[0][0] == "Default"
    assert schema(tmp_path / "third" / "mlflow.db") == schema(tmp_path / "first" / "mlflow.db") == schema(empty)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, clean_env: dict[str, str]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert store(tmp_path / "first", clean_env, tmp_path / "cache")[0][0] == "Default"


KILLED = """
import os, signal, sys
from pathlib import Path
from dtrain.tracking.sqlite_template import begin_store

def make(file):
    file.write_bytes(b"SQLite format 3")
    os.kill(os.getpid(), signal.SIGKILL)

begin_store(Path(sys.argv[1]) / "mlflow.db", "1.0", make)
"""


def test_a_kill_amid_the_migrations_leaves_no_half_store(tmp_path: Path, clean_env: dict[str, str]) -> None:
    cache = tmp_path / "cache"
    env = clean_env | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    folder = tmp_path / "store"
    folder.mkdir()
    assert subprocess.run([sys.executable, "-c", KILLED, folder], env=env, timeout=200).returncode == -signal.SIGKILL
    assert list(folder.iterdir()) == []
    assert not cache.exists()


def test_a_store_that_another_program_makes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    database = tmp_path / "mlflow.db"

    def make(file: Path) -> None:
        with closing(sqlite3.connect(file)) as empty:
            empty.execute("CREATE TABLE experiments (id)")
        database.write_text("another's")

    begin_store(database, "1.0", make)
    assert database.read_text() == "another's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mlflow.db"]
