"""What rank 0 is told of an MLflow that does not answer, by the process that talks to it."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import os
import queue
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.tracking import outage
from dtrain.tracking.journal import Journal
from dtrain.tracking.outage import Outage, with_cure

URI = "http://me:hunter2@tracking:5000"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_one_line_when_it_fails_and_one_when_that_is_over(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, into = pipe
    store = Outage(URI, into)
    store.fails("Connection refused")
    store.fails("Connection refused")
    store.fails("timed out")
    first = "MLflow (http://***@tracking:5000): Connection refused; what is logged is kept and sent later"
    assert os.read(end, 9999).decode().splitlines() == [first]
    store.is_over()
    store.fails("Connection reset")  # of a second: nobody needs to know
    store.is_over()
    assert os.read(end, 9999) == b"MLflow (http://***@tracking:5000) answers; what was kept is sent\n"
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0.0)
    store.fails("Connection\nreset")
    assert b"Connection reset; " in os.read(end, 9999)


def test_an_address_that_does_not_even_refuse_is_told_after_a_while(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "ANSWER_SECONDS", 0.01)
    store = Outage(URI, pipe[1])
    assert b"no answer within 0.01 s; " in os.read(pipe[0], 9999)  # nothing has failed so far
    store.is_over()
    assert b" answers; " in os.read(pipe[0], 9999)


def test_making_a_store_of_files_may_take_longer_than_a_servers_answer(tmp_path: Path) -> None:
    server, files = Outage(URI), Outage(f"sqlite:///{tmp_path}/mlflow.db")
    assert (server._timer.interval, files._timer.interval) == (5.0, 60.0)  # type: ignore[attr-defined]


def test_a_store_that_answers_is_not_mentioned(pipe: tuple[int, int]) -> None:
    store = Outage(URI, pipe[1])
    store.is_over()
    assert not store._timer.is_alive() or store._timer.finished.is_set()
    os.write(pipe[1], b"the end")
    assert os.read(pipe[0], 9999) == b"the end"


def test_a_reader_that_has_gone_is_no_error() -> None:
    end, into = os.pipe()
    os.close(end)
    Outage(URI, into).fails("x")
    os.close(into)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("API request to endpoint /api/2.0/x failed with error code 401 != 200. Response body: 'Who\nare you?'", "the server answers 401: Who are you?; MLFLOW_TRACKING_USERNAME and "),
        ("API request to endpoint /api/2.0/x failed with error code 403 != 200. Response body: ''", "the server answers 403; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, say who you are"),
        ("API request to endpoint /api/2.0/x failed with error code 404 != 200. Response body: '<html>...'", "the server answers 404; this may not be MLflow's address"),
        ("API request to endpoint /api/2.0/x failed with error code 404 != 200. Response body: '<!DOCTYPE HTML>", "the server answers 404; this may not be MLflow's address"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006); does the server speak http rather than https?"),
        ("Connection refused", "Connection refused"),
    ],
)  # fmt: skip
def test_what_may_help_stands_behind_the_problem(problem: str, says: str) -> None:
    assert with_cure(problem).startswith(says)


@pytest.mark.slow
def test_rank_0_hears_of_a_server_that_is_not_there_while_it_logs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # nobody listens there
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        said: queue.Queue[str] = queue.Queue()
        run = {"experiment": "away", "run_name": "r", "tracking_uri": uri, "exit_timeout_seconds": 0.1}
        journal = Journal(tmp_path / "run", **run, system_metrics=False, say=said.put)  # type: ignore[arg-type]
        journal.start({}, {})
        journal.log(1, {"train/loss": 0.5})
        line = said.get(timeout=200)
        assert line == f"MLflow ({uri}): Connection refused; what is logged is kept and sent later"
        journal.log(2, {"train/loss": 0.4})
        assert "Connection refused. Nothing is lost" in journal.finish("FINISHED")
        assert said.empty()
