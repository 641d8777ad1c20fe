"""A run folder: its files by name, and the records in it of what became of the run and of what MLflow has."""

import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.tracking.whole_file import read_json, write_json

_log = logging.getLogger(__name__)
_LOCK_SECONDS = 10.0
_BLOCK_BYTES = 4096  # of file systems: a file that has one has all of it
_SILENCE_SECONDS = 3600.0  # twice the time after which a training without progress is ended
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what disks answer that know no locks


class RunFolder:
    """Where everything in a run folder lies; none of it need be there."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # as resolved
        self.config_as_written = self.path / "config"  # a folder of the files that it came from
        self.run = self.path / "run.json"  # what became of the run
        self.journal = self.path / "metrics.jsonl"
        self.delivery = self.path / "mlflow.json"  # what MLflow has acknowledged
        self.mirror = self.path / "mirror.json"  # what the mirror has
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"  # whole ones of a sharded model, for MLflow
        self.pictures = self.path / "pictures"
        self.tables = self.path / "tables"  # of metrics that are matrices, as of the newest evaluation
        self.predictions = self.path / "predictions"
        self.failure = self.path / "failure.json"
        self.failed_step = self.path / "failed-step"  # a folder of checkpoints
        self.hang = self.path / "hang.txt"
        self.logs = self.path / "logs"
        self.sender_log = self.logs / "sender.log"
        self.sender_lock = self.path / ".sender.lock"
        self.mirror_log = self.logs / "mirror.log"
        self.mirror_lock = self.path / ".mirror.lock"
        self.trackers = self.path / "trackers"  # what other trackers than MLflow have, and why not all of it
        self.bad_nodes = self.path / "bad-nodes"  # that the next start leaves out
        self.lock = self.path / ".training.lock"  # of the training that writes here

    def node_metrics(self, node: str = "*") -> Path:
        """What a machine other than rank 0's was sampled to do; with a *, a pattern."""
        return self.path / "system" / f"{node}.jsonl"

    def rank_log(self, rank: int) -> Path:
        """What a rank printed."""
        return self.logs / f"rank-{rank}.log"

    def code(self, attempt: int) -> Path:
        """Which code ran in the first start of the run (attempt 1) or a later one: commit, status and diff."""
        return self.path / ("code" if attempt == 1 else f"code/resume_{attempt}")

    def environment(self, attempt: int) -> Path:
        """With what the first start of the run, or a later one, ran: packages, CUDA, driver."""
        return self.path / ("environment" if attempt == 1 else f"environment/resume_{attempt}")


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a run folder holds; where it is gone or damaged, what the journal says; {} without either."""
    return read_json(RunFolder(folder).run) or _facts_in_journal(RunFolder(folder))


def ranks_known(facts: Mapping[str, Any]) -> int:
    """The ranks that a run's batches are meant for: it may have had fewer or more at its last start; 0: not known."""
    return int(facts.get("batch_ranks") or facts.get("world_size") or 0)


def _facts_in_journal(files: RunFolder) -> dict[str, Any]:
    """The same of the last start, as far as it is known, with how it ended and with the run's id in MLflow."""
    facts: dict[str, Any] = {}
    try:
        with files.journal.open("rb") as lines:
            for line in lines:
                if line.startswith(b'{"kind": "start"'):
                    facts = read_line(line).get("facts") or facts
                elif line.startswith(b'{"kind": "end"'):
                    ended = read_line(line)
                    facts |= {"state": ended.get("status"), "reason": ended.get("reason"), "ended": ended.get("time")}
    except OSError:
        return {}
    known = read_json(files.delivery).get("run_id")
    return facts | ({"run_id": known} if known else {})


def update_run(folder: Path, *, when: Mapping[str, Any] | None = None, **changes: Any) -> bool:
    """Changes facts in run.json, one process at a time, whole or not at all, if `when` still holds; returns that."""
    from filelock import Timeout

    file = RunFolder(folder).run
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_file(file.with_name(f".{file.name}.lock"), _LOCK_SECONDS))
        except Timeout as error:  # the write below is whole anyway
            _log.warning("%s is changed without its lock: %s", file, error)
        facts = read_run(folder)
        if when is not None and any(facts.get(key) != value for key, value in when.items()):
            return False
        write_json(file, {**facts, **changes}, durable=True)
        return True


