"""Figures of a machine other than rank 0's: a process there samples them into the run folder, for rank 0's sender."""

import argparse
import contextlib
import json
import logging
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.tracking import mlflow_store
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.start_sender import child_environment
from dtrain.tracking.system_metrics import collected

_log = logging.getLogger(__name__)
_NICENESS = 19  # the processor is the ranks'
_NODES_AT_FULL_RATE = 16  # of more, each is sampled less often: a sender can take in only so much


class NodeMetrics:
    """Samples this machine in a process of its own, from `start` to `finish`, or until this process has gone."""

    def __init__(self, folder: Path, node: str, nodes: int) -> None:
        self._folder, self._node = Path(folder).absolute(), node
        self._every = -(-nodes // _NODES_AT_FULL_RATE)  # sampling intervals
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin. A run can do without: where the process cannot be started, nothing happens."""
        command = [sys.executable, "-P", "-m", "dtrain.tracking.node_metrics", str(self._folder), self._node]
        command += ["--every", str(self._every)]
        quiet = subprocess.DEVNULL
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, env=child_environment({}), stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, process_group=0
            )

    def finish(self) -> None:
        """End it, whatever it is at: a training that was short does not wait until it has imported mlflow."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def main(arguments: Sequence[str] | None = None) -> int:
    """The process: a line of figures whenever it is time to, until its standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.tracking.node_metrics", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("node")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="sampling intervals between two samples")
    options = parser.parse_args(arguments)
    os.nice(max(0, _NICENESS - os.nice(0)))
    monitor = mlflow_store.machine_monitor()
    every_seconds = monitor.sampling_interval * monitor.samples_before_logging * options.every
    path = RunFolder(options.folder).node_metrics(re.sub(r"[^\w.-]", "_", options.node))
    while True:
        with contextlib.suppress(OSError):  # a full disk, or a folder that is not there yet
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "values": collected(monitor)}) + "\n")
        if select.select([sys.stdin], [], [], every_seconds)[0]:
            return 0


if __name__ == "__main__":
    sys.exit(main())
