"""Command lines of dtrain by forking one process that has imported torch: a second of a processor each, not six.

What is forked does what `python -m dtrain ARGUMENTS` does, with arguments, environment, folder, files, signals and a
session of its own. What tells the two apart: /proc shows the command line and the environment of the process it was
forked from, all that it forks hash texts alike, and exit handlers of libraries that were imported before do not run.
"""

import gc
import json
import os
import queue
import runpy
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Forked:
    """A process, with as much of subprocess.Popen as tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, status: int) -> None:
        self.returncode = status
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode


class Forks:
    """The process to fork from; it ends with this one.

    Args:
        env: Its environment.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=dict(env), text=True, bufsize=1, process_group=0, **pipes
        )
        self._begun: queue.Queue[Forked] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> Forked:
        """`python -m dtrain ARGUMENTS`."""
        assert self._server.stdin is not None
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err)}
        self._server.stdin.write(json.dumps(request) + "\n")
        return self._begun.get(timeout=200)

    def _listen(self) -> None:
        assert self._server.stdout is not None
        living: dict[int, Forked] = {}
        for line in self._server.stdout:
            pid, status = json.loads(line)
            if status is None:
                living[pid] = Forked(pid)
                self._begun.put(living[pid])
            else:
                living.pop(pid).end(status)


def serve() -> dict[str, Any]:
    """Fork whenever it is asked for; returns in what was forked, with what that is to be."""
    living: set[int] = set()
    while True:
        if select.select([0], [], [], 0.02 if living else None)[0]:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                return dict(json.loads(line))
            living.add(pid)
            print(json.dumps([pid, None]), flush=True)
        for pid in [*living]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                living.remove(pid)
                print(json.dumps([pid, os.waitstatus_to_exitcode(status)]), flush=True)


def become(request: Mapping[str, Any]) -> None:
    """Be a process that was started for this request alone."""
    os.setsid()
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        file = os.open(path, flags)
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    own = {*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path(__file__).parent)}
    os.environ.clear()
    os.environ.update(request["env"])
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [request["cwd"], *path, *(part for part in sys.path if part not in own)]
    sys.argv[:] = ["dtrain", *request["arguments"]]
    sys.orig_argv[:] = [sys.executable, "-m", "dtrain", *request["arguments"]]
    for part in path:
        if (hook := Path(part) / "sitecustomize.py").exists():
            runpy.run_path(str(hook))
            break
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import torch._dynamo  # noqa: F401  what optimizers and DDP import when they are first used
    import torchmetrics  # noqa: F401

    gc.collect()
    gc.freeze()
    become(serve())