@contextlib.contextmanager
def locked_file(path: Path, timeout_seconds: float) -> Iterator[None]:
    """Hold a lock file's lock; without it where the disk has none, as some network disks. filelock.Timeout: no turn."""
    from filelock import FileLock

    lock = FileLock(path, timeout=timeout_seconds)
    try:
        lock.acquire()
    except NotImplementedError:  # filelock's word for a disk without flock (ENOSYS)
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def overwrite_run(folder: Path, **changes: Any) -> None:
    """The same where the disk is full, in the blocks that run.json has: not whole if the machine fails meanwhile.

    OSError where that does not work either.
    """
    file = RunFolder(folder).run
    content = json.dumps({**read_run(folder), **changes}, indent=1, default=str).encode() + b"\n"
    with file.open("r+b") as run:
        available = -(-os.fstat(run.fileno()).st_size // _BLOCK_BYTES) * _BLOCK_BYTES
        if len(content) > available:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        run.write(content)
        run.truncate()


def file_instead(folder: Path) -> Path | None:
    """A file that stands where a run folder, or a folder that it is in, should be."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_file()), None)


def why_not_writable(folder: Path) -> str:
    """Why a run folder cannot be made or written, in the system's words; '' where it can. Nothing is left there."""
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        Path(tempfile.mkdtemp(prefix=".dtrain-", dir=above)).rmdir()
    except OSError as error:
        return f"{error.strerror}: {above}"
    return ""


def read_line(line: bytes) -> dict[str, Any]:
    """One line of the journal; {} when it is not a JSON object."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def close_run_of(folder: Path, pid: int, last_known: Mapping[str, Any] | None = None) -> bool:
    """Writes how a gone rank 0 ended: as the journal's last line says, else FAILED; False if another has the folder.

    `last_known`: the status and reason that hold where the journal does not say.
    """
    with RunFolder(folder).journal.open("rb") as journal:
        journal.seek(max(0, os.fstat(journal.fileno()).st_size - 65536))
        whole = [line for line in journal if line.endswith(b"\n")]
    last = read_line(whole[-1]) if whole else {}
    if last.get("kind") != "end":
        last = dict(last_known or {"status": "FAILED", "reason": "rank 0 exited without reporting an error"})
    ended = {"state": last["status"], "reason": last["reason"], "ended": round(time.time(), 3)}
    update_run(folder, when={"pid": pid, "state": "RUNNING"}, **ended)
    return bool(read_run(folder).get("pid") == pid)


def lives(facts: Mapping[str, Any]) -> bool:
    """Whether the process that run.json names is running, and not another one with its number."""
    import psutil

    try:
        process = psutil.Process(facts["pid"])
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= facts["attempt_started"])
    except psutil.NoSuchProcess:
        return False


def is_dead(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether rank 0 is gone; of another machine's that is believed when it has written nothing for an hour."""
    if facts.get("host") == socket.gethostname():
        return not lives(facts)
    return time.time() - RunFolder(folder).journal.stat().st_mtime > _SILENCE_SECONDS


@dataclass
class Memory:
    """mlflow.json of a run folder: what MLflow has acknowledged. Losing it costs a replay, which adds no rows."""

    path: Path
    run_id: str = ""  # the run that the rest is about
    offset: int = 0  # in bytes, in the journal
    status: str = ""  # RUNNING, FINISHED, FAILED or KILLED, as MLflow has it
    # Not sent yet: of a file its path in the run folder and its folder in MLflow; of a picture its path, key, step and
    # time in ms; of the data sets or the model what the journal says of them.
    artifacts: list[list[Any]] = field(default_factory=list)
    problem: str = ""  # why MLflow does not have everything: for the hint that rank 0 prints
    note: str = ""  # what else rank 0 should print
    is_lost: bool = False  # whether it could not be written the last time

    @classmethod
    def read(cls, path: Path) -> "Memory":
        """Reads it back, without the problem and the note of an earlier time."""
        known = read_json(path)
        return cls(path, **{key: known[key] for key in ("run_id", "offset", "status", "artifacts") if key in known})

    def save(self) -> None:
        """Writes it, whole or not at all; a disk that takes nothing costs a warning, and a replay some day."""
        try:
            write_json(self.path, {key: value for key, value in vars(self).items() if key not in ("path", "is_lost")})
            self.is_lost = False
        except OSError as error:
            if not self.is_lost:
                _log.warning("%s: %s; what MLflow acknowledges is not remembered for now", self.path, error.strerror)
            self.is_lost = True
