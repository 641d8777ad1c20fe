"""The run's journal on disk: figures, params, artifacts, status; rank 0 writes it."""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast, get_args

from dtrain.tracking.earlier_starts import go_back, read_earlier
from dtrain.tracking.run_folder import RunFolder, overwrite_run, read_line, read_run, update_run
from dtrain.tracking.secrets import is_secret, leaves, redact, redacted_tree
from dtrain.tracking.start_sender import assign_run, start_sender
from dtrain.tracking.tracker_processes import problems
from dtrain.tracking.uri import resolve_tracking_uri
from dtrain.tracking.whole_file import read_json

Status = Literal["FINISHED", "FAILED", "KILLED"]
Method = TypeVar("Method", bound=Callable[..., Any])
_log = logging.getLogger(__name__)
_HOPELESS = 2  # the exit status of a sender that no other start would help
_UNWRITTEN_BYTES = 16 * 2**20  # what is kept in memory while the disk takes nothing
_LOOK_EVERY_SECONDS = 1.0  # after the sender, while figures are logged
# Before a sender that died is started again; doubled each time.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_SAVE_EVERY_SECONDS = 0.5  # run.json, on a disk that takes nothing
_SILENT_SECONDS = 5.0  # so long the end waits for MLflow without a line
_REPEAT_SECONDS = 0.5  # a Ctrl-C that ended the training may come several times


