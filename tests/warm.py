"""Ranks of real trainings, forked from one process that has imported everything: hundreds of them in minutes.

A rank runs the real command line, as a process of its own that may be killed. Tests start `python warm.py FOLDER SEED
'ROLE COUNT' ...`, where a role is a function below; the reports are printed as JSON on the last line.
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from conftest import neutral_env
from whole_runs import EXACT as ALL_OF_IT
from whole_runs import NO_MLFLOW, TOY, equal, figures, last, worlds_of, write_config

from dtrain.config.check import check
from dtrain.config.load import load_config

CHANGES = {
    **ALL_OF_IT, "trainer.pictures": False, "trainer.log_every_steps": 1, "trainer.validate_every_steps": 3,
    "trainer.checkpoint_every_steps": 1,
}  # fmt: skip

TOGETHER_SECONDS = 60.0  # so long any end may take; the promises are shorter, and counted


class Ranks:
    """The ranks of one training; started at once."""

    def __init__(self, config: str, ranks: int, do: str = "", load: str = "") -> None:
        self.config, self.folder = config, Path(config).parent / f"run-{Path(config).stem}"
        self.status: dict[int, int] = {}
        env = {"TOY_DO": do, "TOY_LOAD": load}
        self.pids = [self._fork({**env, **world}) for world in (worlds_of(ranks) if ranks > 1 else [{}])]

    def _fork(self, env: Mapping[str, str]) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            os.setsid()
            os.environ.update(env)
            self.begin_rank()
            os.chdir(Path(self.config).parent)
            log = os.open(f"{self.config}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from dtrain.cli import main

            status = main(["train", self.config])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def begin_rank(self) -> None:
        """What a rank does first."""

    def look(self) -> list[int]:
        """The ranks that live; the status of those that ended is noted."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.status:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.status[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.status]

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether all ended, or what is waited for came, in time."""
        end = time.monotonic() + seconds
        while self.look() and not until() and time.monotonic() < end:
            time.sleep(0.005)
        return until() or not self.look()

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            if rank not in self.status:
                os.kill(self.pids[rank], number)

    def end(self) -> list[int]:
        """Wait for the end, by force where it does not come; the statuses by rank."""
        if not self.wait(TOGETHER_SECONDS):
            self.send(signal.SIGKILL, *self.look())
            self.wait(5)
            return []
        return [self.status[rank] for rank in range(len(self.pids))]

    @property
    def has_begun(self) -> bool:
        return (self.folder / "metrics.jsonl").exists()

    @property
    def log(self) -> str:
        path = Path(f"{self.config}.log")
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def left_behind(seconds: float) -> list[str]:
    """Processes that this one's children left, after some time for them to go: workers, senders, ranks."""
    tag = os.environ["WARM_TAG"]
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.pid != os.getpid() and process.environ().get("WARM_TAG") == tag
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


class Whole(NamedTuple):
    """A training of two ranks that nobody disturbed, and how long it took."""

    folder: Path
    start_seconds: float  # to its first sign of life
    seconds: float  # from there to its end


def uninterrupted(folder: Path) -> Whole:
    """Train once for warmth, then once for the clock."""
    config = write_config(folder, "whole", CHANGES)
    check(load_config(config))  # what it has read of the sources is there in all that are forked
    gc.collect()
    gc.freeze()
    Ranks(config, 2).end()
    shutil.rmtree(folder / "run-whole")
    began = time.monotonic()
    training = Ranks(config, 2)
    assert training.wait(TOGETHER_SECONDS, lambda: training.has_begun), training.log
    begun = time.monotonic()
    assert training.end() == [0, 0], training.log
    return Whole(training.folder, begun - began, time.monotonic() - begun)


def differences(one: Path, other: Path) -> list[str]:
    """How two trainings ended differently, in weights, averages, optimizer, counters, generators or figures."""
    first, second = last(one), last(other)
    found = [] if equal(first.weights, second.weights) else ["weights"]
    found += [] if equal(first.ema, second.ema) else ["ema"]
    found += [key for key in first.state if not equal(first.state[key], second.state[key])]
    return found + ([] if figures(one) == figures(other) else ["figures"])


def kills_and_resumes(whole: Whole, seed: int, count: int) -> dict[str, Any]:
    """Both of two ranks or one killed at a random moment; then the same command again: bit for bit the same."""
    chance, failures, steps = random.Random(seed), [], []
    number = 0
    while len(steps) < count:
        number += 1
        training = Ranks(write_config(whole.folder.parent, f"pair-{number}", CHANGES), 2)
        training.wait(TOGETHER_SECONDS, lambda training=training: training.has_begun)
        time.sleep(chance.uniform(0, whole.seconds))
        victims = chance.choice([[0], [1], [0, 1]])
        training.send(signal.SIGKILL, *[rank for rank in training.look() if rank in victims])
        if -signal.SIGKILL in training.end():  # else it had ended before
            saved = [int(path.name[5:]) for path in training.folder.glob("checkpoints/step-*")]
            steps.append(max(saved, default=0))
            failures += [
                f"{number}: {victims} at step {steps[-1]}: {wrong}" for wrong in _wrong_with_rest(training, whole)
            ]
        shutil.rmtree(training.folder, ignore_errors=True)
    return {"seed": seed, "pairs": len(steps), "steps": sorted(steps), "failures": failures, "left": left_behind(10)}


