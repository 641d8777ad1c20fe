"""How a run's journal gets to a tracking store and what has been acknowledged; it does not know whose store that is."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from dtrain.tracking.run_folder import DELIVERY, JOURNAL, close_run_of, read_line, read_run, update_run
from dtrain.tracking.secrets import redact
from dtrain.tracking.whole_file import read_json, write_json

PATIENCE_SECONDS = 30.0  # without any success, once no rank 0 is there any more
_LOOK_EVERY_SECONDS = 0.1  # a read at the journal's end
_SEND_EVERY_SECONDS = 1.0  # a batch to the store, as long as the run lasts
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 10.0  # after a failure; doubled each time
_ROWS_PER_BATCH = 1000
# After a file has failed, others are tried in a second, and where none is left, it in half a minute; or after ten times
# as long as that took, so that figures have their turn. At the run's end so many failures in a row are the last ones.
_FILE_PAUSE_SECONDS, _FAILED_FILE_PAUSE_SECONDS, _TRIES_AT_END = 1.0, 30.0, 5
_log = logging.getLogger(__name__)

Row = tuple[str, float, int, int]  # key, value, timestamp in ms, step


class Run(Protocol):
    """A run in the store, open for writing. All of this may be repeated: it adds nothing then. Errors: any."""

    id: str

    def log_metrics(self, rows: Sequence[Row]) -> None:
        """Stores figures."""

    def log_params(self, values: Mapping[str, str], attempt: int) -> None:
        """Stores params, those that changed on a resume (attempt 2, 3, ...) beside the old ones."""

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Stores tags; the last value holds."""

    def log_file(self, path: Path, to: str) -> None:
        """Stores a file or a folder, in a folder among the run's artifacts."""

    def log_image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        """Stores a PNG file as the image of a key at a step."""

    def set_status(self, status: str, time_ms: int) -> None:
        """RUNNING, or how and when the run ended."""


class Store(Protocol):
    """Where runs are."""

    uri: str

    def known(self, run_id: str | None) -> Run | None:
        """The run of that id, unless it is not there or deleted."""

    def create(self, folder: Path, facts: Mapping[str, Any]) -> Run:
        """The run of a run folder with these facts (run.json): one, however often this is called."""


class SystemFigures:
    """Figures of this machine that wait to be sent; their step is the number of sampling intervals since the start.

    Args:
        monitor: mlflow's SystemMetricsMonitor, of which only the sampling is used: its own thread ends for good at the
            first request that fails, and stores nothing of a run shorter than ten seconds.
        started: when the run began, unix seconds.
    """

    def __init__(self, monitor: Any, started: float) -> None:
        self.waiting: deque[Row] = deque(maxlen=10_000)  # an outage that outlasts it costs the oldest
        self._monitor = monitor
        self._every_seconds: float = monitor.sampling_interval * monitor.samples_before_logging
        self._prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
        self._started = started
        self._due_at = time.monotonic()

    def sample(self) -> None:
        """Takes a sample when one is due; a run can do without."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + self._every_seconds
        now = time.time()
        step = round((now - self._started) / self._every_seconds)
        try:
            self._monitor.collect_metrics()
            for key, value in self._monitor.aggregate_metrics().items():
                self.waiting.append((self._prefix + key, float(value), round(now * 1000), step))
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()
        except Exception as error:
            _log.warning("no more system metrics: %s", brief(error))
            self._due_at = float("inf")


@dataclass
class Batch:
    """Lines of the journal on their way. It closes with an 'end' line, so that nothing overtakes a status."""

    offset: int  # in bytes: where in the journal the last of its lines ends
    lines: int = 0
    metrics: list[Row] = field(default_factory=list)
    params: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # attempt, values
    tags: dict[str, str] = field(default_factory=dict)
    # Path in the run folder and folder in the store; of an image its path, key, step and time in ms.
    artifacts: list[list[Any]] = field(default_factory=list)
    started: bool = False
    end: str = ""  # the status, after an 'end' line
    time_ms: int = 0  # of the last line

    @property
    def full(self) -> bool:
        """Whether it must be sent before another line is read."""
        return bool(self.end) or len(self.metrics) >= _ROWS_PER_BATCH

    def fill(self, journal: IO[bytes]) -> None:
        """Adds what the journal holds beyond `offset`; a last line that is still being written is left for later."""
        journal.seek(self.offset)
        while not self.full and (line := journal.readline()).endswith(b"\n"):
            try:
                self._add(read_line(line))
            except (KeyError, TypeError, ValueError, AttributeError):
                _log.warning("the journal's line at byte %d is damaged and left out", self.offset)
            self.offset += len(line)
            self.lines += 1

    def _add(self, entry: dict[str, Any]) -> None:
        self.time_ms = round(entry["time"] * 1000)
        match entry["kind"]:
            case "metrics":
                step = int(entry["step"])
                self.metrics += [(key, float(value), self.time_ms, step) for key, value in entry["values"].items()]
            case "params":
                self.params.append((entry["attempt"], entry["values"]))
            case "tags":
                self.tags.update(entry["values"])
            case "artifact":
                self.artifacts.append([entry["path"], entry["to"]])
            case "image":
                self.artifacts.append([entry["path"], entry["key"], int(entry["step"]), self.time_ms])
            case "start":
                self.started = True
            case "end":
                self.tags["dtrain.reason"] = entry["reason"]
                self.end = entry["status"]


@dataclass
class Memory:
    """What the store has acknowledged: the run folder's mlflow.json. Losing it costs a replay, which adds no rows."""

    path: Path
    run_id: str = ""  # the run that the rest is about
    offset: int = 0  # in bytes, in the journal
    status: str = ""  # RUNNING, FINISHED, FAILED or KILLED, as the store has it
    artifacts: list[list[Any]] = field(default_factory=list)  # not sent yet; as in Batch
    problem: str = ""  # why the store does not have everything: for the hint that rank 0 prints
    note: str = ""  # what else rank 0 should print

    @classmethod
    def read(cls, path: Path) -> "Memory":
        """Reads it back, without the problem and the note of an earlier time."""
        known = read_json(path)
        return cls(path, **{key: known[key] for key in ("run_id", "offset", "status", "artifacts") if key in known})

    def save(self) -> None:
        """Writes it, whole or not at all."""
        write_json(self.path, {key: value for key, value in vars(self).items() if key != "path"})