class Journal:
    """Rank 0's record of a run, one JSON object per line, and the starter of the process that feeds MLflow from it.

    A line is handed to the operating system before `log` returns, which a kill -9 of this process survives; the sender
    flushes it to the disk before it tells MLflow. Nothing here waits for MLflow, except `finish`, and that is bounded.

    Args:
        tracking_uri: see `resolve_tracking_uri`, also for errors.
        system_metrics: whether CPU, memory and GPU figures of this machine go to MLflow too.
        exit_timeout_seconds: how long `finish` waits at most until MLflow has everything.
        parent_run_id: of the run in MLflow under which this one is shown.
        log_model: whether the best checkpoint becomes the run's model in MLflow, a LoggedModel.
        register: the registered model of which it becomes a version. Default: none.
        sender: from `prepare_sender`. Default: one is started when the run starts.
        say: what shows a person a line, from another thread: that MLflow does not answer. Default: a warning.
    """

    def __init__(  # noqa: PLR0913
        self,
        folder: Path,
        *,
        experiment: str,
        run_name: str,
        tracking_uri: str | None = None,
        system_metrics: bool = True,
        exit_timeout_seconds: float = 25.0,
        parent_run_id: str | None = None,
        log_model: bool = True,
        register: str | None = None,
        sender: subprocess.Popen[bytes] | None = None,
        say: Callable[[str], object] = _log.warning,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._files = RunFolder(self.folder)
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        self._experiment, self._run_name = experiment, run_name
        self._system_metrics = system_metrics
        self._exit_timeout_seconds = exit_timeout_seconds
        self._parent_run_id = parent_run_id
        self._sender, self._say = sender, say
        self._log_model, self._register = log_model, register
        self._file: int | None = None
        self._lock = threading.Lock()  # pictures are drawn, and told, in a thread of their own
        self._unwritten = b""  # whole lines, of which the disk may have taken the beginning,
        self._written = self._handed_over = 0  # so many bytes, and so many the sender
        self._disk_is_full = self._ended = False
        self._unsaved: dict[str, Any] = {}  # how the run ended, as long as run.json does not say so
        self._look_at, self._restart_at = 0.0, 0.0  # after the sender, and when another one is started, by the clock
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._facts: dict[str, Any] = {}  # of run.json, as they were at the start
        self._last_steps: dict[str, int] = {}
        self._bad_keys: set[str] = set()
        self._told_of: set[str] = set()  # trackers that had a problem

    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        artifacts: Sequence[tuple[str, str]] = (),
        from_step: int | None = None,
        datasets: Mapping[str, Mapping[str, Any]] | None = None,
        **run_facts: Any,
    ) -> None:
        """Opens the journal, or continues the one that is there, and starts the sender.

        `datasets` has for each set what `lineage` takes.
        For the params see `flatten`, for `artifacts` `artifact`; secrets are masked. The tags win over the ones that
        every run gets; `run_facts` is what else run.json shall hold, such as world_size. What follows `from_step` is
        computed anew: its figures are logged though the journal has some of these steps; None: they would be the same.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        attempt, self._last_steps = read_earlier(self._files.journal)
        if from_step is not None:
            go_back(self._last_steps, from_step)
        self._file = self._opened()
        known = read_run(self.folder)
        host, now = socket.gethostname(), round(time.time(), 3)
        facts = {
            "id": known.get("id") or uuid.uuid4().hex,
            "run_id": known.get("run_id"),
            "experiment": self._experiment,
            "run_name": self._run_name,
            "tracking_uri": redact(self.tracking_uri),
            "state": "RUNNING",
            "reason": "",
            "exit_status": None,
            "host": host,
            "pid": os.getpid(),
            "attempt": attempt,
            "started": known.get("started") or now,
            "attempt_started": now,
            "ended": None,
            **run_facts,
        }
        self._facts = facts
        update_run(self.folder, **facts)
        own_tags = {"mlflow.source.name": "dtrain", "host": host, "dtrain.checkpoint_dir": str(self.folder)}
        if self._parent_run_id:
            own_tags["mlflow.parentRunId"] = self._parent_run_id
        if "world_size" in run_facts:
            own_tags["world_size"] = str(run_facts["world_size"])
        if from_step is not None:
            own_tags["dtrain.branch"] = f"start {attempt} continues from step {from_step}"
        self._write("start", attempt=attempt, from_step=from_step, facts=facts)
        self._write("tags", values={key: redact(str(value)) for key, value in {**own_tags, **tags}.items()})
        self._write("params", attempt=attempt, values={key: _as_text(key, value) for key, value in params.items()})
        if datasets:
            self._write("datasets", folder=str(Path.cwd()), values=redacted_tree(dict(datasets)))
        for path, to in artifacts:
            self.artifact(path, to)
        self._start_sender()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of one step: one line, a few tens of microseconds, no waiting.

        A figure that is not a number costs one warning per key. A step that the journal already holds for a key is
        dropped: a resumed training repeats the steps after its checkpoint, and MLflow would store them twice; unless
        they are computed anew (see `start`). A step is the number of optimizer steps done; one-element tensors and
        arrays will do as figures.
        """
        values: dict[str, float | str] = {}
        for key, figure in figures.items():
            number = figure if type(figure) is float else self._as_number(key, figure)
            if number is None or step <= self._last_steps.get(key, step - 1):
                continue
            self._last_steps[key] = step
            values[key] = number if math.isfinite(number) else str(number)
        if values:
            self._write("metrics", step=int(step), values=values)
        if time.monotonic() >= self._look_at:
            self._look_after_sender()

    def artifact(self, path: str, to: str = "") -> None:
        """Has a file or folder of the run folder, relative to it or absolute, sent to a folder of the run's artifacts.

        Raises ValueError where the path, or the place in MLflow, leaves its folder.
        """
        self._write("artifact", path=self._relative(path, to), to=to)

    def image(self, path: str, key: str, step: int) -> None:
        """Has a PNG file of the run folder sent to MLflow as the image of a key at a step, once for each step.

        MLflow shows the images of one key, such as val/confusion, as a sequence. For the path see `artifact`.
        """
        relative = self._relative(path, "")
        if step > self._last_steps.get(key, step - 1):
            self._last_steps[key] = step
            self._write("image", path=relative, key=key, step=int(step))

    def model(self, weights: str, step: int, is_final: bool, **facts: Any) -> None:
        """Has a weight file of the run folder become the run's model in MLflow; registered where it is the final one.

        The other facts are `signature`, `code` (files and folders of the user's own) and `packages`: `logged_model`.
        """
        if self._log_model:
            name = self._register if is_final else None
            told = {"name": self._experiment, "step": step, "register": name, **facts}
            self._write("model", path=self._relative(weights, ""), **told)

    def _relative(self, path: str, to: str) -> str:
        """The path from the run folder, checked."""
        relative = os.path.relpath(self.folder / path, self.folder)
        if relative.startswith(".."):  # given with its links resolved: clusters have many
            relative = os.path.relpath((self.folder / path).resolve(), self.folder.resolve())
        for kind, place in (("path", relative), ("folder in MLflow", os.path.normpath(to or "."))):
            if place.startswith("/") or place.split("/")[0] == "..":
                raise ValueError(f"artifact {path!r} to {to!r}: the {kind} must stay inside; found {place}")
        return relative

    def finish(self, status: Status, reason: str = "", exit_status: int = 0) -> str:
        """Writes how the run ended and waits, at most `exit_timeout_seconds`, until MLflow has everything.

        A second call does nothing, so that an error path may call it without knowing what happened before. It returns
        '' when MLflow has everything, else one line that says why not and how to send the rest.
        """
        if status not in get_args(Status):
            raise ValueError(f"status {status!r}: a run ends as one of {', '.join(get_args(Status))}")
        if self._ended or self._file is None:
            return ""
        self._ended = True
        self._facts["ended_as"] = status
        reason = redact(reason)
        self._write("end", status=status, reason=reason)
        self._unsaved = {"state": status, "reason": reason, "exit_status": exit_status, "ended": round(time.time(), 3)}
        self._save_ending()
        hint = self._wait_for_sender()
        self.close()
        return hint

    def deliver_later(self, folder: Path) -> None:
        """Has a process of its own send what MLflow lacks of a run that nobody continues, its true status included."""
        facts, sent = read_run(folder), read_json(RunFolder(folder).delivery)
        known = str(facts.get("tracking_uri"))
        whole = facts.get("state") == sent.get("status") and not sent.get("artifacts")
        has_password_of_another = "***" in known and known != redact(self.tracking_uri)  # of which none is stored
        if RunFolder(folder).journal.is_file() and not whole and not has_password_of_another:
            with contextlib.suppress(OSError):
                start_sender(folder, self.tracking_uri)

    def write_again(self) -> None:
        """Makes journal and run.json again from what is held open, in a folder that was removed; with a new sender."""
        if self._file is None:
            return
        content, removed = os.pread(self._file, os.fstat(self._file).st_size, 0), self._file
        self._file = self._opened()
        os.close(removed)
        self._unwritten = content + self._unwritten
        update_run(self.folder, **self._facts)
        self._replace_sender()

    def move_to(self, folder: Path) -> None:
        """Takes the run folder to be of another name, under which it is found now."""
        self.folder, self._files = folder, RunFolder(folder)
        if self._file is not None:
            self._replace_sender()

    def _replace_sender(self) -> None:
        if self._sender is not None:
            self._sender.kill()  # safe at any moment: it only ever remembers what MLflow has acknowledged
            self._sender.wait()
        self._start_sender()

    def _opened(self) -> int:
        return os.open(self._files.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        """Closes the journal. A run that was not finished is then closed by the sender, as FAILED."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, kind: str, **fields: Any) -> None:
        """Appends one line; a full disk costs a warning and some memory, and gets the line when it has space again."""
        if self._file is None:
            raise RuntimeError("the journal is not open: call start() first, and nothing after finish()")
        if kind == "metrics" and len(self._unwritten) > _UNWRITTEN_BYTES:
            return
        line = {"kind": kind, "time": round(time.time(), 3), **fields}
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._unwritten += text
            self._flush()

    def _flush(self) -> None:
        """Writes what is not on the disk yet, as far as that takes it."""
        if self._file is None or not self._unwritten:
            return
        try:
            while self._written < len(self._unwritten):
                self._written += os.write(self._file, self._unwritten[self._written :])
        except OSError as error:
            if not self._disk_is_full:
                _log.warning("%s: %s; its lines wait in memory", self._files.journal, error.strerror)
            self._disk_is_full = True
            return
        self._unwritten, self._written, self._handed_over, self._disk_is_full = b"", 0, 0, False

    def _hand_over(self) -> None:
        """Gives the sender what the disk does not take; what it cannot take now, later: nothing waits for it here."""
        pipe = self._sender.stdin if self._sender is not None else None
        if pipe is None or pipe.closed or not self._unwritten:
            return
        with contextlib.suppress(OSError):
            os.set_blocking(pipe.fileno(), False)
            if not self._handed_over:
                os.write(pipe.fileno(), b"\n")  # after a line whose rest went to the disk
            while rest := self._unwritten[self._handed_over : self._handed_over + 65536]:
                self._handed_over += os.write(pipe.fileno(), rest)

    def _as_number(self, key: str, figure: Any) -> float | None:
        try:
            if isinstance(figure, (str, bytes)):  # float("0.3") would do, but a text is a mistake
                raise TypeError(f"it is the text {figure!r}")
            return float(figure)
        except Exception as error:  # whatever a foreign number type raises, the loop must not see it
            if key not in self._bad_keys:
                self._bad_keys.add(key)
                kind = type(figure).__name__
                _log.warning("%s is not logged: a single number is needed, found %s (%s)", key, kind, error)
            return None

    def _start_sender(self) -> None:
        options = ["--parent", str(os.getpid()), *([] if self._system_metrics else ["--no-system-metrics"])]
        self._handed_over = 0
        if not assign_run(self._sender, self.folder, options):
            try:
                self._sender = start_sender(self.folder, self.tracking_uri, options)
            except OSError as error:
                self._sender = None
                _log.warning("MLflow gets nothing for now, its sender could not be started: %s", error)
                return
        told = self._sender and self._sender.stdout
        if told:  # a thread that sleeps until there is a line costs no step anything
            threading.Thread(target=_pass_on, args=(told, self._say), name="MLflow's sender", daemon=True).start()

    def _look_after_sender(self) -> None:
        """Starts a sender again that has died, after a pause that grows each time; the first time, says so."""
        now = time.monotonic()
        self._look_at = now + _LOOK_EVERY_SECONDS
        self._tell_of_trackers()
        status = None if self._sender is None else self._sender.poll()
        if self._sender is not None and status is None:
            self._hand_over()
        elif status in (0, _HOPELESS):
            self._look_at = math.inf
        elif not self._restart_at:
            self._restart_at = now + self._pause_seconds
            if self._pause_seconds == _FIRST_PAUSE_SECONDS:
                how = "could not be started" if status is None else how_it_ended(status)
                again = "it is started again, and sends what was logged meanwhile"
                _log.warning("MLflow's sender %s, see %s; %s", how, self._files.sender_log, again)
        elif now >= self._restart_at:
            self._restart_at, self._pause_seconds = 0.0, min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
            self._start_sender()

    def _tell_of_trackers(self) -> None:
        """Says once of each tracker why it does not have everything."""
        for tracker, problem in problems(self.folder).items() if self._facts.get("trackers") else ():
            if tracker not in self._told_of:
                self._told_of.add(tracker)
                rest = f"run and MLflow are not affected; what it lacks: dtrain sync {shlex.quote(str(self.folder))}"
                _log.warning("%s: %s; %s", tracker, problem, rest)

    def _save_ending(self, is_last_try: bool = False) -> None:
        """Writes into run.json how the run ended, unless it is there; the last try is in the old file's own blocks."""
        if not self._unsaved:
            return
        try:
            (overwrite_run if is_last_try else update_run)(self.folder, **self._unsaved)
            self._unsaved = {}
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)  # the whole folder, and it will not come back
            if is_last_try or is_gone:
                _log.warning("%s could not be written: %s", self._files.run, error.strerror)
            self._unsaved = {} if is_gone else self._unsaved

    def _wait_for_sender(self) -> str:
        """Waits until MLflow and the disk have everything, at most so long; returns what rank 0 should print."""
        deadline = time.monotonic() + self._exit_timeout_seconds
        if self._sender is None or self._sender.poll() not in (None, 0, _HOPELESS):  # killed for memory for instance
            self._start_sender()
        if self._sender is not None:
            with contextlib.suppress(OSError):  # no step is left to be disturbed; only root may raise a priority again
                os.setpriority(os.PRIO_PROCESS, self._sender.pid, 0)
        with ctrl_c("MLflow") as is_interrupted:
            self._wait_until(deadline, is_interrupted)
        self._save_ending(is_last_try=True)
        self._tell_of_trackers()
        problem = f"see {self._files.sender_log}"
        if self._sender is not None and self._sender.poll() is None:
            problem = "its sender was still at work"
            if not self._unwritten:  # else it alone knows how the run ended
                self._sender.kill()  # safe at any moment: it only ever remembers what MLflow has acknowledged
                self._sender.wait()
        acknowledged = read_json(self._files.delivery)
        lost = f"The last {len(self._unwritten)} bytes of {self._files.journal} could not be written to the disk"
        if self._sender is not None and self._sender.returncode == 0:
            return f"{lost}; MLflow has them" if self._unwritten else str(acknowledged.get("note", ""))
        is_whole = acknowledged.get("status") == self._facts.get("ended_as") and not acknowledged.get("artifacts")
        if self._facts.get("trackers") and is_whole and not self._unwritten:
            rest = f"send the rest with: dtrain sync {shlex.quote(str(self.folder))}"
            return f"the other trackers do not have all of this run yet: they were still at work; {rest}"
        return (
            f"MLflow ({redact(self.tracking_uri)}) does not have all of this run yet: "
            f"{acknowledged.get('problem') or problem}. {lost if self._unwritten else 'Nothing is lost'}; "
            f"send the rest with: dtrain sync {shlex.quote(str(self.folder))}"
        )

    def _wait_until(self, deadline: float, is_interrupted: Callable[[], bool]) -> None:
        """Waits for sender and disk, whose lines and run.json are tried again and again."""
        say_at, save_at = time.monotonic() + _SILENT_SECONDS, 0.0
        while True:
            self._flush()
            self._hand_over()
            if time.monotonic() >= save_at:
                self._save_ending()
                save_at = time.monotonic() + _SAVE_EVERY_SECONDS
            is_sent = self._sender is None or self._sender.poll() is not None
            if (is_sent and not self._unwritten and not self._unsaved) or is_interrupted():
                return
            now = time.monotonic()
            if now >= deadline:
                return
            if now >= say_at:
                say_at = math.inf
                others = " and the other trackers" if self._facts.get("trackers") else ""
                what = self._files.journal if is_sent else f"MLflow ({redact(self.tracking_uri)}){others}"
                _log.warning("waiting for %s, %.0f s more at most; Ctrl-C ends the wait", what, deadline - now)
            if is_sent or self._sender is None:
                time.sleep(min(0.1, deadline - now))
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._sender.wait(min(0.1, deadline - now))


