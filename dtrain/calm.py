"""Before this process forks, its threads of C++ come to rest, so that a child inherits no lock; knows no ranks."""

import functools
import os
import threading
import time

PATIENCE_SECONDS = 0.5  # one that spins for ever, as OpenMP's may, must not keep workers from being started
_LOOK_SECONDS = 0.0005

_impatient_until = 0.0  # the next workers of a loader are not waited for again where the first one was in vain


@functools.cache
def calm_forks() -> None:
    """From now on a fork of this process, such as that of a loader's worker, waits for its threads of C++ to rest.

    Those of gloo let go of a collective's tensors after the ranks went on. They need a thread state of Python for it,
    and before Python 3.11.10 the lock on the list of these stays locked in a child that is forked meanwhile, which then
    waits for ever (github.com/python/cpython/issues/112275): 3 of about 3,600 forks after a broadcast on two busy
    cores. Locks of C libraries are inherited like that by all, such as the one that C++ takes when it does something
    for the first time (github.com/pytorch/pytorch/issues/130610). Threads of Python are not waited for, since they may
    work for minutes: what ours use of C++ is used before, see `Checkpoints.check`.
    """
    os.register_at_fork(before=wait_for_calm)


def wait_for_calm() -> None:
    """Return when no thread of C++ runs, or after PATIENCE_SECONDS; soon where the system tells nothing of them."""
    global _impatient_until
    if time.monotonic() < _impatient_until:
        return
    end = time.monotonic() + PATIENCE_SECONDS
    calm = 0
    while calm < 2 and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)  # which lets go of the interpreter: a thread that waits for it only seems to rest
        calm = 0 if _is_one_at_work() else calm + 1
    if calm < 2:
        _impatient_until = time.monotonic() + 1.0


def _is_one_at_work() -> bool:
    """Whether a thread that is none of Python's runs, or waits for a disk."""
    pythons = {str(thread.native_id) for thread in threading.enumerate()}
    pythons.add(str(threading.get_native_id()))  # else unknown in a process that was itself forked
    try:
        with os.scandir("/proc/self/task") as tasks:
            return any(_state(task.path) in b"RD" for task in tasks if task.name not in pythons)
    except OSError:
        return False


def _state(task: str) -> bytes:
    """The letter by which Linux tells what a thread does; there may be hundreds, at each fork."""
    try:
        with open(f"{task}/stat", "rb", buffering=0) as stat:
            return stat.read(512).rpartition(b") ")[2][:1] or b"X"  # after the name, which may hold anything
    except OSError:  # it has ended
        return b"X"
