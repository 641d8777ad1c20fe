"""What a batch script runs: its step, told when to stop; puts the job back if that leads on. Knows no config, no torch.

    exec python -m dtrain.launch.job --run-folder runs/digits --requeue "scontrol requeue $SLURM_JOB_ID" -- srun ...

A training that was asked to stop has saved and ends with 75; this process, the one that a batch system warns, then has
the job start again. Whatever else ends a training is no reason to: a mistake in the config or a crash would only come
again. Nor is a job that was cancelled, one whose starts reach no step, or one that the batch system itself puts back.
"""

import argparse
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dtrain.distributed.environment import job_ends_at
from dtrain.distributed.exit_status import STOPPED_EARLY
from dtrain.distributed.process import run_to_end
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json, write_json

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IDLE_STARTS = 3  # so many starts in a row without a new checkpoint, and the next one will not make one either
NEAR_END_SECONDS = 600.0  # a stop so near to the end of the job's time is its time limit
ALIVE = {"JobState=RUNNING", "JobState=SIGNALING", "JobState=RESIZING"}  # as scontrol tells a job that goes on
TRIES, PAUSE_SECONDS = 5, 3.0  # a controller that restarts answers again after a while


class Step:
    """The command at work. A warning is passed on as SIGUSR1, the one signal that srun hands on and survives."""

    def __init__(self) -> None:
        self.warnings: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        for number in WARNINGS:
            signal.signal(number, self._warn)

    def _warn(self, number: int, _frame: FrameType | None) -> None:
        self.warnings.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGUSR1)

    def run(self, command: Sequence[str]) -> int:
        """Its exit status. A warning may have come before Python could take it: no accident either."""
        if self.warnings:  # while the batch system was asked: nothing has begun
            return STOPPED_EARLY
        # Its standard input is nobody's: srun would read the batch script's.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if self.warnings:
            self._pass_on()
        status = self._process.wait()
        status = 128 - status if status < 0 else status
        return STOPPED_EARLY if self.warnings and status == 128 + signal.SIGUSR1 else status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the job's exit status: the training's, or 1 where to start again would lead nowhere."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launch.job", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run-folder", required=True, type=Path, help="what trainer.checkpoint_dir says")
    parser.add_argument("--requeue", default="", help="puts the job back, where its exit status alone does not")
    parser.add_argument("--stopped-status", type=int, default=STOPPED_EARLY, help="of a job that is to start again")
    parser.add_argument("command", nargs="+", help="a command that ends with dtrain's KEY=VALUE arguments")
    options = parser.parse_args(arguments)
    step = Step()
    starts = Starts(options.run_folder)
    if starts.are_idle:
        say(f"{IDLE_STARTS} starts have not led to a new checkpoint in {options.run_folder}; not started again")
        return 1
    starts.note()
    ends_at = _job_ends_at()
    if ends_at:  # older SLURMs do not say it; the ranks stop in time
        os.environ.setdefault("SLURM_JOB_END_TIME", str(int(ends_at)))
    status = step.run([*options.command, *starts.overrides])
    if status != STOPPED_EARLY:
        return status
    if ends_at and ends_at - time.time() < NEAR_END_SECONDS and not starts.has_progress:
        say("the time limit came before the first checkpoint, and would again: raise it; not put back into the queue")
        return 1
    if options.requeue:
        _put_back(shlex.split(options.requeue))
    return int(options.stopped_status)


class Starts:
    """The starts of this job so far, in a small file beside the run folder."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        names = ("DTRAIN_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "HOSTNAME")
        job = next((os.environ[name] for name in names if os.environ.get(name)), "job")
        place = run_folder.with_name(f"{run_folder.name}.jobs")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = place / f"starts-{job.replace(os.sep, '_')}{os.environ.get('LSB_JOBINDEX', '')}.json"
        self._earlier = read_json(self._file).get("starts", [])
        self._now = {"training": read_run(run_folder).get("id"), "last": self._last()}

    def _last(self) -> str:
        try:
            return (RunFolder(self._run_folder).checkpoints / "last").readlink().name
        except OSError:
            return ""

    @property
    def are_idle(self) -> bool:
        """Whether the last few led nowhere."""
        recent = self._earlier[-IDLE_STARTS:]
        return len(recent) == IDLE_STARTS and all(start == self._now for start in recent)

    @property
    def has_progress(self) -> bool:
        """Whether there is a checkpoint that was not there when this start began."""
        return self._last() != self._now["last"]

    @property
    def overrides(self) -> list[str]:
        """Once the job's own training has begun, its next start goes on with it, wherever the first one began."""
        begun = self._earlier and self._now["training"] != self._earlier[0]["training"]
        return ["trainer.resume=auto"] if begun else []

    def note(self) -> None:
        """Remembers this start."""
        write_json(self._file, {"starts": [*self._earlier, self._now]}, durable=True)


def _job_ends_at() -> float | None:
    """When SLURM ends this job, in unix seconds; None where that is unknown."""
    if (known := job_ends_at()) is not None:
        return known
    if job := _slurm_job():
        try:
            return datetime.datetime.fromisoformat(_said(["squeue", "-h", "-j", job, "-o", "%e"])).timestamp()
        except ValueError:  # 'N/A': no limit
            return None
    return None


def _slurm_job() -> str:
    """This job as SLURM's commands take it, '' elsewhere: the number of one task of an array stands for all of them."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ.get("SLURM_JOB_ID", "")


def _put_back(command: Sequence[str]) -> None:
    """Have the job start again, but for one that SLURM has ended: it was cancelled, or is put back already."""
    if job := _slurm_job():
        words = _said(["scontrol", "-o", "show", "job", job]).split()
        if words and not set(words) & ALIVE:
            say("the batch system has ended this job; whether it starts again is its decision")
            return
    say(f"saved; back into the queue: {shlex.join(command)}")
    _said(command)


def _said(command: Sequence[str]) -> str:
    """What a command of the batch system prints; '' where it fails, again and again."""
    for tries_left in reversed(range(TRIES)):
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return done.stdout.strip()
            wrong = done.stderr.strip()
        except subprocess.TimeoutExpired as error:
            wrong = str(error)
        except OSError as error:
            wrong = str(error)
            break
        if tries_left:
            time.sleep(PAUSE_SECONDS)
    say(f"{shlex.join(command)}: {wrong}")
    return ""


def say(line: str) -> None:
    """A line in the job's log, with the time: what happened when is what one looks for there."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} dtrain.launch.job: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_to_end(main))
