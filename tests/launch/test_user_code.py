"""What a user's code does to the process that it runs in, and what becomes of the training."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import Running
from whole_runs import Place, figures

from dtrain.tracking.run_folder import read_run

pytestmark = pytest.mark.timeout(600)

CODE = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from toy import MLP, Points


def sleep():
    time.sleep(600)


class Asks(Points):
    def __getitem__(self, index):
        if index == 7:
            raise KeyboardInterrupt
        return super().__getitem__(index)


class Leaves(Points):
    def __getitem__(self, index):
        sys.exit(0) if index == 7 else None
        return super().__getitem__(index)


class Born(Points):
    def __init__(self, size, noise=0.0):
        raise KeyboardInterrupt


class Deaf(Points):
    def __getitem__(self, index):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        time.sleep(0.01)
        return super().__getitem__(index)


class Parent(Points):
    children = []

    def __getitem__(self, index):
        if not self.children:
            shell = subprocess.Popen(["sh", "-c", "sleep 600; true"])
            stubborn = subprocess.Popen([sys.executable, "-c", "import signal, time; "
                "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
            apart = subprocess.Popen(["sleep", "600"], start_new_session=True)
            forked = multiprocessing.get_context("fork").Process(target=sleep)
            forked.start()
            self.children += [shell, stubborn, forked, apart]
            Path(os.environ["CHILDREN"]).write_text(" ".join(str(child.pid) for child in self.children))
            time.sleep(1.0)
        return super().__getitem__(index)
"""


def config(place: Place, name: str, dataset: str, **changes: object) -> str:
    place.write("user_code.py", CODE)
    named = {"modules": ["user_code", "toy"], "loaders.train.name": dataset, **changes}
    return place.config(name, **named)


@pytest.mark.parametrize(("dataset", "workers"), [("Asks", 0), ("Asks", 1), ("Leaves", 1), ("Born", 0)])
def test_a_keyboard_interrupt_that_code_raises_is_a_failure_with_its_traceback(
    place: Place, dataset: str, workers: int
) -> None:
    """In a worker, as an error: torch's own loop ends there without saying so, at SystemExit, too."""
    name, error = f"raises-{dataset}-{workers}", "SystemExit" if dataset == "Leaves" else "KeyboardInterrupt"
    result = place.run(config(place, name, dataset, **{"loaders.num_workers": workers}), expect=1)
    assert "user_code.py" in result.stderr and error in result.stderr, result.text
    if dataset != "Born":  # there was no run then
        facts = read_run(place.path(name))
        assert (facts["state"], facts["exit_status"]) == ("FAILED", 1) and error in facts["reason"]
        card = json.loads((place.path(name) / "failure.json").read_text())
        assert card["error"] == ("RuntimeError" if workers else error) and "user_code.py" in card["traceback"]


def test_code_that_ignores_a_signal_does_not_keep_the_training_from_stopping(place: Place) -> None:
    file = config(place, "deaf", "Deaf", **{"trainer.max_epochs": 10000})
    (running,) = place.start(file)
    run = place.path("deaf")
    end = time.monotonic() + 250
    while not (run / "metrics.jsonl").exists() or len(figures(run).get("train/loss", ())) < 3:
        assert running.process.poll() is None and time.monotonic() < end, running.output().text
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)  # once: it is heard while a sample is loaded that would have it ignored, too
    result = running.result(200)
    assert result.rc == 75 and read_run(run)["reason"] == "signal SIGTERM", result.text
    lines = [line for line in result.text.splitlines() if "warning: SIG" in line]
    assert len([line for line in lines if "SIGTERM was ignored by the training's code" in line]) == 1, result.text
    assert len([line for line in lines if "SIGUSR1 goes to Deaf.__getitem__.<locals>.<lambda> of" in line]) == 1


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", ["alone", "launched", "killed"])
def test_what_code_starts_and_leaves_ends_with_the_training(place: Place, tmp_path: Path, how: str) -> None:
    do = "train 3 rank 0 KILL" if how == "killed" else ""
    file = config(place, f"left-{how}", "Parent", **{"trainer.max_epochs": 1})
    words = [file] if how == "alone" else ["launch", file, "--nproc-per-node", "1"]
    running: Running = place.start(*words, do=do, env={"CHILDREN": str(tmp_path / "children")})[0]
    result = running.result(200)
    *children, apart = map(int, (tmp_path / "children").read_text().split())
    try:
        assert result.rc == (1 if how == "killed" else 0), result.text
        assert not [pid for pid in children if lives(pid)], result.text
        assert lives(apart), "a session of its own says that it is meant to live on"
        assert result.text.count("ended what the training's code had started and left running: ") == 1, result.text
    finally:
        for pid in (*children, apart):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
