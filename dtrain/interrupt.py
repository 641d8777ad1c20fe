"""A request to stop, made by a signal: only a flag, which the loop reads between two steps; knows no training."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REPEAT_SECONDS = 0.5  # launchers deliver one signal several times within milliseconds


class StopRequest:
    """True once a signal has come; `reason` names it. A second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.reason = ""
        self._first_seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.reason:
            self.reason, self._first_seconds = f"signal {signal.Signals(number).name}", now
        elif number == signal.SIGINT and now - self._first_seconds > REPEAT_SECONDS:
            raise KeyboardInterrupt


def leave_to_parent(parent: int, _worker: int = 0) -> None:
    """For loader workers: schedulers and terminals signal every process of a job; when to stop is the rank's word.

    The rank's own word is SIGTERM, too: torch and Python end workers with it, and wait until they are gone. And a
    worker ends with its rank: it has the rank's connections open, by which the other ranks tell whether that one lives.

    Args:
        parent: The process that forks or spawns this one; 0 where a fork server does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:  # it died before it was watched
        os._exit(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
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
