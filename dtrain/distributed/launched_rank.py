"""A rank that `dtrain launch` has started: what the launcher tells it, and what it leaves for the launcher."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dtrain.distributed.environment import environment, error_file
from dtrain.distributed.exit_status import DONE, FAILED, STOPPED_EARLY, status_of
from dtrain.distributed.process import end_with

LAUNCH_VARIABLE = "DTRAIN_LAUNCH"  # in a rank's environment: what follows, as JSON


class Launch(NamedTuple):
    """What a launcher tells its ranks."""

    pid: int  # the launcher's process
    folder: str  # where launcher and ranks leave files for one another; on this machine, for one start of the ranks
    starts: int  # of the ranks of this job, this time included
    log_folder: str  # where the launcher writes what the ranks print; '' where it does not
    full_world_size: int = 0  # where nodes come and go: the ranks of all that there may be; else 0

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

    @property
    def request(self) -> Path:
        """Says why the ranks are asked to stop, where the launcher does so by itself."""
        return Path(self.folder) / "request"

    def lost(self, local_rank: int) -> Path:
        """There once the rank has ended because others were gone."""
        return Path(self.folder) / f"{local_rank}.lost"

    def status_file(self, local_rank: int) -> Path:
        """Holds the rank's exit status once it has ended by itself."""
        return Path(self.folder) / f"{local_rank}.status"


_launch: Launch | None = None
_first_step: Path | None = None  # the file that is to be made after it
_is_read = False  # whether the launcher reads what this rank prints; of rank 0 on a terminal it does not


def as_rank(main: Callable[[], int]) -> int:
    """Run `main` as one rank of a launcher; returns the exit status for torchrun's agent.

    It takes all but 0 for a failure, and ends the other ranks, perhaps in the middle of their saving: so a rank that
    stopped early says 0. The true status is left for the launcher.
    """
    global _launch, _first_step, _is_read
    launch = Launch(**json.loads(os.environ.pop(LAUNCH_VARIABLE)))
    end_with(launch.pid)
    # The launcher makes a store for each start: torch takes the first one for all, with what dead ranks left on it.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(launch.starts - 1)
    local_rank = environment().local_rank
    _is_read = _print_into(launch.pipe(local_rank))
    _launch, _first_step = launch, launch.mark(local_rank)
    status = FAILED
    try:
        status = main()
    except SystemExit as error:
        status = status_of(error)
        raise
    finally:
        launch.status_file(local_rank).write_text(str(status))
    return DONE if status == STOPPED_EARLY else status


def mark_first_step() -> None:
    """Called after each step; the launcher learns of the first one, and restarts nothing that never got there."""
    global _first_step
    if _first_step is not None:
        _first_step.touch()
        _first_step = None


def full_world_size() -> int:
    """Where nodes come and go, the number of ranks that there are when all are there; 0 elsewhere."""
    return _launch.full_world_size if _launch is not None else 0


def reason_to_stop() -> str:
    """Why the launcher asks its ranks to stop by itself; '' where it passes on what it was sent."""
    with suppress(OSError):
        return _launch.request.read_text() if _launch is not None else ""
    return ""


def leaves_to_launcher() -> bool:
    """Whether the ranks that are left start again without those that are gone, whose loss then costs nothing."""
    return full_world_size() > 0


def mark_lost() -> None:
    """This rank ends because others are gone; the launcher does not take that for a failure of its own."""
    if _launch is not None:
        with suppress(OSError):
            _launch.lost(environment().local_rank).touch()


def is_closed_for_another() -> bool:
    """Whether the SIGTERM that came was not a request to stop: another rank failed, and the launcher ends the rest."""
    return _launch is not None and _launch.closing.exists()


def is_read_by_launcher() -> bool:
    """Whether the launcher shows what this rank prints, and writes it into the rank's log."""
    return _is_read


def is_written_by_launcher(log: Path) -> bool:
    """Whether this file gets all that this rank prints, from its launcher."""
    return _is_read and _launch is not None and log.absolute() == Path(_launch.log_folder) / log.name


def tell_torchrun(line: str) -> None:
    """Leave a failure where torchrun looks for it, to repeat it as its own last words; else those say `<N/A>`."""
    if (path := error_file()) and _launch is None:
        said = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(said))


def _print_into(pipe: Path) -> bool:
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
