"""Before this process forks, its threads of C++ come to rest, so that a child inherits no lock; knows no ranks."""

import functools
import os
import threading
import time
from pathlib import Path

PATIENCE_SECONDS = 0.1  # one that spins for ever, as OpenMP's may, must not keep workers from being started
_LOOK_SECONDS = 0.0005


@functools.cache
def calm_forks() -> None:
    """From now on a fork of this process, such as that of a loader's worker, waits for its threads of C++ to rest.

    Those of gloo let go of a collective's tensors after the ranks went on. They need a thread state of Python for it,
    and the lock on the list of these stays locked in a child that is forked meanwhile, which then waits for ever: in
    Python 3.11, github.com/python/cpython/issues/112275; seen in one of about 5,000 forks after a broadcast. The C
    library's lock on exit handlers is inherited like that by every Python, github.com/pytorch/pytorch/issues/130610.
    """
    os.register_at_fork(before=wait_for_calm)


def wait_for_calm() -> None:
    """Return when no thread of C++ runs, or after PATIENCE_SECONDS; at once where the system tells nothing of them."""
    end = time.monotonic() + PATIENCE_SECONDS
    calm = 0
    while calm < 2 and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)  # which lets go of the interpreter: a thread that waits for it only seems to rest
        calm = 0 if _is_one_at_work() else calm + 1


def _is_one_at_work() -> bool:
    """Whether a thread that is none of Python's runs, or waits for a disk."""
    pythons = {str(thread.native_id) for thread in threading.enumerate()}
    try:
        return any(_state(task) in "RD" for task in Path("/proc/self/task").iterdir() if task.name not in pythons)
    except OSError:
        return False


def _state(task: Path) -> str:
    """The letter by which Linux tells what a thread does."""
    try:
        return (task / "stat").read_text().rpartition(") ")[2][0]  # after the name, which may hold anything
    except OSError:  # it has ended
        return "X"