def _pass_on(lines: IO[bytes], say: Callable[[str], object]) -> None:
    """Show what a sender has to tell, until it ends."""
    with lines:
        for line in lines:
            say(redact(line.decode(errors="replace").strip()))


@contextlib.contextmanager
def ctrl_c(waits_for: str) -> Iterator[Callable[[], bool]]:
    """Takes Ctrl-C over: whether it has come, and ends a wait. Only the main thread can."""
    times: list[float] = []
    began = time.monotonic()

    def take(_number: int, _frame: object) -> None:
        if time.monotonic() > began + _REPEAT_SECONDS and not times:
            times.append(time.monotonic())
            _log.warning("Ctrl-C: %s is not waited for any longer", waits_for)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, take)
    try:
        yield lambda: bool(times)
    finally:
        signal.signal(signal.SIGINT, before)


def how_it_ended(status: int) -> str:
    """What became of a process, by its exit status or the signal that killed it."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _without_effect(method: Method) -> Method:
    return cast(Method, functools.wraps(method)(lambda *_, **__: ""))


class NoJournal(Journal):
    """What the other ranks hold: a journal whose methods do nothing, with no tracking URI."""

    def __init__(self) -> None:
        self.tracking_uri = ""

    start = _without_effect(Journal.start)
    log = _without_effect(Journal.log)
    artifact = _without_effect(Journal.artifact)
    image = _without_effect(Journal.image)
    model = _without_effect(Journal.model)
    finish = _without_effect(Journal.finish)
    deliver_later = _without_effect(Journal.deliver_later)
    close = _without_effect(Journal.close)


def flatten(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Makes one level of many: {'optimizer': {'lr': 0.1}, 'a': [1]} -> {'optimizer.lr': 0.1, 'a.0': 1}.

    Empty sections and lists are kept as they are, and two ways to one key are kept apart, so that no value is lost.
    """
    flat: dict[str, Any] = {}
    for key, value in leaves(config):
        names = itertools.chain([key], (f"{key}#{count}" for count in itertools.count(2)))
        flat[next(name for name in names if name not in flat)] = value
    return flat


def has_figures(folder: Path) -> bool:
    """Whether the training in a run folder came so far that it has logged figures."""
    try:
        with RunFolder(folder).journal.open("rb") as lines:
            return any(read_line(line).get("kind") == "metrics" for line in lines)
    except OSError:
        return False


def _as_text(key: str, value: Any) -> str:
    """A param's value as MLflow shows it: text, without secrets and without addresses that change at each start."""
    if is_secret(key, value):
        return "***"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return redact(str(value))
