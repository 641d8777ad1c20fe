"""Ranks that are started before it is known as which they are needed: they import all, and wait for word.

So the ranks of a spare node begin at once when it takes the place of a lost one.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


class ReadyRanks:
    """The processes of a launcher that wait; what it then starts as a rank is one of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._waiting: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Have as many as the node has ranks; by the thread that is their parent for good."""
        command = [sys.executable, "-m", "dtrain.launch.ready_rank"]
        while len(self._waiting) < self._count:
            self._waiting.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))

    def take_over(self, start: Any) -> Any:
        """What `start` returns, which starts ranks by torch's handler: those that wait are taken for them."""
        own = SubprocessHandler._popen

        def popen(handler: SubprocessHandler, args: Sequence[str], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
            while self._waiting:
                process = self._waiting.pop()
                assert process.stdin is not None
                with suppress(OSError):  # it was killed meanwhile
                    process.stdin.write(json.dumps([list(args[3:]), dict(env)]).encode() + b"\n")
                    process.stdin.close()
                    return process
            return own(handler, tuple(args), dict(env))

        SubprocessHandler._popen = popen  # type: ignore[method-assign, assignment]
        try:
            return start()
        finally:
            SubprocessHandler._popen = own  # type: ignore[method-assign]

    def close(self) -> None:
        """End those that were not needed."""
        for process in self._waiting:
            process.kill()
            process.wait()
        self._waiting.clear()


def main() -> None:
    """Import what ranks import, hear of the place among them, and be one: `python -m dtrain` as started then."""
    from dtrain.distributed.process import end_with

    end_with(os.getppid())
    import torch._dynamo  # noqa: F401  what optimizers and DDP import when they are first used
    import torchmetrics  # noqa: F401

    import dtrain.launch.rank  # noqa: F401

    line = sys.stdin.readline()
    if not line:  # not needed
        os._exit(0)
    words, environment = json.loads(line)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = words
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
