"""MLflow's own server and stores, stopped, frozen, lossy, full, locked, damaged; rank 0 killed: no figure is lost."""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Running, Tagged
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ports import free_port
from stores import GONE_PID, deliver, rows_of, run_of, runs_in, wait_until, write_run
from whole_runs import Place, figures

from dtrain.tracking import sender
from dtrain.tracking.delivery import Delivery, follow
from dtrain.tracking.journal import Journal, flatten
from dtrain.tracking.mlflow_store import MlflowStore, connect
from dtrain.tracking.run_folder import read_run, update_run
from dtrain.tracking.whole_file import read_json

pytestmark = pytest.mark.usefixtures("client_settings")

SEED = int(os.environ.get("DTRAIN_TEST_SEED") or random.randrange(1 << 30))  # printed where a test fails


# ------------------------------------------------------------------------------------------------ faults of all kinds


class MlflowServer:
    """`mlflow server` as people start it: processes of its own, which can be killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.store = f"sqlite:///{folder}/mlflow.db"  # for a look past the server
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = ["--workers", "1", "--port", str(self.port), "--backend-store-uri", self.store]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(200)


class Proxy:
    """Stands before a server, one connection for each request, and spoils what it is told to.

    drop: the connection is reset at once. cut: the server gets the request, its answer is lost. slow: the answer comes
    late. silent: no answer ever. A number: that status, with a page that is no JSON. page: 200, and the same page.

    `turn` says of which requests: "..F" of every third one, as where one of three backends is broken; else a random
    `share` of them.
    """

    def __init__(self, port: int = 0) -> None:
        self.target, self.fault, self.share, self.turn, self.requests = port, "", 1.0, "", 0
        self.times: list[float] = []
        self._random = random.Random(SEED)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        spoils = self._random.random() < self.share
        if self.turn:
            spoils = self.turn[self.requests % len(self.turn)] == "F"
        fault = self.fault if spoils else ""
        self.requests += 1
        self.times.append(time.monotonic())
        try:
            with client:
                if fault == "drop":  # a reset, not an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                answer = self._answer(_request(client), fault)
                if fault != "cut":
                    client.sendall(answer)
        except OSError:
            return

    def _answer(self, request: bytes, fault: str) -> bytes:
        if fault.isdigit() or fault == "page":
            head = f"HTTP/1.1 {200 if fault == 'page' else fault} Spoilt\r\nRetry-After: 3600\r\nConnection: close\r\n"
            return head.encode() + b"Content-Type: text/html\r\nContent-Length: 16\r\n\r\n<html>no!</html>"
        if fault == "slow":
            time.sleep(1)
        while fault == "silent" and self.fault == "silent":
            time.sleep(0.05)
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            server.sendall(request)
            return b"".join(iter(lambda: server.recv(65536), b""))


def _request(client: socket.socket) -> bytes:
    """One whole request, which asks for the connection to be closed after it."""
    head, _, body = _received(client, b"", lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    length = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
    if b"transfer-encoding: chunked" in head.lower():  # how requests sends an empty file
        body = _received(client, body, lambda data: data.endswith(b"0\r\n\r\n"))
    else:
        body = _received(client, body, lambda data: len(data) >= length)
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


def _received(client: socket.socket, data: bytes, whole: Callable[[bytes], bool]) -> bytes:
    """`data` and what follows, until it is whole."""
    while not whole(data):
        more = client.recv(65536)
        if not more:
            raise ConnectionError("the request ended early")
        data += more
    return data


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("real"))
    yield server
    server.kill()


@pytest.fixture
def proxy(real: MlflowServer) -> Iterator[Proxy]:
    before = Proxy(real.port)
    yield before
    before.fault = ""
    before.close()


def whole(folder: Path, store: str, steps: int, key: str = "train/loss", status: str = "FINISHED") -> None:
    """All of a run's figures are in the store, each once, in one run, which ended as it did."""
    assert [step for step, _, _ in rows_of(folder, store, key)] == list(range(steps)), f"seed {SEED}"
    run = run_of(folder, store)
    assert run.info.status == status
    found = connect(store).search_runs([run.info.experiment_id], f"tags.`dtrain.id` = '{read_run(folder)['id']}'")
    assert len(found) == 1


# -------------------------------------------------------------------------------------------------- network and server


