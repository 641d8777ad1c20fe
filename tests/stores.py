"""Runs written by the journal itself, delivered to real stores of MLflow, and read there; a plugin of conftest.py."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.tracking import delivery, file_queue, mlflow_store, retry, start_sender
from dtrain.tracking.delivery import Delivery, follow
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow_store import MlflowStore, connect
from dtrain.tracking.run_folder import read_run, update_run
from dtrain.tracking.uri import resolve_tracking_uri

GONE_PID = 2**22 + 1  # larger than any process id


@pytest.fixture(scope="module")
def client_settings() -> Iterator[None]:
    """What `main` sets in a sender's own process."""
    before = dict(os.environ)
    os.environ.update(mlflow_store.CLIENT_SETTINGS)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite store for the whole file: making one takes seconds."""
    return resolve_tracking_uri(str(tmp_path_factory.mktemp("a store")))


@pytest.fixture
def quiet_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals that start no sender: the test is the sender."""
    monkeypatch.setattr(start_sender, "_sender_command", lambda *arguments: [sys.executable, "-c", ""])


def write_run(
    folder: Path,
    steps: Iterable[int] = (),
    params: Mapping[str, Any] | None = None,
    experiment: str = "digits",
    status: str | None = "FINISHED",
    figures: Callable[[int], dict[str, Any]] = lambda step: {"train/loss": 1 / (1 + step), "lr": 1e-3},
    **more: Any,
) -> Path:
    """A training's journal, by the journal itself; status None: it was killed."""
    journal = Journal(folder, experiment=experiment, run_name="vit", tracking_uri=str(folder))
    journal.start(params or {}, more.pop("tags", {}), more.pop("artifacts", ()), **more)
    for step in steps:
        journal.log(step, figures(step))
    if status is None:
        journal.close()
        update_run(folder, pid=GONE_PID)
    else:
        journal.finish(status, "" if status == "FINISHED" else "a reason", 0)  # type: ignore[arg-type]
    return folder


def deliver(folder: Path, uri: str, patience_seconds: float = 0.0) -> int:
    return follow(Delivery(folder, MlflowStore(uri)), patience_seconds=patience_seconds)


def run_of(folder: Path, uri: str) -> Any:
    return connect(uri).get_run(read_run(folder)["run_id"])


def rows_of(folder: Path, uri: str, key: str) -> list[tuple[int, float, int]]:
    history = connect(uri).get_metric_history(read_run(folder)["run_id"], key)
    return sorted((row.step, row.value, row.timestamp) for row in history)


def runs_in(uri: str, experiment: str) -> list[Any]:
    client = connect(uri)
    known = client.get_experiment_by_name(experiment)
    return list(client.search_runs([known.experiment_id])) if known else []


def wait_until(what: Callable[[], Any], timeout_seconds: float = 240.0) -> None:
    end = time.monotonic() + timeout_seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a twentieth of a second between attempts, of which there are more for it."""
    monkeypatch.setattr(file_queue, "_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(file_queue, "_TRIES_AT_END", 40)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(delivery, "_LOOK_EVERY_SECONDS", 0.01)
