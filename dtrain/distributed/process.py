"""How a process ends: with its true status, with its launcher, and leaving word for it."""

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dtrain.distributed.environment import environment
from dtrain.distributed.exit_status import STOPPED_EARLY
from dtrain.distributed.stop import REPEAT_SECONDS, SIGNALS

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_to_end(run: Callable[[], int]) -> int:
    """Do a process's work, and see that it ends with the status of that, whatever comes afterwards.

    Python's own end is cut short after the last exit handler: C++ threads of torch abort it now and then, and a signal
    kills it, since it gives up its handlers first. Before that it waits for threads, which a signal ends.
    """
    status = 1

    def end(*_: object) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # what is registered later, as by a user's modules, runs before
    try:
        status = run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    for number in SIGNALS:
        signal.signal(number, end)
    return status


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that one ends.

    Args:
        parent: Its process; 0 where that is unknown.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if parent and os.getppid() != parent:  # it died before it was watched
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(REPEAT_SECONDS)
    os._exit(1)


VARIABLE = "DTRAIN_LAUNCH"  # in a rank's environment: what follows, as JSON


class Launch(NamedTuple):
    """What a launcher tells its ranks.

    Attributes:
        pid: The launcher's process.
        folder: Where launcher and ranks leave files for one another; on this machine, for one start of the ranks.
        starts: How often the ranks of this job were started, this time included.
        log_folder: Where the launcher writes what the ranks print; '' where it does not.
    """

    pid: int
    folder: str
    starts: int
    log_folder: str

    def pipe(self, local_rank: int) -> Path:
        """Where a rank's output goes, if it is there."""
        return Path(self.folder) / f"{local_rank}.pipe"

    def mark(self, local_rank: int) -> Path:
        """There once the rank has done a step."""
        return Path(self.folder) / f"{local_rank}.begun"

    @property
    def closing(self) -> Path:
        """There once a rank has failed, and the others are ended for it."""
        return Path(self.folder) / "closing"

    def word(self, local_rank: int) -> Path:
        """Holds the rank's exit status once it has ended by itself."""
        return Path(self.folder) / f"{local_rank}.status"


_launch: Launch | None = None
_mark: Path | None = None  # to be left at the first step
_is_heard = False  # whether the launcher reads what this rank prints; of rank 0 on a terminal it does not


def as_rank(main: Callable[[], int]) -> int:
    """Run `main` as one rank of a launcher.

    Returns:
        The exit status for torchrun's agent, which takes all but 0 for a failure, and ends the other ranks, perhaps in
        the middle of their saving: so a rank that stopped early says 0. The true status is left for the launcher.
    """
    global _launch, _mark, _is_heard
    launch = Launch(**json.loads(os.environ.pop(VARIABLE)))
    end_with(launch.pid)
    # The launcher makes a store for each start: torch takes the first one for all, with what dead ranks left on it.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(launch.starts - 1)
    local_rank = environment().local_rank
    _is_heard = _speak_into(launch.pipe(local_rank))
    _launch, _mark = launch, launch.mark(local_rank)
    status = 1
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        launch.word(local_rank).write_text(str(status))
    return 0 if status == STOPPED_EARLY else status


def note_step() -> None:
    """Called after each step; the first one is told to the launcher, which restarts nothing that never got there."""
    global _mark
    if _mark is not None:
        _mark.touch()
        _mark = None


def is_closed_for_another() -> bool:
    """Whether the SIGTERM that came is no request to stop: another rank has failed, and the launcher ends the rest."""
    return _launch is not None and _launch.closing.exists()


def is_written_by_launcher(log: Path) -> bool:
    """Whether this file gets all that this rank prints, from its launcher."""
    return _is_heard and _launch is not None and log.absolute() == Path(_launch.log_folder) / log.name


def _speak_into(pipe: Path) -> bool:
    """Both streams in one pipe, where there is one, line by line, so that a kill loses none and their order is kept."""
    if not pipe.exists():
        return False
    end = os.open(pipe, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(end, stream)
    os.close(end)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return True