def stops(whole: Whole, seed: int, count: int) -> dict[str, Any]:
    """A request to stop at a random moment, start-up to end, to all ranks or (once they train) to one alone."""
    chance, failures = random.Random(seed), []
    kinds: dict[str, int] = {}
    slowest, number = 0.0, 0
    while sum(kinds.values()) < count:
        number += 1
        training = Ranks(write_config(whole.folder.parent, f"stop-{number}", CHANGES), 2)
        sign = chance.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
        ranks = chance.choice([[0], [1], [0, 1]])
        if number % 4 == 0:
            training.wait(chance.uniform(0, whole.start_seconds))
            ranks = [0, 1]  # the other one would wait for its launcher
        else:
            training.wait(TOGETHER_SECONDS, lambda training=training: training.has_begun)
            training.wait(chance.uniform(0, whole.seconds))
        training.look()
        training.send(sign, *ranks)
        asked = time.monotonic()
        status = training.end()
        if status != [0, 0]:  # else its last step was done
            slowest = max(slowest, time.monotonic() - asked)
            where = f"{number}: {sign.name} to {ranks}, {status}"
            wrong = [*_wrong_with_stop(training, status, kinds), *_wrong_with_rest(training, whole)]
            failures += [f"{where}: {each}" for each in wrong]
        shutil.rmtree(training.folder, ignore_errors=True)
    return {
        "seed": seed, "stops": sum(kinds.values()), "kinds": kinds, "slowest_seconds": round(slowest, 1),
        "failures": failures, "left": left_behind(10),
    }  # fmt: skip


def _wrong_with_rest(training: Ranks, whole: Whole) -> list[str]:
    """What the same command, given again, makes otherwise than the training that nobody disturbed."""
    again = Ranks(training.config, 2)
    if again.end() != [0, 0]:
        return [f"the resumed ended with {again.status}: {again.log}"]
    found = differences(training.folder, whole.folder)
    return [f"{found} differ"] if found else []


def _wrong_with_stop(training: Ranks, status: list[int], kinds: dict[str, int]) -> list[str]:
    """What a stopped training should have left, and has not; counts what kind of stop it was."""
    facts_file = training.folder / "run.json"
    if not facts_file.exists():
        kinds["start-up"] = kinds.get("start-up", 0) + 1
        return [] if set(status) <= {75, 130} else [f"ended with {status}: {training.log}"]
    facts = json.loads(facts_file.read_text())
    step = last(training.folder).state["step"] if (training.folder / "checkpoints" / "last").exists() else 0
    logged = max(figures(training.folder).get("train/loss", {0: 0.0}))
    kinds[f"step {step}"] = kinds.get(f"step {step}", 0) + 1
    wrong = [] if status == [75, 75] else [f"ended with {status}: {training.log}"]
    wrong += [] if facts["state"] == "KILLED" else [f"is {facts['state']}: {facts['reason']}"]
    return wrong + ([] if step == logged else [f"step {logged} was done, step {step} is saved"])


def rank_kills(whole: Whole, seed: int, count: int) -> dict[str, Any]:
    """One of two ranks killed at a random moment of training, validation or saving: all else must be gone in 10 s."""
    chance, failures, took = random.Random(seed), [], []
    number = 0
    while len(took) < count:
        number += 1
        training = Ranks(write_config(whole.folder.parent, f"kill-{number}", CHANGES), 2)
        training.wait(TOGETHER_SECONDS, lambda training=training: training.has_begun)
        time.sleep(chance.uniform(0, whole.seconds))
        victim = chance.choice([0, 1])
        training.look()
        training.send(signal.SIGKILL, victim)
        began = time.monotonic()
        if -signal.SIGKILL in (status := training.end()):
            rest = left_behind(max(0.0, began + 10 - time.monotonic()))
            took.append(time.monotonic() - began)
            other = status[1 - victim]
            wrong = [f"left behind: {line}" for line in rest] + ([] if other in (0, 1) else [f"ended with {other}"])
            if victim == 1 and other == 1:
                named = json.loads((training.folder / "failure.json").read_text())
                wrong += [] if named["silent_ranks"] == [1] else [f"not named: {named}"]
            failures += [f"{number}: rank {victim} was killed: {each}" for each in wrong]
        elif not status:
            failures.append(f"{number}: rank {victim} was killed, the other went on: {training.log}")
        shutil.rmtree(training.folder, ignore_errors=True)
    return {"seed": seed, "kills": len(took), "slowest_seconds": round(max(took), 1), "failures": failures}


def in_warm_process(folder: Path, timeout_seconds: float, program: str = __file__, **counts: int) -> dict[str, Any]:
    """Do each of a program's roles so many times, in a fresh interpreter; their reports, without a failure in any."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    shutil.copy(TOY, folder)
    stub = folder / "stubs" / "mlflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(NO_MLFLOW)
    tests = Path(__file__).parent
    env = {
        **neutral_env(), "WARM_TAG": f"{os.getpid()}-{seed}",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), str(folder / "stubs"), str(folder)]),
    }  # fmt: skip
    command = [sys.executable, program, str(folder), str(seed), *(f"{role} {count}" for role, count in counts.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, env=env, cwd=folder)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    reports = json.loads(done.stdout.splitlines()[-1])
    assert not [failure for report in reports.values() for failure in report["failures"] + report.get("left", [])]
    return reports


def import_all() -> None:
    """What ranks would import."""
    import toy  # noqa: F401

    import dtrain.launch.rank  # noqa: F401
    from dtrain.tracking import start_sender as tracking

    # What MLflow is told is tested elsewhere, and a sender costs more than the training.
    tracking._sender_command = lambda *arguments: [sys.executable, "-c", ""]


if __name__ == "__main__":
    import_all()
    folder, seed, *wishes = sys.argv[1:]
    undisturbed = uninterrupted(Path(folder))
    report = {role: globals()[role](undisturbed, int(seed), int(count)) for role, count in map(str.split, wishes)}
    print(json.dumps(report))
