"""`dtrain job`, the process of a batch script: runs the job's step, warns it, and requeues the job where that helps.

    exec python -m dtrain job --run-folder runs/digits --requeue "scontrol requeue $SLURM_JOB_ID" -- srun ...

A training that was asked to stop has saved and ends with 75; this process, which the batch system warns, then has the
job start again. Nothing else that ends a training is a reason to: a mistake in the config or a crash would only come
again. Nor is a job that was cancelled, one whose starts make no progress, or one that the batch system itself requeues.
"""

import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dtrain.distributed.environment import job_ends_at
from dtrain.distributed.exit_status import FAILED, STOPPED_EARLY
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json, write_json

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IDLE_STARTS = 3  # so many starts in a row without a new checkpoint, and the next one will not make one either
NEAR_END_SECONDS = 600.0  # a stop so near to the end of the job's time is its time limit
RUNNING = {"JobState=RUNNING", "JobState=SIGNALING", "JobState=RESIZING"}  # what scontrol shows before a job's end
TRIES, PAUSE_SECONDS = 5, 3.0  # a controller that restarts answers again after a while


def run_job(run_folder: Path, command: Sequence[str], requeue: str, stopped_status: int) -> int:
    """Run the step of a batch job: a command that takes dtrain's KEY=VALUE arguments at its end.

    `requeue` is the command that requeues the job, '' where the exit status alone does; `stopped_status` is the exit
    status of a job that is to start again. Returns the job's exit status: the training's, or 1 where another start
    would get no further.
    """
    step = Step()
    file = _starts_file(run_folder)
    earlier, this = read_json(file).get("starts", []), _state_of(run_folder)
    if earlier[-IDLE_STARTS:] == [this] * IDLE_STARTS:
        say(f"{IDLE_STARTS} starts have not led to a new checkpoint in {run_folder}; not started again")
        return FAILED
    write_json(file, {"starts": [*earlier, this]}, durable=True)
    ends_at = _end_of_job()
    if ends_at:  # older SLURMs do not set it; the ranks stop in time
        os.environ.setdefault("SLURM_JOB_END_TIME", str(int(ends_at)))
    # Once the job's own training has begun, its next start resumes it, wherever the first one began.
    has_begun = earlier and this["training"] != earlier[0]["training"]
    status = step.run([*command, "trainer.resume=auto"] if has_begun else command)
    if status != STOPPED_EARLY:
        return status
    if ends_at and ends_at - time.time() < NEAR_END_SECONDS and _state_of(run_folder)["last"] == this["last"]:
        say("the time limit came before the first checkpoint, and would again: raise it; not requeued")
        return FAILED
    if requeue:
        _requeue(shlex.split(requeue))
    return stopped_status


class Step:
    """The command at work. A warning is passed on as SIGUSR1, the one signal that srun hands on and survives."""

    def __init__(self) -> None:
        self._warnings: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        for number in WARNINGS:
            signal.signal(number, self._warn)

    def _warn(self, number: int, _frame: object) -> None:
        self._warnings.append(number)
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGUSR1)

    def run(self, command: Sequence[str]) -> int:
        """Its exit status. A warning may have come before Python could take it: not a failure either."""
        if self._warnings:  # while the batch system was asked: nothing has begun
            return STOPPED_EARLY
        # Without a standard input: srun would read the batch script's.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if self._warnings:
            self._process.send_signal(signal.SIGUSR1)
        status = self._process.wait()
        status = 128 - status if status < 0 else status
        return STOPPED_EARLY if self._warnings and status == 128 + signal.SIGUSR1 else status


def _starts_file(run_folder: Path) -> Path:
    """A small file beside the run folder, for the starts of this job so far."""
    names = ("DTRAIN_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "HOSTNAME")
    job = next((os.environ[name] for name in names if os.environ.get(name)), "job")
    folder = run_folder.with_name(f"{run_folder.name}.jobs")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"starts-{job.replace(os.sep, '_')}{os.environ.get('LSB_JOBINDEX', '')}.json"


def _state_of(run_folder: Path) -> dict[str, str | None]:
    """The training in a run folder, and its last checkpoint."""
    last = ""
    with suppress(OSError):
        last = (RunFolder(run_folder).checkpoints / "last").readlink().name
    return {"training": read_run(run_folder).get("id"), "last": last}


def _end_of_job() -> float | None:
    """When SLURM ends this job, in unix seconds; None where that is unknown."""
    known, job = job_ends_at(), _slurm_job()
    if known is not None or not job:
        return known
    with suppress(ValueError):  # 'N/A': no limit
        return datetime.datetime.fromisoformat(_output_of(["squeue", "-h", "-j", job, "-o", "%e"])).timestamp()
    return None


def _slurm_job() -> str:
    """This job as SLURM's commands take it, '' elsewhere: the number of one task of an array stands for all of them."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ.get("SLURM_JOB_ID", "")


def _requeue(command: Sequence[str]) -> None:
    """Have the job start again, but for one that SLURM has ended: it was cancelled, or is requeued already."""
    if job := _slurm_job():
        facts = _output_of(["scontrol", "-o", "show", "job", job]).split()
        if facts and not RUNNING & set(facts):
            say("the batch system has ended this job; whether it starts again is its decision")
            return
    say(f"saved; requeued by {shlex.join(command)}")
    _output_of(command)


def _output_of(command: Sequence[str]) -> str:
    """What a command of the batch system prints; '' where it fails, again and again."""
    reason = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_SECONDS if attempt else 0)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as error:
            reason = str(error)
        except OSError as error:  # there is no such program
            reason = str(error)
            break
        else:
            if not done.returncode:
                return done.stdout.strip()
            reason = done.stderr.strip()
    say(f"{shlex.join(command)}: {reason}")
    return ""


def say(line: str) -> None:
    """A line in the job's log, with the time: when things happened is what one looks for in it."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} dtrain job: {line}", file=sys.stderr, flush=True)
