"""The bench's clock in a program that it measures; without torch, which the bench itself does not need."""

import atexit
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

WARM_UP_STEPS = 100
UNTIMED_STEPS = 10  # of each turn


def turns() -> Iterator[int]:
    """The numbers of the steps after which there is something to tell the bench or to wait for; it goes on from there.

    After WARM_UP_STEPS it waits for a turn of so many steps, of which the first UNTIMED_STEPS more are not timed, since
    other programs have had the processor's caches. A turn of no steps means: go on to the end.
    """
    if "BENCH_SOCKET" not in os.environ:
        return
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["BENCH_SOCKET"])
    bench = connection.makefile("rw")

    def tell(**figures: float) -> None:
        bench.write(json.dumps(figures) + "\n")
        bench.flush()

    yield 1
    # CLOCK_MONOTONIC: the same clock in all processes of a machine.
    first_step_s = time.perf_counter() - float(os.environ["BENCH_STARTED"])
    tell(
        rank=int(os.environ.get("RANK", "0")),
        pid=os.getpid(),
        first_step_s=first_step_s,
        first_step_cpu_s=time.process_time(),
    )
    atexit.register(lambda: tell(peak_mb=peak_mb("self")))
    yield (step := WARM_UP_STEPS)
    tell()
    while steps := int(bench.readline() or 0):
        yield (step := step + UNTIMED_STEPS)
        clock, cpu = time.perf_counter(), time.process_time()
        yield (step := step + steps)
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
        tell(step_us=seconds / steps * 1e6, step_cpu_us=cpu_seconds / steps * 1e6)


def peak_mb(pid: int | str) -> float:
    """A process's peak resident memory, in 10^6 bytes.

    Not getrusage's: that one begins with what the parent held when it forked.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
