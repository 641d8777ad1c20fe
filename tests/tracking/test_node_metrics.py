"""Figures of the machines of a run: of rank 0's, and of each other one by a process there."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Running
from whole_runs import Place, forked_from, worlds_of

from dtrain.tracking.system_metrics import SystemMetrics


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Monitor:
    """MLflow's, as far as it is used."""

    sampling_interval, samples_before_logging, node_id = 10, 1, None
    monitors: tuple[Any, ...] = ()

    def collect_metrics(self) -> None:
        pass

    def aggregate_metrics(self) -> dict[str, float]:
        return {"cpu": 5}


def test_other_machines_figures_are_sent_once_with_their_own_time_and_those_of_earlier_starts_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "system").mkdir()
    lines = [json.dumps({"time": at, "values": {"cpu": at / 10}}) for at in (90.0, 120.0, 131.0)]
    (tmp_path / "system" / "node2.jsonl").write_text("\n".join(lines)[:-1])  # the last is being written
    metrics = SystemMetrics(Monitor(), 100.0, tmp_path, 100.0)
    metrics.sample()
    others = [row for row in metrics.waiting if row[0] != "system/cpu"]
    assert others == [("system/node2/cpu", 12.0, 120_000, 2)]
    assert len(metrics.waiting) == 2
    lines.insert(3, lines[0][:9] + lines[1])  # a disk was full, and then not
    (tmp_path / "system" / "node2.jsonl").write_text("\n".join(lines) + "\n")
    metrics._due_at = 0.0
    metrics.sample()
    assert [row for row in metrics.waiting if row[0] != "system/cpu"] == [
        *others,
        ("system/node2/cpu", 13.1, 131_000, 3),
    ]


@pytest.mark.slow
def test_a_machine_is_sampled_until_its_rank_has_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtrain.tracking.node_metrics", str(tmp_path), "node/7"]
    environment = {**os.environ, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        path = tmp_path / "system" / "node_7.jsonl"
        until(lambda: path.exists() and path.read_text().count("\n") >= 2)
        process.stdin.close()  # type: ignore[union-attr]  # as the system does where the rank is killed
        assert process.wait(200) == 0
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    assert second["time"] > first["time"]
    assert 0 <= first["values"]["cpu_utilization_percentage"] <= 100


@pytest.mark.soak
def test_mlflow_shows_both_machines_of_a_training(place: Place) -> None:
    changes = {"mlflow.system_metrics": True, "trainer.max_epochs": 100_000, "trainer.log_every_steps": 100}
    file, started = place.config("two-machines", **changes), []
    for rank, world in enumerate(worlds_of(2)):
        files = place.folder / "output" / f"{file}-{rank}"
        files.mkdir(parents=True)
        node = {"SLURMD_NODENAME": f"machine{rank}", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
        node |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
        command, full = ["python", "-m", "dtrain", file], {**place.env, **world, **node}
        started.append(Running(command, place.folder, full, files, place.tagged, forked_from()))

    def keys() -> set[str]:
        with closing(sqlite3.connect(place.folder / "mlflow.db")) as store:
            try:
                return {key for (key,) in store.execute("SELECT DISTINCT key FROM metrics")}
            except sqlite3.OperationalError:  # it is being made
                return set()

    until(lambda: "system/machine1/cpu_utilization_percentage" in keys())
    assert "system/cpu_utilization_percentage" in keys()
    assert not any(key.startswith("system/machine0/") for key in keys())
    os.kill(started[0].pid, signal.SIGTERM)
    assert [each.result(200).rc for each in started] == [75, 75]
