"""The processes that feed other trackers than MLflow: one for each, started and ended by the sender."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json, write_json

MODULE = "dtrain.launch.tracker"  # of which each process is one, for a tracker of the run's config
_PATIENCE_SECONDS = 10.0  # with one that is still at work when all else is done
_LOOK_EVERY_SECONDS = 0.1
_log = logging.getLogger(__name__)


class TrackerProcesses:
    """Those of one run. A tracker that raises, hangs or kills its process harms nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = [str(name) for name in read_run(folder).get("trackers") or ()]
        self._files = [memory_file(folder, number, name) for number, name in enumerate(names)]
        self._processes = [self._start(number) for number in range(len(names))]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        """Its standard input ends with this process, or when nobody writes the journal any more."""
        command = [sys.executable, "-P", "-m", MODULE, str(self._folder), str(number)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def follow(self, parent: int) -> None:
        """Wait until they have ended by themselves, as long as rank 0 lives: for a sender that can do nothing else."""
        while os.getppid() == parent and any(process.poll() is None for process in self._processes):
            time.sleep(_LOOK_EVERY_SECONDS)

    def finish(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Let them send what is left, end those that do not, and leave a word about each that lacks something."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        end = time.monotonic() + patience_seconds
        for process, file in zip(self._processes, self._files, strict=True):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                _tell(file, f"it was still at work {patience_seconds:.0f} s after all else, and was ended")
            if process.returncode > 0:
                _tell(file, f"its process ended with exit status {process.returncode}")


def memory_file(folder: Path, number: int, name: str) -> Path:
    """Where a tracker's process leaves why not everything is there: `problem`."""
    return RunFolder(folder).trackers / f"{number}-{name.replace(':', '.').rpartition('.')[2]}.json"


def problems(folder: Path) -> dict[str, str]:
    """By tracker, why it does not have everything."""
    found: dict[str, Any] = {}
    for file in sorted(RunFolder(folder).trackers.glob("*.json")):
        if problem := read_json(file).get("problem"):
            number, _, name = file.stem.partition("-")
            found[f"trackers[{number}], {name}"] = problem
    return found


def _tell(file: Path, problem: str) -> None:
    """Leave a problem, unless the process has left what caused it."""
    try:
        if read_json(file).get("problem"):
            return
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"problem": problem})
    except OSError:
        _log.warning("%s: %s", file.stem, problem)