class Delivery:
    """Carries the journal of one run folder to the store, step by step, exactly once.

    Args:
        folder: the run folder.
        store: where to.
        system: figures of this machine, to be sent along.
    """

    def __init__(self, folder: Path, store: Store, system: SystemFigures | None = None) -> None:
        self.folder = folder
        self.memory = Memory.read(folder / DELIVERY)
        self.draining = False  # nobody writes the journal any more
        self._store = store
        self._run: Run | None = None
        self._system = system
        self._code_tags: dict[str, str] = {}
        # Of artifacts, in this life: how often each failed; of the last failure why, when and after how long it came;
        # and how many there were in a row since the run's end.
        self._failed: dict[str, int] = {}
        self._failure, self._failed_at, self._failed_after = "", float("-inf"), 0.0
        self._failures_at_end = 0
        self._send_at = 0.0
        self._journal = (folder / JOURNAL).open("rb")
        if os.fstat(self._journal.fileno()).st_size < self.memory.offset:  # it is not the journal that it once was
            self.memory.offset = 0
        self._batch = Batch(self.memory.offset)

    def begin(self, code_tags: Mapping[str, str], code_folder: str) -> None:
        """For a training that starts: whatever an earlier one ended as, this one has not ended, and runs this code."""
        self.memory.status = ""
        self._code_tags = dict(code_tags)
        self._queue([[code_folder, code_folder]])

    def step(self) -> bool:
        """Sends what is due, one batch at most.

        Returns:
            whether there is more to be sent at once.

        Raises:
            Exception: whatever the store raised; the next call starts anew with what was not acknowledged.
        """
        self._batch.fill(self._journal)
        if self.done:
            return False
        try:
            run = self._run or self._open()
            if self._system is not None:
                self._system.sample()
            if not (self.draining or self._batch.full) and time.monotonic() < self._send_at:
                return False
            if self._batch.lines or (self._system and self._system.waiting):
                self._send_batch(run)
                self._send_at = time.monotonic() + _SEND_EVERY_SECONDS
            if self.draining and not self._batch.lines and (facts := self._ending_due()):
                run.log_tags({"dtrain.reason": str(facts.get("reason", ""))})
                self._set_status(run, facts["state"], round((facts.get("ended") or time.time()) * 1000))
            self._send_artifacts(run)
        except Exception:
            self._run = None  # it may be deleted, or in a database that was replaced: look it up again
            raise
        return self._batch.full

    @property
    def done(self) -> bool:
        """Whether nothing is left that could be sent now, nor will be."""
        if self._batch.lines or (self.memory.artifacts and self._failures_at_end < _TRIES_AT_END):
            return False
        return not self._ending_due() if self.draining else self._has_ended

    @property
    def problem(self) -> str:
        """Which files are not sent, and why not; '' where none waits for another try."""
        left = [item[0] for item in self.memory.artifacts if item[0] in self._failed]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        return f"not sent: {', '.join(left[:3])}{more}: {self._failure}" if left else ""

    @property
    def _has_ended(self) -> bool:
        return self.memory.status not in ("", "RUNNING")

    def report(self, problem: str) -> None:
        """Says a problem once, and '' after it, and leaves it where rank 0 finds it."""
        if problem != self.memory.problem:
            _log.warning(problem or "delivering again")
            self.memory.problem = problem
            with contextlib.suppress(OSError):  # a full disk may be the problem
                self.memory.save()

    def _open(self) -> Run:
        facts = read_run(self.folder)
        old = facts.get("run_id")
        run = self._store.known(old) or self._store.create(self.folder, facts)
        if run.id != old:
            update_run(self.folder, run_id=run.id)
            if old:
                self.memory.note = f"run {old} is not in {redact(self._store.uri)} any more; its successor is {run.id}"
                _log.warning(self.memory.note)
        if self.memory.run_id not in ("", run.id):  # what another run has acknowledged, this one has not
            self.memory.offset, self.memory.status, self._batch = 0, "", Batch(0)
            self._batch.fill(self._journal)
        self.memory.run_id = run.id
        run.log_tags(self._code_tags)
        self.memory.save()
        self._run = run
        return run

    def _send_batch(self, run: Run) -> None:
        """Figures first, then the status; what may take long, files, is queued."""
        batch = self._batch
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
            run.log_metrics(list(self._system.waiting))
            self._system.waiting.clear()
        if batch.end:
            self._set_status(run, batch.end, batch.time_ms)
        self._queue(batch.artifacts)
        self.memory.offset = batch.offset
        self.memory.save()
        self._batch = Batch(batch.offset)
        self._batch.fill(self._journal)

    def _set_status(self, run: Run, status: str, time_ms: int) -> None:
        run.set_status(status, time_ms)
        self.memory.status = status
        self.memory.save()

    def _ending_due(self) -> dict[str, Any]:
        """run.json, if it says that the run ended and the store does not: rank 0 could write no 'end' line then."""
        facts = read_run(self.folder)
        return facts if facts.get("state") not in (None, "RUNNING", self.memory.status) else {}

    def _queue(self, artifacts: list[list[Any]]) -> None:
        self.memory.artifacts += [item for item in artifacts if item not in self.memory.artifacts]

    def _send_artifacts(self, run: Run) -> None:
        """Sends the files in the queue until one fails; those that did come after all others."""
        at_end = self.draining or (self._has_ended and not self._batch.lines)
        others = any(item[0] not in self._failed for item in self.memory.artifacts)
        pause = _FILE_PAUSE_SECONDS if at_end or others else _FAILED_FILE_PAUSE_SECONDS
        if time.monotonic() < self._failed_at + (pause if at_end else max(pause, 10 * self._failed_after)):
            return
        sent = False
        for item in sorted(self.memory.artifacts, key=lambda item: self._failed.get(item[0], 0)):
            path, began = self.folder / item[0], time.monotonic()
            try:
                if path.exists() and path.resolve().is_relative_to(self.folder.resolve()):
                    send = run.log_file if len(item) == 2 else run.log_image
                    send(path, *item[1:])
                else:
                    _log.warning("%s is not there, or not in the run folder, and is not sent", item[0])
                    if len(item) != 2:  # the newest pictures are kept, and there were many in the meantime
                        self.memory.note = f"pictures were removed before they could be sent, such as {item[0]}"
            except Exception as error:
                self._run = None  # as after any failure
                self._failed[item[0]] = self._failed.get(item[0], 0) + 1
                self._failure, self._failed_at = brief(error), time.monotonic()
                self._failed_after = self._failed_at - began
                self._failures_at_end += at_end
                break
            self.memory.artifacts.remove(item)
            self._failed.pop(item[0], None)
            self._failures_at_end, sent = 0, True
        if sent:
            self.memory.save()