@pytest.mark.usefixtures("quiet_journal", "impatient")
@pytest.mark.parametrize("fault", ["drop", "cut", "500", "429", "404", "page", "slow"])
def test_a_network_that_spoils_a_third_of_all_requests_loses_and_doubles_nothing(
    tmp_path: Path, real: MlflowServer, proxy: Proxy, fault: str
) -> None:
    (tmp_path / "file").write_text("x")
    params, artifacts = {"lr": 1, **{f"p{n}": n for n in range(150)}}, [("file", "")]
    folder = write_run(tmp_path, range(1200), params, experiment=f"net {fault}", artifacts=artifacts)
    proxy.fault, proxy.share = fault, 0.3
    assert deliver(folder, proxy.uri, patience_seconds=300) == 0, "nor is a Retry-After of an hour obeyed"
    proxy.fault = ""
    whole(folder, real.store, 1200)
    assert len(runs_in(real.store, f"net {fault}")) == 1
    assert len(run_of(folder, real.store).data.params) == 151


@pytest.mark.usefixtures("quiet_journal")
@pytest.mark.parametrize("first", [0, *(pytest.param(each, marks=pytest.mark.soak) for each in (1, 2))])
@pytest.mark.parametrize("turn", ["..F", "...F"])
def test_one_of_several_backends_that_is_broken_holds_nothing_up(
    tmp_path: Path, real: MlflowServer, proxy: Proxy, turn: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the true pauses, whichever requests meet it: where each try starts from zero, it is the same ones each time.

    Where one of two is, nothing can help: to set a status, MLflow's client itself asks twice, and repeats both.
    """
    monkeypatch.setattr("dtrain.tracking.delivery._SEND_EVERY_SECONDS", 0.1)
    (tmp_path / "file").write_text("x")
    params = {f"p{n}": n for n in range(250)}
    folder = write_run(tmp_path, range(1200), params, experiment=f"turn {turn} {first}", artifacts=[("file", "")])
    proxy.fault, proxy.turn, proxy.requests = "500", turn, first
    assert deliver(folder, proxy.uri, patience_seconds=300) == 0
    proxy.fault = ""
    whole(folder, real.store, 1200)
    assert len(runs_in(real.store, f"turn {turn} {first}")) == 1
    assert len(run_of(folder, real.store).data.params) == 250


@pytest.mark.usefixtures("quiet_journal", "impatient")
@pytest.mark.parametrize("fault", ["400", "401", "403", "413", "503"])
def test_a_gateway_that_refuses_everything_for_a_while_makes_no_row_a_bad_one(
    tmp_path: Path, real: MlflowServer, proxy: Proxy, fault: str
) -> None:
    folder = write_run(tmp_path, range(50), {"lr": 1})
    work = Delivery(folder, MlflowStore(proxy.uri))
    work.draining = True
    work._open()
    proxy.fault = fault  # the run is there, its figures meet the gateway
    for _ in range(3):
        with pytest.raises(Exception, match=fault):
            work.step()
    proxy.fault = ""
    assert follow(work, patience_seconds=300) == 0
    whole(folder, real.store, 50)


@pytest.mark.usefixtures("quiet_journal", "impatient")
@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_on_the_server_is_replaced_and_the_history_with_it(
    tmp_path: Path, real: MlflowServer, what: str
) -> None:
    name = f"deleted {what}"
    write_run(tmp_path, range(5), {"lr": 1}, experiment=name, status="KILLED")
    work = Delivery(tmp_path, MlflowStore(real.uri))
    assert follow(work) == 0
    old = run_of(tmp_path, real.store)
    client = connect(real.uri)
    client.delete_run(old.info.run_id) if what == "run" else client.delete_experiment(old.info.experiment_id)
    write_run(tmp_path, range(5, 9), {"lr": 2}, experiment=name)
    assert follow(work, patience_seconds=300) == 0  # the process that still holds the old one
    new = run_of(tmp_path, real.store)
    assert new.info.run_id != old.info.run_id and new.data.tags["dtrain.replaces"] == old.info.run_id
    assert new.info.status == "FINISHED" and new.data.params == {"lr": "1", "resume_2/lr": "2"}
    assert [step for step, _, _ in rows_of(tmp_path, real.store, "lr")] == list(range(9))


RANK_0 = """
import json, sys, time
from dtrain.tracking.run_folder import read_run
from dtrain.tracking.journal import Journal
folder, uri, seconds, exit_timeout = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
journal = Journal(folder, experiment="faults", run_name="r", tracking_uri=uri, exit_timeout_seconds=exit_timeout)
journal.start({"lr": 1}, {}, world_size=1)
print(journal._sender.pid, flush=True)
end, costs, spent = None, [], time.thread_time()
for step in range(10**9):
    began = time.perf_counter()
    journal.log(step, {"train/loss": 1 / (1 + step), **{f"m/{n}": step + n for n in range(20)}})
    costs.append(time.perf_counter() - began)
    time.sleep(0.01)
    if end is None and read_run(folder).get("run_id"):
        end = time.monotonic() + seconds
    if end and time.monotonic() > end:
        break
spent = time.thread_time() - spent
began = time.monotonic()
hint = journal.finish("FINISHED")
print(json.dumps({"steps": step + 1, "worst": max(costs), "cpu": spent / (step + 1), "exit": time.monotonic() - began,
                  "hint": hint}), flush=True)
"""


class Rank0:
    """A process with a journal and its real sender, which logs 21 figures every 10 ms.

    For so many `seconds` from when the run is in MLflow: on a busy machine that alone takes its time.
    """

    def __init__(self, folder: Path, uri: str, seconds: float, exit_timeout: float = 250.0) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK_0, folder, uri, str(seconds), str(exit_timeout)],
            cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.out = self.process.stdout
        self.sender_pid = int(self.out.readline())

    def result(self) -> dict[str, Any]:
        lines = self.out.read().splitlines()
        assert self.process.wait(200) == 0
        print(f"figures of {self.folder}: {lines[-1]}")
        return dict(json.loads(lines[-1]))

    def kill(self) -> None:
        """Rank 0 and its sender, as a batch system does at last."""
        for pid in (self.sender_pid, self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(200)
        self.out.close()


def test_a_frozen_server_costs_no_figure_and_a_request_a_second_is_enough(
    tmp_path: Path, real: MlflowServer, proxy: Proxy
) -> None:
    rank0 = Rank0(tmp_path, proxy.uri, seconds=9)
    wait_until(lambda: read_json(tmp_path / "mlflow.json").get("offset"))
    real.signal(signal.SIGSTOP)
    time.sleep(3)
    real.signal(signal.SIGCONT)
    result = rank0.result()
    assert result["hint"] == ""
    whole(tmp_path, real.store, result["steps"])
    assert len(rows_of(tmp_path, real.store, "m/19")) == result["steps"]
    # 47 lines of 21 figures are a request; one a second where there are fewer; the rest is its start and its end.
    spread = proxy.times[-1] - proxy.times[0]
    most = result["steps"] / 47 + spread + 40
    assert proxy.requests <= most, f"{proxy.requests} requests for {result['steps']} lines in {spread:.0f} s"


def test_a_server_that_freezes_for_good_costs_a_bounded_end_and_sync_sends_the_rest(
    tmp_path: Path, real: MlflowServer, proxy: Proxy
) -> None:
    rank0 = Rank0(tmp_path, proxy.uri, seconds=6, exit_timeout=2)
    wait_until(lambda: read_run(tmp_path).get("run_id"))
    proxy.fault = "silent"
    result = rank0.result()
    assert "dtrain sync" in result["hint"] and result["exit"] < 200  # of which 2 were asked for
    assert run_of(tmp_path, real.store).info.status == "RUNNING" and read_run(tmp_path)["state"] == "FINISHED"
    proxy.fault = ""
    assert sender.main([str(tmp_path)]) == 0
    whole(tmp_path, real.store, result["steps"])


# ------------------------------------------------------------------------------ a sender that dies, a disk that is full


def sender_of(running: Running) -> int:
    """The process that feeds MLflow."""
    pids = [int(line.partition(":")[0]) for line in running.tagged.command_lines() if "dtrain.tracking.sender" in line]
    return pids[0] if pids else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sender_that_is_killed_is_started_again_while_the_training_runs(place: Place) -> None:
    file = place.config("sender-killed", **{"trainer.max_epochs": 10**6, "trainer.log_every_steps": 10})
    (running,) = place.start(file, mlflow=True, env={"TOY_LOAD": "sample 3 rank 0 lag"})
    run, store = place.path("sender-killed"), f"sqlite:///{place.folder}/mlflow.db"

    def steps_in_mlflow() -> int:
        assert running.process.poll() is None, running.output().text
        return len(rows_of(run, store, "train/loss")) if read_run(run).get("run_id") else 0

    wait_until(steps_in_mlflow)
    first = sender_of(running)
    os.kill(first, signal.SIGKILL)
    before = steps_in_mlflow()
    wait_until(lambda: steps_in_mlflow() > before)
    assert sender_of(running) not in (0, first)
    os.kill(running.pid, signal.SIGTERM)
    result = running.result(200)
    assert result.rc == 75, result.text
    assert result.text.count(f"MLflow's sender was killed by SIGKILL, see {run}/logs/sender.log; it is started") == 1
    assert [step for step, _, _ in rows_of(run, store, "train/loss")] == [*figures(run)["train/loss"]]
    assert run_of(run, store).info.status == "KILLED"
    assert len(runs_in(store, "toy")) >= 1 and len(connect(store).search_runs(
        [run_of(run, store).info.experiment_id], f"tags.`dtrain.id` = '{read_run(run)['id']}'")) == 1  # fmt: skip


FULL_DISK = """
import json, os, sys, threading, time
from dtrain.tracking.run_folder import read_run
from dtrain.tracking.whole_file import read_json
from dtrain.tracking.journal import Journal
folder, uri, seconds, freed_after = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
journal = Journal(folder, experiment="full", run_name="r", tracking_uri=uri, exit_timeout_seconds=seconds)
journal.start({"lr": 1}, {}, world_size=1)
for step in range(5):
    journal.log(step, {"train/loss": 1 / (1 + step)})
while read_json(journal._files.delivery).get("status") != "RUNNING":
    time.sleep(0.05)
with open(f"{folder}/ballast", "wb", buffering=0) as file:
    for size in (65536, 4096, 512, 1):
        try:
            while True:
                file.write(bytes(size))
        except OSError:
            pass
for step in range(5, 900):  # more than the page of the journal that has begun
    journal.log(step, {"train/loss": 1 / (1 + step)})
if freed_after:
    threading.Timer(freed_after, os.remove, [f"{folder}/ballast"]).start()
began = time.monotonic()
hint = journal.finish("FINISHED", exit_status=0)
print(json.dumps({"hint": hint, "seconds": time.monotonic() - began}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("freed_after", "store_works"),
    [(4, True), (0, False), *(pytest.param(*each, marks=pytest.mark.soak) for each in ((0, True), (4, False)))],
)
def test_a_disk_that_is_full_at_the_end_costs_neither_the_true_status_nor_mlflow(
    tmp_path: Path, uri: str, mounted: Callable[[str], Path], freed_after: int, store_works: bool
) -> None:
    folder = mounted("size=1m") / "run"
    seconds, store = (250 if freed_after else 12), uri
    words = [sys.executable, "-c", FULL_DISK, folder, store, str(seconds), str(freed_after)]
    if not store_works:  # it is there until the disk is full; then the sender dies, and the next one finds nobody
        words[2] = words[2].replace(
            "for step in range(5, 900)", "os.kill(journal._sender.pid, 9)\nfor step in range(5, 900)"
        )
        words[2] = words[2].replace(
            "journal.finish(", "setattr(journal, 'tracking_uri', 'http://127.0.0.1:9') or journal.finish("
        )
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    facts = read_run(folder)
    assert (facts["state"], facts["reason"], facts["exit_status"]) == ("FINISHED", "", 0), done.stderr
    if not freed_after:  # a short wait is not announced
        assert "waiting for " in done.stderr and "Ctrl-C ends the wait" in done.stderr
    whole_lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last one may be cut off anywhere
    lines = [json.loads(line) for line in whole_lines.splitlines()]
    assert (lines[-1]["kind"] == "end") is bool(freed_after)
    if store_works:
        whole(folder, uri, 900)
    if freed_after:
        assert len([line for line in lines if line["kind"] == "metrics"]) == 900
        assert (result["hint"] == "") is store_works
    else:
        assert "could not be written to the disk" in result["hint"]
        assert ("; MLflow has them" if store_works else f"send the rest with: dtrain sync {folder}") in result["hint"]


@pytest.mark.timeout(600)
def test_the_wait_for_mlflow_at_the_end_is_said_and_ctrl_c_ends_it(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        file = place.config("no-answer", **{"trainer.max_epochs": 1, "mlflow.tracking_uri": uri})
        (running,) = place.start(file, mlflow=True)
        said = f"waiting for MLflow ({uri}), "
        wait_until(lambda: said in running.output().text)
        os.kill(running.pid, signal.SIGINT)
        result = running.result(200)
    assert result.rc == 0, result.text
    assert "Ctrl-C: MLflow is not waited for any longer" in result.text
    run = place.path("no-answer")
    assert f"Nothing is lost; send the rest with: dtrain sync {run}" in " ".join(result.text.split()), result.text
    assert read_run(run)["state"] == "FINISHED"


# --------------------------------------------------------------------------------------------------------------- sqlite


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB in memory, for a store."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SKIPPED, NOT TESTED HERE: mounting a tmpfs needs root ({done.stderr.strip()})")
    yield folder
    for mounted in (folder.with_name("read-only"), folder):
        if mounted.is_mount():
            subprocess.run(["umount", "-l", mounted], timeout=200, check=True)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True, timeout=200)


@pytest.mark.usefixtures("quiet_journal", "impatient")
def test_a_store_on_a_full_or_read_only_disk_gets_everything_later(tmp_path: Path, small_disk: Path) -> None:
    store = f"sqlite:///{small_disk}/mlflow.db"
    folder = write_run(tmp_path / "run", range(300), {"lr": 1}, status="KILLED")
    assert deliver(folder, store) == 0
    with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    write_run(folder, range(300, 4000))
    assert deliver(folder, store) == 1
    assert "full" in read_json(folder / "mlflow.json")["problem"]
    mount("-o", "remount,size=9m", small_disk)
    read_only = small_disk.with_name("read-only")
    read_only.mkdir()
    mount("--bind", small_disk, read_only)
    mount("-o", "remount,bind,ro", read_only)
    assert deliver(folder, f"sqlite:///{read_only}/mlflow.db") == 1
    assert "Read-only file system" in read_json(folder / "mlflow.json")["problem"]
    assert deliver(folder, store) == 0
    whole(folder, store, 4000)


@pytest.mark.usefixtures("quiet_journal", "impatient")
def test_a_store_that_is_locked_is_waited_for(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(300), {"lr": 1})
    lock = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(4, lambda: lock.execute("ROLLBACK"))
    release.start()
    try:
        assert deliver(folder, uri, patience_seconds=300) == 0
    finally:
        release.join()
        lock.close()
    whole(folder, uri, 300)


@pytest.mark.usefixtures("quiet_journal", "impatient")
def test_a_damaged_database_makes_no_row_a_bad_one(tmp_path: Path) -> None:
    """MLflow answers with the status that it has for bad values, too."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    folder = write_run(tmp_path / "run", range(10), {"lr": 1}, status="KILLED")
    assert deliver(folder, store) == 0
    database = tmp_path / "mlflow.db"
    kept = database.read_bytes()
    write_run(folder, range(10, 60))
    work = Delivery(folder, MlflowStore(store))
    work.draining = True
    run = work._open()
    work._run = run
    with database.open("r+b") as file:  # all but the first page, which names the tables
        file.seek(4096)
        file.write(os.urandom(len(kept) - 4096))
    for _ in range(3):
        work._run = run  # a look at it would fail before anything is written
        with pytest.raises(Exception, match=r"malformed|disk image|not a database"):
            work.step()
    database.write_bytes(kept)
    mended = f"sqlite:///{tmp_path}/./mlflow.db"  # mlflow, in this process, has the damaged pages in memory
    assert deliver(folder, mended) == 0
    whole(folder, mended, 60)


@pytest.mark.usefixtures("quiet_journal")
def test_a_database_that_can_be_read_only_for_a_while_makes_no_row_a_bad_one(tmp_path: Path, uri: str) -> None:
    """As after a change-over to a standby; MLflow says of that, too, what it says of bad values."""
    folder = write_run(tmp_path, range(10), {"lr": 1}, status=None)
    work = Delivery(folder, MlflowStore(uri))
    work.step()
    with (folder / "metrics.jsonl").open("a") as journal:
        for step in range(10, 60):
            journal.write(
                json.dumps({"kind": "metrics", "time": 1e9, "step": step, "values": {"train/loss": 1}}) + "\n"
            )
    database = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    changes = [f"{what} ON {table}" for what in ("INSERT", "UPDATE") for table in ("metrics", "tags", "latest_metrics")]
    for number, change in enumerate(changes):
        refusal = "SELECT RAISE(ABORT, 'cannot write in a read-only transaction')"
        database.execute(f"CREATE TRIGGER standby{number} BEFORE {change} BEGIN {refusal}; END")
    try:
        for _ in range(3):
            work._send_at = 0.0
            with pytest.raises(Exception, match="read-only"):
                work.step()
    finally:
        for number in range(len(changes)):
            database.execute(f"DROP TRIGGER standby{number}")
        database.close()
    update_run(folder, pid=GONE_PID)
    assert sender.main([str(folder), "--tracking-uri", uri]) == 0
    whole(folder, uri, 60, status="FAILED")


# --------------------------------------------------------------------------------------------------- kills and statuses


def killed_and_synced(folder: Path, store: str, chance: random.Random, with_sender: bool) -> tuple[int, int]:
    """Kills rank 0 at a random moment, has `dtrain sync` deliver; returns steps acknowledged and steps delivered."""
    script = """
import sys, time
from dtrain.tracking import start_sender
from dtrain.tracking.journal import Journal
if sys.argv[3] == "no":
    start_sender._sender_command = lambda *arguments: [sys.executable, "-c", ""]
journal = Journal(sys.argv[1], experiment="kills", run_name="r", tracking_uri=sys.argv[2])
journal.start({"lr": 1}, {}, world_size=1)
print(journal._sender.pid, flush=True)
for step in range(10**9):
    journal.log(step, {"train/loss": step, "x": float("nan")})
    print(step, flush=True)
    time.sleep(0.001)
"""
    words = [sys.executable, "-c", script, folder, store, "yes" if with_sender else "no"]
    rank0 = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert rank0.stdout is not None
    sender_pid = int(rank0.stdout.readline())
    killer = threading.Timer(chance.uniform(0, 6 if with_sender else 0.3), rank0.kill)
    killer.start()
    acknowledged = [int(line) for line in rank0.stdout if line.endswith("\n")]
    rank0.wait(200)
    rank0.stdout.close()
    if with_sender:
        os.kill(sender_pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{sender_pid}/cmdline").exists() or not _command_of(sender_pid))
    assert sender.main([str(folder)]) == 0
    assert run_of(folder, store).info.status == "FAILED" == read_run(folder)["state"]
    return (acknowledged or [-1])[-1] + 1, len(rows_of(folder, store, "train/loss"))


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_kill_at_a_random_step_loses_nothing_that_was_logged(tmp_path: Path, uri: str) -> None:
    chance = random.Random(SEED)
    for number in range(4):
        folder = tmp_path / str(number)
        acknowledged, delivered = killed_and_synced(folder, uri, chance, with_sender=number == 0)
        assert delivered >= acknowledged, f"seed {SEED}"
        assert [step for step, _, _ in rows_of(folder, uri, "train/loss")] == list(range(delivered))


def test_a_training_killed_with_its_sender_and_started_anew_ends_with_the_true_status(tmp_path: Path, uri: str) -> None:
    rank0 = Rank0(tmp_path, uri, seconds=60)
    wait_until(lambda: read_json(tmp_path / "mlflow.json").get("status") == "RUNNING")
    rank0.kill()
    assert read_run(tmp_path)["state"] == run_of(tmp_path, uri).info.status == "RUNNING", "nobody could say otherwise"
    first = read_run(tmp_path)["run_id"]
    again = Rank0(tmp_path, uri, seconds=1)
    assert again.result()["hint"] == ""
    assert read_run(tmp_path)["run_id"] == first and run_of(tmp_path, uri).info.status == "FINISHED"
    steps = [step for step, _, _ in rows_of(tmp_path, uri, "train/loss")]
    assert steps == list(range(len(steps)))


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("quiet_journal")
def test_a_run_left_open_is_closed_when_its_folder_is_moved_aside(place: Place) -> None:
    config = place.config("stale")
    store = f"sqlite:///{place.folder}/mlflow.db"
    update_run(write_run(place.path("stale"), range(9), status=None), tracking_uri=store)  # its sender is gone, too
    place.run(config, "trainer.resume=none", "trainer.max_epochs=1", mlflow=True)
    (aside,) = place.folder.glob("run-stale-*")
    wait_until(lambda: read_json(aside / "mlflow.json").get("status") == "FAILED")
    assert run_of(aside, store).info.status == read_run(aside)["state"] == "FAILED"
    assert run_of(place.path("stale"), store).info.status == "FINISHED"
    assert len(rows_of(aside, store, "train/loss")) == 9
    assert place.tagged.wait_gone(200)


@pytest.mark.usefixtures("quiet_journal")
def test_a_later_delivery_is_started_where_something_is_missing_only(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    old = write_run(tmp_path / "old", range(3))
    monkeypatch.setattr("dtrain.tracking.journal.start_sender", lambda folder, uri: started.append(folder))
    journal = Journal(tmp_path / "new", experiment="e", run_name="r", tracking_uri=uri)
    journal.deliver_later(tmp_path / "nothing there")
    journal.deliver_later(old)
    assert started == [old]
    assert deliver(old, uri) == 0
    journal.deliver_later(old)  # all is there
    update_run(old, state="KILLED", tracking_uri="postgresql://***@host/db")
    journal.deliver_later(old)  # nobody knows its password
    assert len(started) == 1


@pytest.mark.usefixtures("quiet_journal")
@pytest.mark.parametrize("hours", [0, 2])
def test_a_run_of_another_machine_is_closed_when_it_was_silent_for_long(
    tmp_path: Path, uri: str, hours: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, range(3), status=None)
    update_run(folder, host="node17")
    written = time.time() - 3600 * hours
    os.utime(folder / "metrics.jsonl", (written, written))
    assert sender.main([str(folder), "--tracking-uri", uri]) == 0
    assert run_of(folder, uri).info.status == read_run(folder)["state"] == ("FAILED" if hours else "RUNNING")
    is_reported = (
        f"its status is RUNNING: on node17, process {GONE_PID} may still be at work" in capsys.readouterr().out
    )
    assert is_reported is not bool(hours)


# -------------------------------------------------------------------------------------------------- params of any kind

TEXTS = st.text(max_size=30) | st.sampled_from(["a@b", "[0]", "a/../b", "/", "..", "x" * 300, "é", "\0", "\ud800", " "])
CONFIGS = st.dictionaries(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("z" * 20_000),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=6,
)
COUNTER = itertools.count()


def every_value_arrives(base: Path, store: str, config: dict[str, Any]) -> None:
    folder = base / f"config-{next(COUNTER)}"
    params = flatten(config)
    write_run(folder, params=params, experiment="configs")
    assert deliver(folder, store) == 0
    stored = run_of(folder, store).data.params
    assert len(stored) == len(params), "two keys became one"
    plain = {key: str(value) for key, value in params.items() if key.isascii() and key.isalnum() and len(key) <= 250}
    for key, text in plain.items():
        if text.isprintable() and "***" not in stored[key]:
            assert stored[key] == text[:6000]
    shutil.rmtree(folder)


SLOWLY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.usefixtures("quiet_journal")
@given(CONFIGS)
@example({f"k{n}": n for n in range(1500)})
@settings(max_examples=12, **SLOWLY)
def test_every_value_of_any_config_arrives(tmp_path_factory: pytest.TempPathFactory, uri: str, config: dict) -> None:
    every_value_arrives(tmp_path_factory.getbasetemp(), uri, config)


# ------------------------------------------------------------------------------------------------------------ the soak


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("quiet_journal")
@given(CONFIGS)
@settings(max_examples=1000, **SLOWLY)
def test_every_value_of_a_thousand_configs_arrives(
    tmp_path_factory: pytest.TempPathFactory, uri: str, config: dict
) -> None:
    every_value_arrives(tmp_path_factory.getbasetemp(), uri, config)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing(tmp_path: Path, uri: str) -> None:
    chance, good = random.Random(SEED), 0
    for number in range(100):
        acknowledged, delivered = killed_and_synced(tmp_path / str(number), uri, chance, with_sender=number % 10 == 0)
        good += delivered >= acknowledged
    print(f"killed at a random step, nothing lost: {good} of 100 (seed {SEED})")
    assert good == 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("quiet_journal")
def test_eight_first_starts_on_one_store_ten_times(tmp_path: Path) -> None:
    """In the first round eight whole senders, then processes that share one import of mlflow and start together.

    Every other store lies on another file system.
    """
    script = """
import os, sys
from pathlib import Path
from dtrain.tracking.delivery import Delivery, follow
from dtrain.tracking.mlflow_store import MlflowStore
import mlflow
from mlflow.store.tracking import sqlalchemy_store
children = []
for folder in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        os._exit(follow(Delivery(Path(folder), MlflowStore(sys.argv[1]))))
    children.append(pid)
print(sum(os.waitpid(pid, 0)[1] == 0 for pid in children))
"""
    good = 0
    for number in range(10):
        home = Path("/dev/shm") / f"dtrain-{os.getpid()}-{number}" if number % 2 else tmp_path / f"store-{number}"
        store = f"sqlite:///{home}/new/mlflow.db"
        folders = [write_run(tmp_path / f"{number}-{one}", range(30), {"lr": 1}) for one in range(8)]
        if number == 0:
            command = [sys.executable, "-m", "dtrain.tracking.sender", "--tracking-uri", store]
            senders = [subprocess.Popen([*command, folder], cwd=REPOSITORY) for folder in folders]
            assert [one.wait(600) for one in senders] == [0] * 8
        else:
            words = [sys.executable, "-c", script, store, *folders]
            done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
            assert done.stdout.strip() == "8", done.stderr
        for folder in folders:
            whole(folder, store, 30)
            good += 1
        shutil.rmtree(home)
    print(f"first starts on a store that is not there: {good} of 80")
    assert good == 80


TRAINING = """
import json, sys, time
import torch
from dtrain.tracking.journal import Journal
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
optimizer = torch.optim.AdamW(model.parameters())
journal = Journal(sys.argv[1], experiment="outage", run_name="r", tracking_uri=sys.argv[2])
journal.start({"lr": 1}, {}, world_size=1)
end, steps = time.monotonic() + float(sys.argv[3]), []
while time.monotonic() < end:
    began = time.perf_counter()
    loss = model(torch.randn(64, 512)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    between = time.perf_counter()
    journal.log(len(steps), {"train/loss": loss.detach(), **{f"m/{n}": n for n in range(20)}})
    done = time.perf_counter()
    steps.append([time.time(), done - began, done - between])
began = time.monotonic()
hint = journal.finish("FINISHED")
print(json.dumps({"steps": steps, "exit": time.monotonic() - began, "hint": hint}))
"""


def step_times(steps: list[list[float]], begin: float, end: float) -> str:
    """Median step and worst cost of logging in a span of time, in ms."""
    inside = sorted(step for at, step, _ in steps if begin <= at < end)
    worst = max((cost for at, _, cost in steps if begin <= at < end), default=0.0)
    return f"{1000 * inside[len(inside) // 2]:.2f} ms ({len(inside)} steps, worst log {1000 * worst:.2f} ms)"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_is_away_for_60_of_90_seconds(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    server = MlflowServer(tmp_path_factory.mktemp("outage"))
    folder = tmp_path / "run"
    words = [sys.executable, "-c", TRAINING, folder, server.uri, "90"]
    training = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: read_json(folder / "mlflow.json").get("offset"))
        time.sleep(max(0.0, read_run(folder)["started"] + 12 - time.time()))
        gone = time.time()
        server.kill() if how == "killed" else server.signal(signal.SIGSTOP)
        time.sleep(60)
        back = time.time()
        server.start() if how == "killed" else server.signal(signal.SIGCONT)
        result = json.loads(training.communicate(timeout=200)[0])
        steps = result["steps"]
        print(f"server {how} for 60 s: {len(steps)} steps; exit after {result['exit']:.1f} s; hint {result['hint']!r}")
        print(f"step with the server {step_times(steps, 0, gone)}, without {step_times(steps, gone, back)}")
        if result["hint"]:  # a slow machine: what is left goes with sync
            assert sender.main([str(folder)]) == 0
        whole(folder, server.store, len(steps))
        assert result["exit"] < 200
        print(f"lost: 0 of {21 * len(steps)} figures")
    finally:
        training.kill()
        server.signal(signal.SIGCONT)
        server.kill()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_never_returns_and_a_journal_of_ten_thousand_rows(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    """With the default limit of 25 seconds."""
    server = MlflowServer(tmp_path_factory.mktemp("never"))
    folder = tmp_path / "run"
    words = [sys.executable, "-c", TRAINING, folder, server.uri, "20"]
    training = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: read_run(folder).get("run_id"))
        server.kill() if how == "killed" else server.signal(signal.SIGSTOP)
        result = json.loads(training.communicate(timeout=200)[0])
        assert training.returncode == 0
        steps = len(result["steps"])
        print(f"server {how} for good: {21 * steps} figures; exit after {result['exit']:.1f} s; {result['hint']}")
        assert 21 * steps >= 10_000 and "dtrain sync" in result["hint"]
        server.start() if how == "killed" else server.signal(signal.SIGCONT)
        assert sender.main([str(folder)]) == 0
        whole(folder, server.store, steps)
        print(f"lost after sync: 0 of {21 * steps} figures")
        assert result["exit"] < 200
    finally:
        training.kill()
        server.signal(signal.SIGCONT)
        server.kill()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("quiet_journal", "impatient")
def test_a_store_locked_for_longer_than_sqlite_waits(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(300), {"lr": 1})
    lock = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert deliver(folder, uri) == 1
    assert "locked" in read_json(folder / "mlflow.json")["problem"]
    lock.execute("ROLLBACK")
    lock.close()
    assert deliver(folder, uri) == 0
    whole(folder, uri, 300)


ENDINGS = [
    ("", [0, 0], "FINISHED"),
    *((f"train 3 rank {rank} {name}", [75, 75], "KILLED") for name in ("TERM", "INT", "USR1", "USR2") for rank in "01"),
    *((f"train 3 rank {rank} {name}", None, "FAILED") for name in ("raise", "KILL", "SEGV", "ABRT") for rank in "01"),
    ("eval 1 rank 0 raise", None, "FAILED"),
    ("eval 1 rank 0 TERM", [75, 75], "KILLED"),
    ("eval 1 rank 1 TERM", [0, 0], "FINISHED"),  # in its only batch, the last one of all: nothing is left to stop
]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("do", "codes", "status"), ENDINGS)
def test_every_ending_has_its_status(
    do: str, codes: list[int] | None, status: str, place: Place, tagged: Tagged
) -> None:
    name = "ending-" + (do.replace(" ", "-") or "none")
    config = place.config(name, **{"trainer.max_epochs": 1, "loaders.train.size": 40, "experiment": "endings"})
    results = [running.result(400) for running in place.start(config, ranks=2, do=do, mlflow=True)]
    assert place.tagged.wait_gone(200)
    found = [result.rc for result in results]
    assert found == codes if codes else 0 not in found, "".join(result.text for result in results)
    facts = read_run(place.path(name))
    run = run_of(place.path(name), f"sqlite:///{place.folder}/mlflow.db")
    assert (facts["state"], run.info.status) == (status, status)
    assert status == "FINISHED" or facts["reason"]
