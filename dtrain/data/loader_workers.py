"""Loader worker processes: how they are forked, which signals they heed, where they are when a training hangs."""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.distributed.process import end_with
from dtrain.distributed.stop import SIGNALS


@contextmanager
def held_back() -> Iterator[None]:
    """What is started meanwhile begins with the signals blocked, until it says itself what they are to do there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(parent: int) -> None:
    """For loader workers: schedulers and terminals signal every process of a job; when to stop is the rank's word.

    The rank's own word is SIGTERM, too: torch and Python end workers with it, and wait until they are gone. And a
    worker ends with its rank: it has the rank's connections open, by which the other ranks tell whether that one lives.

    Args:
        parent: The process that forks or spawns this one; 0 where a fork server does.
    """
    end_with(parent)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS} - {signal.SIGTERM})
    threading.Thread(target=_await_parents_word, daemon=True).start()


def _await_parents_word() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def end_workers() -> None:
    """Kill the loader workers, which ignore milder signals; they hold nothing that could be lost."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an accident
    for child in multiprocessing.active_children():
        child.kill()


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
