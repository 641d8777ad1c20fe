"""Trials at work: several at once, each a launch of its own, with GPUs of its own; stopped, pruned and waited for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dtrain.distributed.environment import cores
from dtrain.distributed.exit_status import DONE, STOPPED_EARLY
from dtrain.distributed.process import end_with
from dtrain.distributed.stop_request import stop_signals
from dtrain.launch.gpu_locks import GpuLocks, Taken
from dtrain.launch.trial import Trial
from dtrain.tracking.run_folder import read_run, update_run

LOOK_SECONDS = 0.2


class Source(Protocol):
    """Where trials come from, and who is told what becomes of them: a grid, or a study of Optuna's."""

    figure: str

    @property
    def total(self) -> int:
        """How many trials there are to be."""

    @property
    def done(self) -> int:
        """How many of them have ended, other than stopped early."""

    def next(self) -> Trial | None:
        """The next one to be trained; None: there is none left."""

    def is_behind(self, trial: Trial) -> str:
        """Why a trial that is running is to be pruned; '' where it is not."""

    def ended(self, trial: Trial) -> None:
        """It has the status with which it ended."""


@dataclass
class Settings:
    """How trials are started."""

    ranks: str | None  # as --nproc-per-node; None: one process each
    jobs: int  # at once
    gpus_each: int = 0
    gpus: GpuLocks | None = None
    logs: Path | None = None  # for a file of each trial's output; None: they write to the console
    overrides: Sequence[str] = ()  # of all, beside their own


@dataclass
class _Process:
    trial: Trial
    process: Any
    taken: Taken | None
    pruned: str = field(default="")  # why


def command_of(path: str, trial: Trial, ranks: str | None, overrides: Sequence[str] = ()) -> list[str]:
    """The arguments of dtrain with which a trial is trained."""
    command = ["launch", "--nproc-per-node", ranks] if ranks else ["train"]
    return [command[0], path, *command[1:], *trial.overrides, *overrides]


class TrialsAtWork:
    """Starts trials, so many at once. A request to stop is passed on to all of them: each saves, and then ends."""

    def __init__(self, path: str, settings: Settings) -> None:
        self.is_stopped = False  # asked to stop, or one trial was: no other is started
        self._path, self._settings = path, settings
        self._at_work: list[_Process] = []
        for number in stop_signals():
            signal.signal(number, self._pass_on)

    def run(self, source: Source) -> Iterator[Trial]:
        """Trains what the source has, until it has no more or somebody asks to stop; yields each trial as it ends."""
        has_more = True
        while True:
            for each in [*self._at_work]:
                if (status := each.process.poll()) is not None:
                    yield self._end(each, status, source)
                elif not each.pruned and (why := source.is_behind(each.trial)):
                    each.pruned = why
                    each.process.send_signal(signal.SIGTERM)
            while has_more and not self.is_stopped and len(self._at_work) < self._settings.jobs:
                if (taken := self._take()) is None:
                    break
                trial = source.next()
                has_more = trial is not None
                if trial is None:
                    taken.release()
                else:
                    self._start(trial, taken)
            if not self._at_work and (self.is_stopped or not has_more):
                return
            time.sleep(LOOK_SECONDS)

    def _take(self) -> Taken | None:
        """The GPUs of one trial; None where it has to wait for them."""
        gpus = self._settings.gpus
        return gpus.take(self._settings.gpus_each) if gpus else Taken([], [])

    def _start(self, trial: Trial, taken: Taken) -> None:
        on = f" (GPU {', '.join(taken.gpus)})" if taken.gpus else ""
        print(f"sweep: {trial.name}: starts{on}", flush=True)
        trial.status = "running"
        arguments = command_of(self._path, trial, self._settings.ranks, self._settings.overrides)
        process = start(arguments, self._environment(taken), self._log(trial), taken.descriptors)
        self._at_work.append(_Process(trial, process, taken))
        if self.is_stopped:  # asked meanwhile
            process.send_signal(signal.SIGTERM)

    def _environment(self, taken: Taken) -> Mapping[str, str]:
        changes = {}
        if taken.gpus:
            changes["CUDA_VISIBLE_DEVICES"] = ",".join(taken.gpus)
        elif self._settings.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # else each takes all cores
            changes["OMP_NUM_THREADS"] = str(max(1, cores() // self._settings.jobs))
        return {**os.environ, **changes}

    def _log(self, trial: Trial) -> Path | None:
        return self._settings.logs / f"{trial.name}.log" if self._settings.logs else None

    def _end(self, each: _Process, status: int, source: Source) -> Trial:
        self._at_work.remove(each)
        if each.taken:
            each.taken.release()
        trial, status = each.trial, status if status >= 0 else 128 - status
        if status == DONE:
            trial.status = "finished"
        elif each.pruned and status in (STOPPED_EARLY, 128 + signal.SIGTERM):  # the latter before dtrain listened
            trial.status = "pruned"
            update_run(trial.folder, reason=each.pruned)
        elif status == STOPPED_EARLY or self.is_stopped:
            trial.status, self.is_stopped = "stopped early", True
        else:
            trial.status = f"failed ({status})"
        trial.score = trial.best_score
        source.ended(trial)
        score = "" if trial.score is None else f", {source.figure} {trial.score:.4g}"
        why = f": {reason}" if trial.status.startswith("failed") and (reason := _reason(trial)) else ""
        where = f"; see {log}" if trial.status.startswith("failed") and (log := self._log(trial)) else ""
        became = each.pruned if trial.status == "pruned" else trial.status
        print(f"sweep: {trial.name}: {became}{why}{score}{where} ({source.done} of {source.total})", flush=True)
        return trial

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.is_stopped = True
        for each in self._at_work:
            if each.process.poll() is None:
                each.process.send_signal(number)


def _reason(trial: Trial) -> str:
    """Why its training has failed, in one line, as far as it came to say so."""
    facts = read_run(trial.folder)
    return str(facts.get("reason") or "") if facts.get("state") == "FAILED" else ""


def start(arguments: Sequence[str], env: Mapping[str, str], log: Path | None, descriptors: Sequence[int]) -> Any:
    """`dtrain ARGUMENTS` as a process that ends with this one, and in a group of its own: a Ctrl-C reaches it once."""
    parent = os.getpid()
    command = [sys.executable, "-m", "dtrain", *arguments]
    options: dict[str, Any] = dict(env=env, process_group=0, preexec_fn=lambda: end_with(parent), pass_fds=descriptors)
    if log is None:
        return subprocess.Popen(command, **options)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **options)
