"""Command lines of dtrain by forking one process that has imported torch: a second of a processor each, not six.

What is forked does what `python -m dtrain ARGUMENTS` does (or `python -c CODE`), with arguments, environment, folder,
files, signals and a session of its own. What tells the two apart: /proc shows the command line and the environment of
the process it was forked from, all that it forks hash texts alike, and exit handlers of libraries that were imported
before do not run.

    python forks.py SERVER WORDS ...    stands for `python WORDS ...` in a shell
"""

import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Forked:
    """A process, with as much of subprocess.Popen as tests use.

    Args:
        server: The socket of a server of forks.
        words: `-m dtrain ARGUMENTS ...` or `-c CODE`.
        files: Its standard input, output and error.
    """

    def __init__(
        self, server: str, words: Sequence[str], cwd: str, env: Mapping[str, str], files: tuple[int, int, int]
    ) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(server)
        socket.send_fds(self._server, [b"x"], files)
        request = {"words": list(words), "cwd": cwd, "env": dict(env)}
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._receive()
        self.returncode: int | None = None

    def _receive(self) -> int:
        return int(self._server.recv(16, socket.MSG_WAITALL))

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)
            self.returncode = self._receive()
            self._server.close()
        return self.returncode


class Forks:
    """The process to fork from; it ends with this one.

    Args:
        env: Its environment.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.address = str(Path(tempfile.mkdtemp(prefix="forks-")) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", self.address], env=dict(env), stdin=subprocess.PIPE, process_group=0
        )
        while not Path(self.address).exists():
            assert self._process.poll() is None
            time.sleep(0.02)

    def start(self, words: Sequence[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> Forked:
        """`python WORDS ...`."""
        with out.open("wb") as to_out, err.open("wb") as to_err, open(os.devnull) as nothing:
            files = (nothing.fileno(), to_out.fileno(), to_err.fileno())
            return Forked(self.address, words, str(cwd), env, files)


def serve(address: str) -> tuple[dict[str, Any], list[int]]:
    """Fork whenever it is asked for; returns in what was forked, with what that is to be, and its files."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + "-")
    listener.listen(64)
    Path(address + "-").rename(address)  # it is there when it answers
    living: dict[int, socket.socket] = {}
    while True:
        ready = select.select([0, listener], [], [], 0.02 if living else None)[0]
        if 0 in ready:  # the tests have ended
            shutil.rmtree(Path(address).parent)
            os._exit(0)
        if ready:
            client = listener.accept()[0]
            files = socket.recv_fds(client, 1, 3)[1]
            request = json.loads(client.makefile().readline())
            pid = os.fork()
            if pid == 0:
                listener.close()
                for each in (client, *living.values()):
                    each.close()
                return request, files
            for file in files:
                os.close(file)
            living[pid] = client
            _send(client, pid)
        for pid in [*living]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _send(living[pid], os.waitstatus_to_exitcode(status))
                living.pop(pid).close()


def _send(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # who asked for it is gone
        client.sendall(b"%16d" % number)


def become(request: Mapping[str, Any], files: Sequence[int]) -> None:
    """Be a process that was started for this request alone."""
    os.setsid()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    own = {*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path(__file__).parent)}
    os.environ.clear()
    os.environ.update(request["env"])
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [request["cwd"], *path, *(part for part in sys.path if part not in own)]
    option, text, *arguments = request["words"]
    sys.argv[:] = [text if option == "-m" else "-c", *arguments]
    sys.orig_argv[:] = [sys.executable, *request["words"]]
    for part in path:
        if (hook := Path(part) / "sitecustomize.py").exists():
            runpy.run_path(str(hook))
            break
    if option == "-m":
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), vars(sys.modules["__main__"]))  # it is the test's own


def stand_in(server: str, words: Sequence[str]) -> int:
    """Be in a shell what `python WORDS ...` would be; notes the process for whoever is to look for what it leaves."""
    forked = Forked(server, words, str(Path.cwd()), os.environ, (0, 1, 2))
    with Path(os.environ["FORKED_PIDS"]).open("a") as file:
        file.write(f"{forked.pid}\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(forked.pid, number))
    status = forked.wait()
    return 128 - status if status < 0 else status  # as a shell says it


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
    import torch._dynamo  # noqa: F401  what optimizers and DDP import when they are first used
    import torchmetrics  # noqa: F401

    with contextlib.suppress(ImportError):
        import sklearn.datasets  # noqa: F401  where the digits are

    gc.collect()
    gc.freeze()
    become(*serve(sys.argv[2]))
