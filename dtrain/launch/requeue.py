"""`dtrain job`, the process of a batch script: runs the job's step, warns it, and requeues the job where that helps.

    exec python -m dtrain job --run-folder runs/digits --requeue "scontrol requeue $SLURM_JOB_ID" -- srun ...

A training that was asked to stop has saved and ends with 75; this process, which the batch system warns, then has the
job start again. Nothing else that ends a training is a reason to: a mistake in the config or a crash would only come
again. Nor is a job that was cancelled, one whose starts make no progress, or one that the batch system itself requeues.
A node that the note in the run folder calls bad is left out at the next start, if others can take its place.
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
from typing import Any

from dtrain.distributed.environment import expand_nodes, job_ends_at, node_name
from dtrain.distributed.exit_status import DONE, FAILED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.tracking.bad_nodes import LEFT_OUT, USES_BAD_NODES, bad_nodes
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json, write_json

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENDED = (DONE, WRONG_CONFIG)  # exit statuses for which no node can be to blame
IDLE_STARTS = 3  # so many starts in a row without a new checkpoint, and the next one will not make one either
NEAR_END_SECONDS = 600.0  # a stop so near to the end of the job's time is its time limit
RUNNING = {"JobState=RUNNING", "JobState=SIGNALING", "JobState=RESIZING"}  # what scontrol shows before a job's end
OUT_OF_USE = ("down", "drain", "drng", "fail", "maint", "boot", "unk", "inval")  # sinfo's states of nodes
TRIES, PAUSE_SECONDS = 5, 3.0  # a controller that restarts answers again after a while


def run_job(
    run_folder: Path,
    command: Sequence[str],
    requeue: str,
    stopped_status: int,
    preflight: Sequence[str] = (),
    spares: int = 0,
) -> int:
    """Run the step of a batch job: a command that takes dtrain's KEY=VALUE arguments at its end.

    `requeue` is the command that requeues the job, '' where the exit status alone does; `stopped_status` is the exit
    status of a job that is to start again. `preflight` is a command that is run first: it fails where nodes are bad,
    and notes them in the run folder. `spares` of the nodes may be lost: how the training ended counts then, not what
    became of them. Returns the job's exit status: the training's, or 1 where another start would get
    no further.
    """
    step = Step()
    file = _starts_file(run_folder)
    earlier, this = read_json(file).get("starts", []), _state_of(run_folder)
    if earlier[-IDLE_STARTS:] == [this] * IDLE_STARTS:
        say(f"{IDLE_STARTS} starts have not led to a new checkpoint in {run_folder}; not started again")
        return FAILED
    nodes = Nodes(run_folder, spares)
    if nodes.are_bad_at_start(step, preflight):
        return FAILED if nodes.stay else _put_back(requeue, nodes, stopped_status)
    write_json(file, {"starts": [*earlier, this]}, durable=True)
    ends_at = _end_of_job()
    if ends_at:  # older SLURMs do not set it; the ranks stop in time
        os.environ.setdefault("SLURM_JOB_END_TIME", str(int(ends_at)))
    # Once the job's own training has begun, its next start resumes it, wherever the first one began.
    has_begun = earlier and this["training"] != earlier[0]["training"]
    before = _start_of(run_folder)
    status = step.run([*command, "trainer.resume=auto"] if has_begun else command)
    if spares and _start_of(run_folder) != before:  # srun's may be that of a node that was lost or gave its place up
        status = _own_status(run_folder, status)
    if status != STOPPED_EARLY:
        if requeue and ((status == FAILED and nodes.went_bad()) or (status not in ENDED and nodes.are_lost())):
            return _put_back(requeue, nodes, stopped_status)
        return status
    if ends_at and ends_at - time.time() < NEAR_END_SECONDS and _state_of(run_folder)["last"] == this["last"]:
        say("the time limit came before the first checkpoint, and would again: raise it; not requeued")
        return FAILED
    nodes.went_bad()
    return _put_back(requeue, nodes, stopped_status)


def _put_back(requeue: str, nodes: "Nodes", stopped_status: int) -> int:
    """Have the job start again, without the nodes that are to be left out."""
    if requeue:
        _requeue(shlex.split(requeue))
        nodes.leave_out()
    return stopped_status


class Nodes:
    """The job's nodes, and those of them that the note in the run folder leaves out."""

    def __init__(self, run_folder: Path, spares: int = 0) -> None:
        self._folder, self._spares = run_folder, spares
        self._own = {*expand_nodes(os.environ.get("SLURM_JOB_NODELIST", "")), node_name()} - {""}
        self._bad: list[str] = []
        self.stay = False  # bad ones cannot be left out: there are too few others

    def are_bad_at_start(self, step: "Step", preflight: Sequence[str]) -> bool:
        """Whether the job is not to begin on these nodes; says why."""
        if not self._have_substitutes():
            if self.went_bad():
                return True
            if self._listed():
                os.environ[USES_BAD_NODES] = "1"
        if not preflight or (status := step.run(preflight)) == DONE:
            return False
        if status != STOPPED_EARLY and self._have_substitutes():
            return False
        if status == STOPPED_EARLY or self.went_bad():
            return True
        listed = self._listed()
        where = f"{RunFolder(self._folder).bad_nodes} names {', '.join(listed)}" if listed else "it named no node"
        few = "; too few nodes are left to go without" if listed else ""
        say(f"the preflight failed (exit status {status}), {where}{few}: ended")
        self.stay = True
        return True

    def _have_substitutes(self) -> bool:
        """Whether spares are at hand for those in the note, on which `dtrain launch` refuses; not for this one."""
        listed = self._listed()
        if not listed or len(listed) > self._spares or node_name() in listed:
            return False
        for node, reason in listed.items():
            say(f"{node} is not used, a spare takes its place: {reason}")
        os.environ[LEFT_OUT] = ",".join(listed)  # such a node may not even see the note
        return True

    def are_lost(self) -> bool:
        """Whether some of them are out of use by now, more than spares could take the place of."""
        if not self._spares:  # SLURM itself would have ended the job
            return False
        lines = _output_of(["sinfo", "-h", "-N", "-n", ",".join(sorted(self._own)), "-o", "%N %t"]).splitlines()
        if lost := {node for node, state in map(str.split, lines) if state.startswith(OUT_OF_USE)}:
            say(f"{', '.join(sorted(lost))}: lost")
        return bool(lost)

    def went_bad(self) -> bool:
        """Whether some of them are in the note, and others could take their place; says which."""
        if not (listed := self._listed()):
            return False
        if self._others_are_enough():
            self._bad = sorted(listed)
            for node, reason in listed.items():
                say(f"{node} is left out from now on: {reason}")
            return True
        say(f"{', '.join(listed)}: in {RunFolder(self._folder).bad_nodes}, but too few nodes are left to go without")
        return False

    def _listed(self) -> dict[str, str]:
        return {node: text for node, text in bad_nodes(self._folder).items() if node in self._own}

    def _others_are_enough(self) -> bool:
        """Whether SLURM has as many nodes for this job without those in the note."""
        partition, wanted = os.environ.get("SLURM_JOB_PARTITION"), os.environ.get("SLURM_JOB_NUM_NODES", "")
        if not partition or not wanted.isdigit():
            return False
        lines = _output_of(["sinfo", "-h", "-N", "-p", partition, "-o", "%N %t"]).splitlines()
        usable = {node for node, state in map(str.split, lines) if not state.startswith(OUT_OF_USE)}
        return len(usable - bad_nodes(self._folder).keys()) >= int(wanted)

    def leave_out(self) -> None:
        """Have SLURM give the job, which waits in its queue again, other nodes; those left out by its owner stay so."""
        if not self._bad or not (job := _slurm_job()):
            return
        facts = dict(word.partition("=")[::2] for word in _output_of(["scontrol", "-o", "show", "job", job]).split())
        known = facts.get("ExcNodeList", "(null)")
        names = [*(expand_nodes(known) if known != "(null)" else []), *self._bad]
        _output_of(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(names))}"])


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


def _start_of(run_folder: Path) -> tuple[Any, Any]:
    """Which training is in a run folder, and how often it was started."""
    facts = read_run(run_folder)
    return facts.get("id"), facts.get("attempt")


def _own_status(run_folder: Path, status: int) -> int:
    """The exit status that a training has recorded, or the given one where it came to no end."""
    facts = read_run(run_folder)
    own = facts.get("exit_status")
    return status if own is None or facts.get("state") == "RUNNING" else int(own)


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
    say(f"requeued by {shlex.join(command)}")
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
