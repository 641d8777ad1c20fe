"""Where loader workers are, asked by a signal when a training hangs; knows no loader and no training."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
from pathlib import Path

# No scheduler, shell or library sends it. faulthandler answers it in C: also where Python hangs.
ASK = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else 0
ANSWER_SECONDS = 0.5
_NAME = "dtrain-stacks"


def begin_to_answer() -> None:
    """In a worker: from now on write the Python stacks of all threads into a file in memory when asked."""
    if ASK and hasattr(os, "memfd_create"):
        signal.signal(ASK, signal.SIG_IGN)  # who sees the file may ask
        faulthandler.register(ASK, os.memfd_create(_NAME))


def stacks_of_workers() -> dict[str, str]:
    """The Python stacks of this process's workers, and of other daemon processes that it has started, by name."""
    pids = [child.pid for child in multiprocessing.active_children() if child.daemon and child.pid]
    answers = {pid: _answer_of(pid) for pid in pids}
    for pid, answer in answers.items():
        if answer is not None:  # else the signal would end it
            with contextlib.suppress(OSError):
                os.kill(pid, ASK)
    if answers:
        time.sleep(ANSWER_SECONDS)
    return {f"worker {pid}": _read(answer) for pid, answer in answers.items()}


def _answer_of(pid: int) -> Path | None:
    """The file in which a worker answers."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if _NAME in str(link.readlink()):
                return link
    return None


def _read(answer: Path | None) -> str:
    if answer is None:
        return "has not begun its work, or is no loader's\n"
    with contextlib.suppress(OSError):
        if text := answer.read_text(errors="replace"):
            return text
    return "does not answer: it is stopped, waits for a disk, or is gone\n"
