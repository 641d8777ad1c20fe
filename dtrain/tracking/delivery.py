"""Carries the journal of a run folder to MLflow, exactly once, and remembers what MLflow has acknowledged."""

import contextlib
import logging
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dtrain.tracking.file_queue import FileQueue
from dtrain.tracking.mlflow_store import MlflowRun, MlflowStore, Row, describe_error, is_passing
from dtrain.tracking.outage import Outage, with_cure
from dtrain.tracking.retry import PATIENCE_SECONDS, Retry
from dtrain.tracking.run_folder import Memory, RunFolder, close_run_of, read_line, read_run, update_run
from dtrain.tracking.secrets import redact
from dtrain.tracking.system_metrics import SystemMetrics
from dtrain.tracking.uri import run_address

_LOOK_EVERY_SECONDS = 0.1  # a read at the journal's end
_SEND_EVERY_SECONDS = 1.0  # a batch to the store, as long as the run lasts
_ROWS_PER_BATCH = 1000
_FAILURES_WITH_ONE_RUN = 3  # in a row; after more, the run is looked up again: its store may have been replaced
# The exit status where no other start would help: mlflow is missing. That of a wrong command line, too.
HOPELESS = 2
_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Lines of the journal on their way. It closes with an 'end' line, so that nothing overtakes a status."""

    offset: int  # in bytes: where in the journal the last of its lines ends
    lines: int = 0
    metrics: list[Row] = field(default_factory=list)
    widest: int = 0  # the most figures that one line brought
    params: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # attempt, values
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[Any]] = field(default_factory=list)  # as in Memory
    started: bool = False
    end: str = ""  # the status, after an 'end' line
    reason: str = ""  # of that status
    time_ms: int = 0  # of the last line

    @property
    def full(self) -> bool:
        """Whether it must be sent before another line is read."""
        # A line more, as wide as the widest, would need a second request for a few figures.
        return bool(self.end) or len(self.metrics) + self.widest > _ROWS_PER_BATCH

    def fill(self, journal: IO[bytes]) -> None:
        """Adds what the journal holds beyond `offset`; a last line that is still being written is left for later."""
        journal.seek(self.offset)
        while not self.full and (line := journal.readline()).endswith(b"\n"):
            self.take(line)
            self.offset += len(line)

    def take(self, line: bytes) -> None:
        """Adds one line."""
        try:
            self._add(read_line(line))
        except (KeyError, TypeError, ValueError, AttributeError):
            _log.warning("the journal's line at byte %d is damaged and left out", self.offset)
        self.lines += 1

    def _add(self, entry: dict[str, Any]) -> None:
        self.time_ms = round(entry["time"] * 1000)
        match entry["kind"]:
            case "metrics":
                step = int(entry["step"])
                rows = [(key, float(value), self.time_ms, step) for key, value in entry["values"].items()]
                self.metrics += rows
                self.widest = max(self.widest, len(rows))
            case "params":
                self.params.append((entry["attempt"], entry["values"]))
            case "tags":
                self.tags.update(entry["values"])
            case "artifact":
                self.artifacts.append([entry["path"], entry["to"]])
            case "image":
                self.artifacts.append([entry["path"], entry["key"], int(entry["step"]), self.time_ms])
            case "datasets" | "model" as kind:  # MLflow's entities, which are made of files
                self.artifacts.append([kind, {key: entry[key] for key in entry if key not in ("kind", "time")}])
            case "start":
                self.started = True
            case "end":
                self.tags["dtrain.reason"] = entry["reason"]
                self.end, self.reason = entry["status"], entry["reason"]


class Delivery:
    """Carries the journal of one run folder to the store, and figures of this machine, step by step, exactly once."""

    def __init__(
        self, folder: Path, store: MlflowStore, system: SystemMetrics | None = None, outage: Outage | None = None
    ) -> None:
        self.folder = folder
        self._outage = outage or Outage(store.uri)
        self.memory = Memory.read(RunFolder(folder).delivery)
        self.is_draining = False  # nobody writes the journal any more
        self._store = store
        self._run: MlflowRun | None = None
        self._system = system
        self._code_tags: dict[str, str] = {}
        self._files = FileQueue(folder, self.memory)
        self._send_at = 0.0
        self._failures = 0  # in a row
        self._tagged = ""  # the run that has the code's tags
        self._heard = b""  # of the journal, from rank 0 itself, which could not write it to the disk
        self._last_heard = b""  # the end of all that was heard, where the ending is
        self._ending: dict[str, Any] = {}  # how the run ended, where run.json cannot be written
        self._journal = RunFolder(folder).journal.open("rb")
        if os.fstat(self._journal.fileno()).st_size < self.memory.offset:  # it is not the journal that it once was
            self.memory.offset = 0
        self.batch = Batch(self.memory.offset)  # the next to be sent

    def begin(self, code_tags: Mapping[str, str], *folders: str) -> None:
        """For a training that starts: whatever an earlier one ended as, this one has not ended, and runs this code.

        For one whose first sender died, too; unless that one had delivered all, the ending included.
        """
        self.batch.fill(self._journal)
        if self.batch.lines:
            self.memory.status = ""
        self._code_tags = dict(code_tags)
        self._files.add([[folder, folder] for folder in folders])

    def hear(self, text: bytes) -> None:
        """Lines of the journal that the disk did not take; if it takes them later, sending them again adds nothing."""
        self._heard += text
        self._last_heard = (self._last_heard + text)[-65536:]

    def close(self, parent: int) -> bool:
        """Records how a rank 0 that is gone has ended; False where another one has the run folder."""
        self._fill()
        # Not what is yet to be sent: that may be how an earlier start ended.
        ends = [line for line in map(read_line, self._last_heard.split(b"\n")) if line.get("kind") == "end"]
        heard = {"status": ends[-1]["status"], "reason": ends[-1]["reason"]} if ends else None
        try:
            return close_run_of(self.folder, parent, heard)
        except OSError as error:  # then MLflow alone has it
            _log.warning("%s could not be written: %s", RunFolder(self.folder).run, error.strerror)
            lost = {"status": "FAILED", "reason": "rank 0 exited without reporting an error"}
            self._ending = {"state": (heard or lost)["status"], "reason": (heard or lost)["reason"]}
            return True

    def step(self) -> None:
        """Sends what is due, one batch at most; after an error of the store, the next call sends the same again."""
        self._fill()
        if self.done:
            return
        try:
            self._send_what_is_due(self._run or self._open())
            self._failures = 0
        except Exception as error:
            self._failures += 1
            # It may be deleted, or in a database that was replaced: look it up again.
            if not is_passing(error) or self._failures > _FAILURES_WITH_ONE_RUN:
                self._run = None
            raise

    def _fill(self) -> None:
        self.batch.fill(self._journal)
        while not self.batch.full and b"\n" in self._heard:
            line, _, self._heard = self._heard.partition(b"\n")
            if line:
                self.batch.take(line)

    def _send_what_is_due(self, run: MlflowRun) -> None:
        if self._system is not None:
            self._system.sample()
        if not (self.is_draining or self.batch.full) and time.monotonic() < self._send_at:
            return
        if self.batch.lines or (self._system and self._system.waiting):
            self._send_batch(run)
            self._send_at = time.monotonic() + _SEND_EVERY_SECONDS
        if self.is_draining and not self.batch.lines:
            self._send_ending(run)
        if not self._files.send(run, self.is_draining or (self._has_ended and not self.batch.lines)):
            self._run = None  # as after any failure of which one cannot tell the cause

    @property
    def done(self) -> bool:
        """Whether nothing is left that could be sent now, nor will be."""
        if self.batch.lines or (self.memory.artifacts and not self._files.is_given_up):
            return False
        return not self._unsent_ending() if self.is_draining else self._has_ended

    @property
    def problem(self) -> str:
        """Which files are not sent, and why not; '' where none waits for another try."""
        return self._files.problem

    @property
    def _has_ended(self) -> bool:
        return self.memory.status not in ("", "RUNNING")

    def report(self, problem: str) -> None:
        """Says a problem once, and '' after it, and leaves it where rank 0 finds it, who is told if that is due."""
        if problem and not self.batch.end:  # else rank 0 says it itself, last of all
            self._outage.fails(problem)
        elif not problem and self._run is not None:
            self._outage.is_over()
        if problem != self.memory.problem:
            _log.warning(problem or "delivering again")
            self.memory.problem = problem
            with contextlib.suppress(OSError):  # a full disk may be the problem
                self.memory.save()

    def _open(self) -> MlflowRun:
        facts = read_run(self.folder)
        old = facts.get("run_id") or self.memory.run_id
        run = self._store.known(old) or self._store.create(self.folder, {**facts, "run_id": old})
        self._outage.is_over()
        found: dict[str, Any] = {"run_id": run.id, "experiment_id": run.experiment_id, "run_name": run.name}
        if any(facts.get(key) != value for key, value in found.items()):
            with contextlib.suppress(OSError):  # on a full disk: the run is found again by its tag
                update_run(self.folder, **found)
        if not old and (address := run_address(self._store.uri, found)):  # a resumed training has said it itself
            self._outage.tell(f"this run in MLflow: {address}")
        if old and run.id != old:
            self.memory.note = f"run {old} is not in {redact(self._store.uri)} any more; its successor is {run.id}"
            _log.warning(self.memory.note)
        if self.memory.run_id not in ("", run.id):  # what another run has acknowledged, this one has not
            self.memory.offset, self.memory.status, self.batch = 0, "", Batch(0)
            self._fill()
        self.memory.run_id = run.id
        self._run = run
        if self._tagged != run.id:
            run.log_tags(self._code_tags)
            self._tagged = run.id
            self.memory.save()
        return run

    def _send_batch(self, run: MlflowRun) -> None:
        """Figures first, then the status; what may take long, files, is queued."""
        batch = self.batch
        with contextlib.suppress(OSError):  # a disk that fails must not keep figures from MLflow
            os.fsync(self._journal.fileno())  # no training waits for it here; the store never knows more than the disk
        if batch.started and self.memory.status != "RUNNING":
            self._set_status(run, "RUNNING", batch.time_ms)
        while batch.params:  # what has got through is taken off, so that a bad line brings the rest on all the same
            attempt, values = batch.params[0]
            run.log_params(values, attempt)
            del batch.params[0]
        run.log_tags(batch.tags)
        batch.tags = {}
        run.log_metrics(batch.metrics)
        batch.metrics = []
        if self._system is not None:
            run.log_metrics(self._system.waiting)
            self._system.waiting.clear()
        if batch.end:
            self._set_status(run, batch.end, batch.time_ms)
        self._files.add(batch.artifacts)
        if batch.end:
            self._files.add(_newest_pictures(RunFolder(self.folder).journal))
        self.memory.offset = batch.offset
        self.memory.save()
        self.batch = Batch(batch.offset)
        self._fill()

    def _set_status(self, run: MlflowRun, status: str, time_ms: int) -> None:
        run.set_status(status, time_ms)
        self.memory.status = status
        self.memory.save()

    def _unsent_ending(self) -> dict[str, Any]:
        """run.json, if it says that the run ended and the store does not: rank 0 could write no 'end' line then."""
        facts = {**read_run(self.folder), **self._ending}
        return facts if facts.get("state") not in (None, "RUNNING", self.memory.status) else {}

    def _send_ending(self, run: MlflowRun) -> None:
        if facts := self._unsent_ending():
            run.log_tags({"dtrain.reason": str(facts.get("reason", ""))})
            self._set_status(run, facts["state"], round((facts.get("ended") or time.time()) * 1000))


def _newest_pictures(journal: Path) -> list[list[Any]]:
    """The last picture of each key, as in Memory, for step 0, where MLflow's page of a run begins to show them."""
    newest: dict[str, list[Any]] = {}
    with journal.open("rb") as lines:
        for line in lines:
            if line.startswith(b'{"kind": "image"'):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # damaged, as said when it was sent
                    entry = read_line(line)
                    newest[entry["key"]] = [entry["path"], entry["key"], 0, round(entry["time"] * 1000)]
    return [*newest.values()]


