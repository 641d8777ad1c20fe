"""Shows what several ranks print as whole lines with rank and time, and keeps it in one file per rank."""

import os
import re
import select
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dtrain.reporting.events import pass_on
from dtrain.tracking.secrets import redact

MAX_LINE_BYTES = 1 << 20  # of a line that does not end
MAX_PENDING_CHARACTERS = 1 << 26  # of what waits for a rank's file to be opened
ONLY_LOGGED = "\x1e"  # begins a line that goes into the rank's log, and not to the screen
POLL_SECONDS = 1.0  # between two looks whether a rank's file may be opened
DRAIN_SECONDS = 2.0  # what a dead rank wrote is read in milliseconds; a child of its that lives on is not waited for
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


class Console:
    """The one writer to this terminal or batch log; in `log_folder` each rank's lines go into rank-N.log."""

    def __init__(self, log_folder: Path, is_terminal: bool) -> None:
        self.log_folder = log_folder
        self._clear = "\r\x1b[K" if is_terminal else ""  # of a bar that stands where the next line goes
        self._lock = threading.Lock()
        self._readers: list[tuple[threading.Thread, int]] = []

    def listen(self, pipe: Path, rank: int, mark: Path | None = None) -> None:
        """Make a pipe for a rank, and show and keep what comes through it.

        The rank's file is opened once `mark` is there: a new training first moves an old folder aside.
        """
        os.mkfifo(pipe)
        held = os.open(pipe, os.O_RDWR)  # so that the pipe does not end before its writer has come
        end = os.open(pipe, os.O_RDONLY)
        log = _Log(self.log_folder / f"rank-{rank}.log", mark)
        reader = threading.Thread(target=self._read, args=(end, rank, log), name=f"rank {rank}", daemon=True)
        reader.start()
        self._readers.append((reader, held))

    def drain(self) -> None:
        """The ranks have ended: what they have written is shown and kept to its last byte."""
        for _, held in self._readers:
            os.close(held)
        end = time.monotonic() + DRAIN_SECONDS
        for reader, _ in self._readers:
            reader.join(max(0.0, end - time.monotonic()))
        self._readers.clear()

    def say(self, text: str) -> None:
        """A message of the launcher's own, on stderr."""
        with self._lock:
            _write(2, f"{self._clear}{text}\n".encode(errors="backslashreplace"))

    def _read(self, end: int, rank: int, log: "_Log") -> None:
        rest = b""
        while True:
            if not select.select([end], [], [], POLL_SECONDS if log.pending else None)[0]:
                log.write("")
                continue
            if not (chunk := os.read(end, 1 << 16)):
                break
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                whole, newline, rest = rest, b"\n", b""
            if newline:
                self._show(whole.split(b"\n"), rank, log)
        if rest:
            self._show([rest], rank, log)
        os.close(end)
        log.close()

    def _show(self, raw: list[bytes], rank: int, log: "_Log") -> None:
        lines = [redact(line.decode(errors="backslashreplace")) for line in raw]
        lines = [line for line in lines if not pass_on(line)]
        log.write("".join(f"{line.removeprefix(ONLY_LOGGED)}\n" for line in lines))
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = ""
        for line in [line for line in lines if not line.startswith(ONLY_LOGGED)]:
            visible = line.rstrip("\r").rpartition("\r")[2]  # of a bar that redraws itself, its last state
            timestamp = "" if _TIMESTAMP.match(visible) else f"{now}  "
            text += f"{self._clear}rank {rank}  {timestamp}{visible}\n"
        with self._lock:
            _write(1, text.encode())


class _Log:
    """One rank's file, appended to; opened late, and given up with a warning where the disk refuses."""

    def __init__(self, path: Path, mark: Path | None) -> None:
        self._path, self._mark = path, mark
        self._file: int | None = None
        self._is_lost = False
        self.pending = ""  # what may not be written yet

    def write(self, text: str) -> None:
        self.pending += text
        if self._mark is None or self._mark.exists() or len(self.pending) > MAX_PENDING_CHARACTERS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            os.close(self._file)

    def _flush(self) -> None:
        text, self.pending = self.pending, ""
        if self._is_lost or not text:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.write(self._file, text.encode(errors="backslashreplace"))
        except OSError as error:
            print(f"dtrain launch: {self._path} is not written: {error.strerror}", file=sys.stderr, flush=True)
            self._is_lost = True


def _write(stream: int, data: bytes) -> None:
    """All of it; where the reader went away (`| head`), nothing: the files have it."""
    with suppress(OSError):
        while data:
            data = data[os.write(stream, data) :]
