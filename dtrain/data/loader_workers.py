"""Loader worker processes: how they are forked, which signals they obey, how they end, where they hang."""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.distributed.affinity import free_worker
from dtrain.distributed.process import end_with
from dtrain.distributed.stop_request import SIGNALS

# ------------------------------------------------------------------------------------------- forks and native threads

KILL_SECONDS = 1.0  # within which a killed worker is gone
IDLE_WAIT_SECONDS = 0.5  # one that spins for ever, as OpenMP's may, must not keep workers from being started
_LOOK_SECONDS = 0.0005
_no_wait_until = 0.0  # the next workers of a loader are not waited for again where it was in vain for the first one


@functools.cache
def fork_when_native_threads_are_idle() -> None:
    """From now on a fork of this process, such as that of a loader worker, waits until its native threads become idle.

    Those of gloo release a collective's tensors after the ranks have continued. They need a thread state of Python for
    it, and before Python 3.11.10 the lock on the list of these stays locked in a child that is forked meanwhile, which
    then waits for ever (github.com/python/cpython/issues/112275): 3 of about 3,600 forks after a broadcast on two busy
    cores. Locks of C libraries are inherited like that in every version, such as the one that C++ takes when it does
    something for the first time (github.com/pytorch/pytorch/issues/130610). Python threads are not waited for, since
    they may work for minutes: the native code that ours use has run before, see `Checkpoints.check`.
    """
    os.register_at_fork(before=wait_for_native_threads)


def wait_for_native_threads() -> None:
    """Return when no native thread runs, or after IDLE_WAIT_SECONDS; soon where the system does not list them."""
    global _no_wait_until
    if time.monotonic() < _no_wait_until:
        return
    end = time.monotonic() + IDLE_WAIT_SECONDS
    idle_looks = 0
    while idle_looks < 2 and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)  # which releases the interpreter: a thread that waits for it only seems to be idle
        idle_looks = 0 if _native_thread_runs() else idle_looks + 1
    if idle_looks < 2:
        _no_wait_until = time.monotonic() + 1.0


def _native_thread_runs() -> bool:
    """Whether a thread that Python has not started runs, or waits for a disk."""
    python_threads = {str(thread.native_id) for thread in threading.enumerate()}
    python_threads.add(str(threading.get_native_id()))  # else unknown in a process that was itself forked
    try:
        with os.scandir("/proc/self/task") as tasks:
            return any(_task_state(task.path) in b"RD" for task in tasks if task.name not in python_threads)
    except OSError:
        return False


def _task_state(task: str) -> bytes:
    """The letter by which Linux says what a thread does; there may be hundreds, at each fork."""
    try:
        with open(f"{task}/stat", "rb", buffering=0) as stat:
            return stat.read(512).rpartition(b") ")[2][:1] or b"X"  # after the name, which may hold anything
    except OSError:  # it has ended
        return b"X"


# ------------------------------------------------------------------------------------------ a worker's start and end


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started meanwhile begins with the signals blocked, until it decides itself what they do there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(parent: int, _worker: int) -> None:
    """The first thing that a worker does. Its parent forks or spawns it; 0 where a fork server does.

    From now on it writes the Python stacks of all threads into a file in memory when asked.
    """
    obey_parent_alone(parent)
    free_worker()
    if STACKS_SIGNAL and hasattr(os, "memfd_create"):
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # who sees the file may ask
        faulthandler.register(STACKS_SIGNAL, os.memfd_create(_FILE_NAME))


def obey_parent_alone(parent: int) -> None:
    """Ignore signals, but SIGTERM from the parent; end when the parent ends.

    Schedulers and terminals signal every process of a job, but it is the rank that decides when to stop. It uses
    SIGTERM, too: torch and Python end workers with it, and wait until they are gone. A worker must not outlive its
    rank: it has the rank's connections open, by which the other ranks see whether that one lives.
    """
    end_with(parent)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS} - {signal.SIGTERM})
    threading.Thread(target=_await_sigterm_of_parent, daemon=True).start()


def _await_sigterm_of_parent() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def end_workers() -> None:
    """Kill the loader workers, which ignore milder signals; they hold nothing that could be lost."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an accident
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:  # so that nobody takes them for something that was left running
        child.join(KILL_SECONDS)


# ------------------------------------------------------------------------------------------------- where workers hang

# No scheduler, shell or library sends it. faulthandler answers it in C: also where Python hangs.
STACKS_SIGNAL = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else 0
ANSWER_SECONDS = 1.5  # so long they have; a machine on which a training hangs may be busy
_FILE_NAME = "dtrain-stacks"
_NO_ANSWER = "does not answer: it is stopped, waits for a disk, or is gone\n"


def stacks_of_workers() -> dict[str, str]:
    """The Python stacks of this process's workers, and of other daemon processes that it has started, by name."""
    pids = [child.pid for child in multiprocessing.active_children() if child.daemon and child.pid]
    files = {pid: _stacks_file(pid) for pid in pids}
    for pid, file in files.items():
        if file is not None:  # else the signal would end it
            with contextlib.suppress(OSError):
                os.kill(pid, STACKS_SIGNAL)
    end, before = time.monotonic() + ANSWER_SECONDS, dict[str, str]()
    while True:
        time.sleep(0.1 if files else 0.0)
        texts = {f"worker {pid}": _stacks_text(file) for pid, file in files.items()}
        if time.monotonic() >= end or (texts == before and _NO_ANSWER not in texts.values()):
            return texts
        before = texts


def _stacks_file(pid: int) -> Path | None:
    """The file into which a worker writes its stacks."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if _FILE_NAME in str(link.readlink()):
                return link
    return None


def _stacks_text(file: Path | None) -> str:
    if file is None:
        return "has not begun its work, or is not a loader worker\n"
    with contextlib.suppress(OSError):
        if text := file.read_text(errors="replace"):
            return text
    return _NO_ANSWER
