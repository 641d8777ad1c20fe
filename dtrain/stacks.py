"""Where loader workers are: asked by a signal, told through a pipe, also by one that hangs; knows no loader."""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import re
import select
import signal
import time
from pathlib import Path

# No scheduler, shell or library sends it; faulthandler answers it in C, whatever the worker is stuck in.
ASK = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else 0
FIRST_SECONDS, NEXT_SECONDS = 0.5, 0.05  # so long a worker has to begin, and to go on
ALL_SECONDS = 2.0


@functools.cache
def _pipe() -> tuple[int, int]:
    """One for all workers of this process, which are asked one by one."""
    ends = os.pipe()
    os.set_blocking(ends[1], False)  # a worker must not wait for a reader
    return ends


def answering_end() -> int:
    """Where a worker that is forked from this process writes."""
    return _pipe()[1]


def answer(end: int) -> None:
    """In a worker: write the Python stacks of all its threads there when it is asked."""
    if ASK:
        faulthandler.register(ASK, end)


def stacks_of_workers() -> dict[str, str]:
    """The Python stacks of this process's workers, as many as can be asked in ALL_SECONDS, by name."""
    end = time.monotonic() + ALL_SECONDS
    workers = multiprocessing.active_children() if ASK else []
    return {f"loader worker {one.pid}": _ask(one.pid) for one in workers if one.pid and time.monotonic() < end}


def _ask(pid: int) -> str:
    with contextlib.suppress(OSError):  # it has ended
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        if caught is None or not int(caught[1], 16) >> (ASK - 1) & 1:  # the signal would end it
            return "has not begun its work, or was not forked from its rank\n"
        os.kill(pid, ASK)
    return _read() or "does not answer: it is stopped or gone\n"


def _read() -> str:
    text = b""
    reading = _pipe()[0]
    while select.select([reading], [], [], NEXT_SECONDS if text else FIRST_SECONDS)[0]:
        text += os.read(reading, 1 << 16)
    return text.decode(errors="replace")
