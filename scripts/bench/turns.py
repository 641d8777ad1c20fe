"""A training program whose steps are taken in turns with those of others, so that all of them meet the same machine.

Each is started once, and its start-up timed alone. After its first steps its optimizer (clock.py) waits for the bench,
which lets one program after the other take so many steps. While others have theirs, all of its processes are stopped
(SIGSTOP): what it does behind its training, such as feeding MLflow, happens in its own turns and is timed with them.
"""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil
from clock import UNTIMED_STEPS, peak_mb

TIMEOUT_SECONDS = 300.0
QUIET_CPU_SECONDS, QUIET_SECONDS, MOST_QUIET_SECONDS = 0.03, 0.3, 20.0


class ProgramError(Exception):
    """A program that did not train; the text says why, with the end of what it printed."""


@dataclass
class Start:
    """A program from its start to its first step; of several ranks the slowest."""

    first_step_s: float
    first_step_cpu_s: float  # of the rank itself


@dataclass
class Turn:
    """Steps in a row; of several ranks the slowest."""

    step_us: float
    step_cpu_us: float  # of which a processor was at work for the rank


@dataclass
class End:
    """What is known of a program when it has ended."""

    peak_mb: list[float]  # by rank
    tree_cpu_us: float  # a step's processor time of all its processes together, in its turns; nan where it had none
    end_s: float  # from the last step to the end of its last process
    sender_mb: float  # the peak of dtrain's process that feeds MLflow; nan where there is none
    left_behind: int  # processes that outlived it


class Program:
    """A running program and the bench's connections to its ranks."""

    def __init__(self, command: Sequence[str], ranks: int, env: dict[str, str], folder: Path) -> None:
        """Start it, on a pseudo-terminal, in a folder of its own."""
        self.ranks, self.folder, self.steps = ranks, folder, 0
        self.streams: list[TextIO] = []  # by rank
        self.tree: list[psutil.Process] = []
        self.cpu_s, self.sender_mb = 0.0, float("nan")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "bench"))
        self.listener.listen(ranks)
        self.terminal = contextlib.ExitStack()
        slave = self.terminal.enter_context(terminal(folder / "terminal"))
        bench = {"BENCH_SOCKET": str(folder / "bench"), "BENCH_STARTED": str(time.perf_counter())}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env | bench,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )

    def start(self) -> Start:
        """Wait for its first steps, and until it is quiet behind them; then stop it."""
        firsts = sorted(((self._hear(stream), stream) for stream in self._connected()), key=lambda one: one[0]["rank"])
        self.streams = [stream for _, stream in firsts]
        for stream in self.streams:
            self._hear(stream)  # it waits for its first turn
        names = ("first_step_s", "first_step_cpu_s")
        figures = Start(*(max(first[name] for first, _ in firsts) for name in names))
        now, end = self._tree_cpu_s(), time.monotonic() + MOST_QUIET_SECONDS
        while time.monotonic() < end:
            time.sleep(QUIET_SECONDS)
            before, now = now, self._tree_cpu_s()
            if now - before < QUIET_CPU_SECONDS:
                break
        self._stop()
        return figures

    def turn(self, steps: int) -> Turn:
        """Let it take so many steps."""
        before = self._tree_cpu_s()
        self._signal(signal.SIGCONT)
        self._tell(steps)
        found = [self._hear(stream) for stream in self.streams]
        self.cpu_s += self._tree_cpu_s() - before
        self._stop()
        self.steps += UNTIMED_STEPS + steps
        return Turn(*(max(one[name] for one in found) for name in ("step_us", "step_cpu_us")))

    def end(self) -> End:
        """Let it take its last steps and end."""
        self._signal(signal.SIGCONT)
        begun = time.perf_counter()
        self._tell(0)
        peak_mb = [self._hear(stream)["peak_mb"] for stream in self.streams]
        self._look_at_sender()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TIMEOUT_SECONDS)
        seconds = time.perf_counter() - begun
        if self.process.returncode != 0:
            raise self._failed(f"exit status {self.process.returncode}")
        per_step_us = self.cpu_s / self.steps * 1e6 if self.steps else float("nan")
        return End(peak_mb, per_step_us, seconds, self.sender_mb, sum(map(is_alive, self.tree)))

    def close(self) -> None:
        """End what is left of it."""
        if self.listener.fileno() < 0:
            return
        self._tree_cpu_s()  # looks up its processes
        for process in self.tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in self.streams:
            stream.close()
        self.listener.close()
        self.terminal.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connected(self) -> Iterator[TextIO]:
        """A stream to each rank, as they come to their first step."""
        end = time.monotonic() + TIMEOUT_SECONDS
        self.listener.settimeout(0.1)
        for _ in range(self.ranks):
            while True:
                with contextlib.suppress(TimeoutError):
                    connection, _ = self.listener.accept()
                    break
                if self.process.poll() is not None:
                    raise self._failed(f"exit status {self.process.returncode}")
                if time.monotonic() > end:
                    raise self._failed("no first step")
            connection.settimeout(TIMEOUT_SECONDS)
            yield connection.makefile("rw")

    def _tell(self, steps: int) -> None:
        for stream in self.streams:
            stream.write(f"{steps}\n")
            stream.flush()

    def _hear(self, stream: TextIO) -> dict[str, float]:
        with contextlib.suppress(OSError):
            if line := stream.readline():
                found: dict[str, float] = json.loads(line)
                return found
        raise self._failed("a rank ended, or said nothing, before the last step")

    def _failed(self, why: str) -> ProgramError:
        if self.process.poll() is not None:
            self.terminal.close()  # so that its last words are in the copy
        shown = (self.folder / "terminal").read_text(errors="replace")[-3000:]
        log = self.folder / "run" / "logs" / "sender.log"
        return ProgramError(f"{why}\n{shown}{log.read_text(errors='replace')[-1000:] if log.exists() else ''}")

    def _tree_cpu_s(self) -> float:
        """The processor time so far of its processes and of those that they waited for."""
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            self.tree = [own, *own.children(recursive=True)]
        seconds = 0.0
        for process in self.tree:
            with contextlib.suppress(psutil.Error):
                seconds += sum(process.cpu_times()[:4])
        return seconds

    def _signal(self, number: int) -> None:
        for process in self.tree:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _stop(self) -> None:
        """Let nothing of it run any more."""
        self._signal(signal.SIGSTOP)
        end = time.monotonic() + TIMEOUT_SECONDS
        while any(map(is_running, self.tree)) and time.monotonic() < end:  # a stop takes a moment
            time.sleep(0.001)
        self._look_at_sender()

    def _look_at_sender(self) -> None:
        for process in self.tree:
            with contextlib.suppress(psutil.Error, OSError, IndexError):  # it is gone, or has no memory any more
                if "dtrain.tracking.sender" in process.cmdline():
                    self.sender_mb = peak_mb(process.pid)


@contextlib.contextmanager
def terminal(copy: Path) -> Iterator[int]:
    """A pseudo-terminal of 120 columns, whose contents go to a file, as fast as they come."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def drain() -> None:
        with copy.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # EIO: the last one closed it
            while block := os.read(master, 65536):
                file.write(block)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        yield slave
    finally:
        os.close(slave)
        reader.join(10)
        os.close(master)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there; its number may be another's by now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_running(process: psutil.Process) -> bool:
    """Whether it is there and not stopped."""
    with contextlib.suppress(psutil.Error):
        return is_alive(process) and process.status() != psutil.STATUS_STOPPED
    return False


def new_folder() -> Path:
    """A fresh folder for a program; its path is short enough for a socket's."""
    return Path(tempfile.mkdtemp(prefix="overhead-"))
