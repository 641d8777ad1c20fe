"""How a process ends: with its true status, and together with its parent."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from dtrain.distributed.exit_status import FAILED, status_of
from dtrain.distributed.stop_request import SIGNALS

LOOK_SECONDS = 0.5  # how often a process looks after its parent, where the system cannot tell it
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_to_end(run: Callable[[], int]) -> int:
    """Do a process's work, and see that it ends with the status of that, whatever comes afterwards.

    Python's own end is cut short after the last exit handler: native threads of torch abort it now and then, and a
    signal kills it, since it gives up its handlers first. Before that it waits for threads, which a signal ends.
    """
    status = FAILED

    def end(*_: object) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # what is registered later, as by a user's modules, runs before
    try:
        status = run()
    except SystemExit as error:
        status = status_of(error)
        raise
    for number in SIGNALS:
        signal.signal(number, end)
    return status


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that one ends; 0 for a parent that is unknown."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(FAILED)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif parent:
        threading.Thread(target=watch, daemon=True).start()
    if parent and os.getppid() != parent:  # it died before it was watched
        os._exit(FAILED)
