"""dtrain doctor: what it looks at, what it says of real faults, and that it leaves nothing behind."""

import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Tagged
from test_sender import client_settings, uri  # noqa: F401  fixtures
from whole_runs import worlds_of

from dtrain import sender
from dtrain.doctor import Finding, _as_text, _merged, disk, fabric, files, in_time, store

# A clock that is off on rank 1, from the start of its Python on.
WRONG_CLOCK = """
import os, time
true_time = time.time
if os.environ.get("SLURM_PROCID") == "1":
    time.time = lambda: true_time() + 90
"""


def doctor(arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dtrain", "doctor", *arguments],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sound_machine_is_found_so_and_nothing_is_left(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path
) -> None:
    out, err = doctor(["--json"], clean_env, tmp_path).communicate(timeout=200)
    told = json.loads(out)
    probes = ["versions", "gpus", "nccl", "fabric", "disk", "files", "shared memory", "all-reduce", "mlflow"]
    assert [one["probe"] for one in told["findings"]] == probes
    status = {one["probe"]: one["status"] for one in told["findings"]}
    assert {status[probe] for probe in ("versions", "gpus", "nccl", "all-reduce", "mlflow")} == {"ok"}, err
    assert told["ok"] == all(one["status"] != "fail" for one in told["findings"])
    (reduced,) = [one["found"] for one in told["findings"] if one["probe"] == "all-reduce"]
    assert "2 ranks, gloo" in reduced and "GB/s" in reduced
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_fails_is_told_with_its_cure(clean_env: dict[str, str], tagged: Tagged, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("trainer: {checkpoint_dir: /proc/runs}\nmlflow: {tracking_uri: 'http://127.0.0.1:9'}\n")
    process = doctor([str(config)], clean_env, tmp_path)
    out, _ = process.communicate(timeout=200)
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert lines["disk"].startswith("fail") and "choose another trainer.checkpoint_dir" in lines["disk"]
    assert lines["mlflow"].startswith("fail") and "Connection refused" in lines["mlflow"]
    assert "dtrain sync RUN_FOLDER" in lines["mlflow"]
    assert process.returncode == 1


@pytest.mark.slow
def test_under_srun_all_nodes_are_looked_at_and_their_clocks_compared(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path
) -> None:
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(WRONG_CLOCK)
    path = os.pathsep.join(filter(None, [str(tmp_path / "clock"), os.environ.get("PYTHONPATH")]))
    master = {key: value for key, value in worlds_of(2)[0].items() if key.startswith("MASTER_")}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    env = {**clean_env, **master, **step, "PYTHONPATH": path}
    ranks = [doctor([], {**env, "SLURM_PROCID": rank, "SLURM_NODEID": rank}, tmp_path) for rank in "01"]
    said = [rank.communicate(timeout=250) for rank in ranks]
    lines = {line.split()[1]: line for line in said[0][0].splitlines()}
    assert lines["clocks"].startswith("fail"), said
    found = re.search(r"of 2 nodes rank 1's is farthest, \+([\d.]+) s \(to ([\d.]+) s\)", lines["clocks"])
    assert found, said
    assert abs(float(found[1]) - 90) <= float(found[2]) + 0.001, said  # to so much it says that it knows
    assert "of 2 nodes)" in lines["disk"]
    assert "2 ranks, gloo" in lines["all-reduce"]
    assert said[1][0] == ""
    assert [rank.returncode for rank in ranks] == [1, 1]


def test_a_probe_that_hangs_or_breaks_is_a_finding() -> None:
    never = threading.Event()

    def broken() -> Finding:
        raise OSError("stale file handle")

    found = in_time({"stuck": lambda: never.wait() and Finding("stuck", "ok", ""), "broken": broken}, 0.2)
    never.set()
    assert [(one.probe, one.status) for one in found] == [("stuck", "fail"), ("broken", "fail")]
    assert "no answer" in found[0].found
    assert "stale file handle" in found[1].found


def test_a_full_disk_fails(mounted: Callable[[str], Path]) -> None:
    found = disk(mounted("size=2m") / "runs" / "mine")
    assert (found.status, found.cure) == ("fail", "choose another trainer.checkpoint_dir")
    assert "No space left" in found.found


def test_few_open_files_are_told_with_the_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        found, of_many_ranks = files(), files(8000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.status, of_many_ranks.status) == ("warn", "fail")
    assert "ulimit -n" in found.cure


def test_an_interface_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    found = fabric()
    assert found.status == "fail"
    assert "GLOO_SOCKET_IFNAME is ib7" in found.found
    assert "lo" in found.cure


def test_a_database_is_asked_without_being_changed(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    assert store(f"sqlite:///{file}", "mine").status == "ok"
    assert not file.exists()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE experiments (id)")
    connection.close()
    before = file.read_bytes()
    assert store(f"sqlite:///{file}", "mine").status == "ok"
    assert file.read_bytes() == before
    file.write_text("this is no database " * 100)
    assert "not a database" in store(f"sqlite:///{file}", "mine").found


@pytest.mark.slow
def test_mlflow_is_written_to_and_left_as_it_was(uri: str) -> None:  # noqa: F811
    client = sender.connect(uri)
    client.create_experiment("mine")
    before = {one.name: one.tags for one in client.search_experiments()}
    assert sender.probe("mine", uri) == {"experiment": "mine"}
    assert {one.name: one.tags for one in client.search_experiments()} == before


def test_the_worst_node_speaks_for_all() -> None:
    good, bad = Finding("disk", "ok", "90 MB/s"), Finding("disk", "warn", "3 MB/s", "choose another")
    (found,) = _merged([("node1", [good]), ("node2", [bad]), ("node3", [good])])
    assert _as_text([found], as_json=False) == ["warn  disk  3 MB/s (node2; 1 of 3 nodes); choose another"]