def follow(
    delivery: Delivery, parent: int | None = None, patience_seconds: float = PATIENCE_SECONDS, pipe: int | None = None
) -> int:
    """Delivers until the run has ended and all of it is there; returns 0, 1 when something is left, or HOPELESS.

    The parent is rank 0's process id; without it, or once it has gone, nobody writes any more: what is there is
    delivered, and the patience is how long to try that without success. Through the `pipe`, a file descriptor, comes
    what rank 0 cannot write to the disk.
    """
    retry = Retry()
    exit_status = None
    while exit_status is None:
        pipe = _listen(delivery, pipe, 0)
        if not delivery.is_draining and (parent is None or os.getppid() != parent):
            if parent is not None and not delivery.close(parent):
                return 1  # a new rank 0 has taken the run over, and its own sender continues from here
            delivery.is_draining = True
            retry.give_up_after(patience_seconds)
        exit_status = _try_step(delivery, retry) if retry.is_due() else None
        if delivery.is_draining and not (retry.failures or delivery.problem):
            retry.give_up_after(patience_seconds)
        if exit_status is None and (retry.failures or not delivery.batch.full):
            pipe = _listen(delivery, pipe, _LOOK_EVERY_SECONDS)
    return exit_status


def _listen(delivery: Delivery, pipe: int | None, seconds: float) -> int | None:
    """Waits for so long, or until rank 0 has something to say; the pipe, None once it has ended."""
    if pipe is None:
        time.sleep(seconds)
        return None
    while select.select([pipe], [], [], seconds)[0]:
        if not (text := os.read(pipe, 65536)):
            return None
        delivery.hear(text)
        seconds = 0
    return pipe


def _try_step(delivery: Delivery, retry: Retry) -> int | None:
    """The exit status of a delivery that is over, with everything there (0) or not; None while it continues."""
    try:
        with retry.attempt():
            delivery.step()
    except Exception as error:
        is_hopeless = isinstance(error, ImportError)  # waiting installs neither mlflow nor a database's driver
        delivery.report(with_cure(describe_error(error)))
        return HOPELESS if is_hopeless else 1 if retry.is_over else None
    delivery.report(delivery.problem)
    if delivery.done:
        return 1 if delivery.memory.artifacts else 0
    return 1 if delivery.problem and retry.is_over else None
