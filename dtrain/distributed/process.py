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
from typing import TYPE_CHECKING

from dtrain.distributed.exit_status import FAILED, status_of
from dtrain.distributed.stop_request import SIGNALS

if TYPE_CHECKING:
    import psutil

LOOK_SECONDS = 0.5  # how often a process looks after its parent, where the system cannot tell it
GONE_SECONDS = 1.0  # within which a process that was killed is gone
# MLflow's sender and the mirror's process have work to do; the others clean up after this process.
ENDS_BY_ITSELF = (
    "dtrain.tracking.sender",
    "dtrain.tracking.mirror",
    "dtrain.launch.tracker",
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "torch_shm_manager",
)
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
    if "psutil" in sys.modules:  # else it has only looked at a config
        end_children()
    for number in SIGNALS:
        signal.signal(number, end)
    return status


def end_children() -> None:
    """End what this process has started and not ended, such as servers of a user's dataset, and say so.

    What has left this process's session was meant to live on, and does.
    """
    import psutil

    session = os.getsid(0)
    left = []
    for child in psutil.Process().children(recursive=True):
        with suppress(OSError):
            if os.getsid(child.pid) == session:
                left.append(child)
    end_processes(left)


def end_processes(processes: "list[psutil.Process]") -> None:
    """Kill processes, but those in ENDS_BY_ITSELF, and say so: forked ones take milder signals as their parent."""
    import psutil

    ended = {}
    for process in processes:
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and not any(each in words for each in ENDS_BY_ITSELF):
                ended[process] = f"{process.name()} ({process.pid})"
                process.kill()
    if ended:
        psutil.wait_procs(ended, timeout=GONE_SECONDS)
        text = f"ended what the training's code had started and left running: {', '.join(ended.values())}"
        print(text, file=sys.stderr, flush=True)


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
