"""The process that feeds one tracker of a config from a run's journal: `python -m dtrain.launch.tracker`."""

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.config.errors import ConfigError, KeyPath, to_plain
from dtrain.config.load import load_config
from dtrain.config.schema import calls, refused
from dtrain.distributed.process import end_with
from dtrain.tracking.retry import Retry
from dtrain.tracking.run_folder import RunFolder, read_line, read_run
from dtrain.tracking.secrets import Redacted, redact
from dtrain.tracking.tracker_processes import memory_file
from dtrain.tracking.whole_file import write_json

_LOOK_EVERY_SECONDS = 0.2
_TRIES = 4  # in a row that fail; then the rest is left to `dtrain sync`
_NICENESS = 19
_STDIN = 0  # the sender's pipe, which ends when nobody writes the journal any more
_log = logging.getLogger(__name__)


def trackers(config: ConfigDict) -> list[str]:
    """The names of a config's trackers, in order."""
    return [str(call.name) for key, call in calls(config).items() if key.startswith("trackers.")]


def require_trackers(config: ConfigDict) -> None:
    """Make each tracker, without starting it.

    Raises:
        ConfigError: Its package is missing, its constructor fails, or it has no method `log`.
    """
    for number, name in enumerate(trackers(config)):
        if not callable(getattr(_made(config, number), "log", None)):
            raise refused(config, _path(config, number), f"{name} has no method log(step, figures)")


def _made(config: ConfigDict, number: int) -> Any:
    """The tracker; of a package that is missing the error says no more than that."""
    try:
        return build(config, f"trackers.{number}")
    except ConfigError as error:
        if isinstance(error.__cause__, ImportError):
            raise refused(config, _path(config, number), str(error.__cause__)) from error.__cause__
        raise


def _path(config: ConfigDict, number: int) -> KeyPath:
    return calls(config)[f"trackers.{number}"].path


def main(arguments: Sequence[str] | None = None) -> int:
    """Feed the tracker until the run has ended; 0: it has everything, 1: not so, and `trackers/` says why."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launch.tracker", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("number", type=int, metavar="NUMBER", help="which of the config's trackers, from 0")
    options = parser.parse_args(arguments)
    end_with(os.getppid())
    os.nice(max(0, _NICENESS - os.nice(0)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.redirect_stderr(Redacted(sys.stderr)):
        logging.basicConfig(format="%(asctime)s %(message)s")
        if str(Path.cwd()) not in sys.path:  # for `modules:` of the current folder, as in the training
            sys.path.insert(0, str(Path.cwd()))
        config = load_config(RunFolder(options.folder).config)
        feed = Feed(options.folder, config, options.number)
        with feed.lock:  # another's, whose sender was killed, may still be at work
            return feed.follow()


class Feed:
    """Carries the journal of a run folder to one tracker, each line once, and remembers how far it came."""

    def __init__(self, folder: Path, config: ConfigDict, number: int) -> None:
        self.folder, self._config, self._number = folder, config, number
        self._memory = memory_file(folder, number, trackers(config)[number])
        self._memory.parent.mkdir(exist_ok=True)
        self._memory.unlink(missing_ok=True)  # a new start begins without the old problem
        self.lock = FileLock(self._memory.with_suffix(".lock"))
        self._place = os.open(self._memory.with_suffix(".offset"), os.O_RDWR | os.O_CREAT, 0o644)
        self._tracker: Any = None
        self._retry = Retry(0.5)
        self._status = ""  # how the run ended, after the journal's last line

    def follow(self) -> int:
        """Deliver until the run has ended or nothing more can come."""
        with RunFolder(self.folder).journal.open("rb") as journal:
            offset = int(os.pread(self._place, 20, 0) or 0)
            journal.seek(offset if offset <= os.fstat(journal.fileno()).st_size else 0)
            is_over = False
            while True:
                try:
                    is_at_end = self._retry.is_due() and self._deliver(journal)
                except Exception as error:
                    self._tell(error)
                    if isinstance(error, ImportError | ConfigError) or self._retry.failures >= _TRIES:
                        return 1
                    is_at_end = False
                if is_at_end and (self._status or is_over):
                    return self._end()
                if is_at_end or self._retry.failures:
                    is_over = self._wait() or is_over

    def _deliver(self, journal: Any) -> bool:
        """Send the lines that are there; whether all are sent."""
        while True:
            begins = journal.tell()
            line = journal.readline()
            if not line.endswith(b"\n"):
                journal.seek(begins)
                return True
            try:
                with self._retry.attempt():
                    self._send(read_line(line))
            except BaseException:
                journal.seek(begins)
                raise
            os.pwrite(self._place, b"%020d" % journal.tell(), 0)

    def _send(self, entry: Mapping[str, Any]) -> None:
        kind = entry.get("kind")
        if kind in ("start", "end"):
            self._status = entry.get("status", "") if kind == "end" else ""
        if kind == "metrics":
            self._started().log(int(entry["step"]), {key: float(value) for key, value in entry["values"].items()})
        elif (
            kind == "image" and hasattr(self._started(), "picture") and (path := self.folder / entry["path"]).is_file()
        ):
            self._tracker.picture(int(entry["step"]), entry["key"], str(path))

    def _started(self) -> Any:
        """The tracker, made and started when there is something for it."""
        if self._tracker is None:
            tracker = _made(self._config, self._number)
            if hasattr(tracker, "start"):
                tracker.start({**to_plain(self._config), "run": self._run()})
            self._tracker = tracker
        return self._tracker

    def _run(self) -> dict[str, Any]:
        """What a tracker is told of the run: `step` is the last one that it has from earlier starts, else None."""
        facts, last = read_run(self.folder), None
        with RunFolder(self.folder).journal.open("rb") as lines:
            for line in lines.read(int(os.pread(self._place, 20, 0) or 0)).splitlines():
                entry = read_line(line)
                if entry.get("kind") == "metrics":
                    last = max(entry["step"], last or 0)
                elif entry.get("from_step") is not None and last is not None:
                    last = min(last, entry["from_step"])
        known = {"id": facts.get("id"), "name": facts.get("run_name"), "experiment": facts.get("experiment")}
        return {**known, "folder": str(self.folder), "step": last}

    def _wait(self) -> bool:
        """Wait a moment; whether the sender says that nobody writes the journal any more."""
        if not select.select([_STDIN], [], [], _LOOK_EVERY_SECONDS)[0]:
            return False
        if os.read(_STDIN, 1):
            return False
        time.sleep(_LOOK_EVERY_SECONDS if self._retry.failures else 0)
        return True

    def _end(self) -> int:
        status = self._status or str(read_run(self.folder).get("state") or "FAILED")
        if self._tracker is not None and hasattr(self._tracker, "end") and status != "RUNNING":
            try:
                self._tracker.end(status)
            except Exception as error:
                self._tell(error)
                return 1
        return 0

    def _tell(self, error: Exception) -> None:
        """Leave the first problem where rank 0 finds it, and all of them in the sender's log."""
        text = error.mistakes[0].text if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        line = " ".join(redact(text).split())[:300]
        _log.warning("%s: %s", self._memory.stem, line)
        with contextlib.suppress(OSError):
            if not self._memory.exists():
                write_json(self._memory, {"problem": line})


if __name__ == "__main__":
    exit_status = main()
    sys.stderr.flush()
    os._exit(exit_status)