def follow(delivery: Delivery, parent: int | None = None, patience_seconds: float = PATIENCE_SECONDS) -> int:
    """Delivers until the run has ended and all of it is there.

    Args:
        delivery: what to drive.
        parent: rank 0's process id; None: nobody writes any more, deliver what is there.
        patience_seconds: how long to go on without success once nobody writes any more.

    Returns:
        0, or 1 when something is left.
    """
    pause, try_at, give_up_at = _FIRST_PAUSE_SECONDS, 0.0, float("inf")
    while True:
        if not delivery.draining and (parent is None or os.getppid() != parent):
            if parent is not None and not close_run_of(delivery.folder, parent):
                return 1  # a new rank 0 has taken the run over, and its own sender goes on from here
            delivery.draining, give_up_at = True, time.monotonic() + patience_seconds
        more = False
        if time.monotonic() >= try_at:
            try:
                more = delivery.step()
            except ImportError as error:  # mlflow, or a database's driver: waiting does not install it
                delivery.report(brief(error))
                return 1
            except Exception as error:
                delivery.report(brief(error))
                try_at, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_SECONDS)
                if try_at > give_up_at:
                    return 1
            else:
                delivery.report(delivery.problem)
                if delivery.done:
                    return 1 if delivery.memory.artifacts else 0
                pause = _FIRST_PAUSE_SECONDS
                if delivery.draining and not delivery.problem:
                    give_up_at = time.monotonic() + patience_seconds
                elif time.monotonic() > give_up_at:
                    return 1
        if not more:
            time.sleep(_LOOK_EVERY_SECONDS)


def brief(error: BaseException) -> str:
    """One line on an error: where it began ('Connection refused') says more than the six errors wrapped around it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed here: pip install {error.name}"
    root = error
    while below := root.__cause__ or root.__context__:
        root = below
    if isinstance(root, OSError) and root.strerror:
        return redact(f"{root.strerror}: {root.filename}" if root.filename else root.strerror)
    from_network = isinstance(root, OSError) or str(error).startswith("API request to")
    from_database = any(kind.__name__ == "DatabaseError" for kind in type(root).__mro__)  # as all drivers have it
    lines = str(root if from_network or from_database else error).strip().splitlines()
    return redact(lines[0][:300]) if lines else type(error).__name__
