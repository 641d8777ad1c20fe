"""Ports that are nobody else's: none that the system deals out itself, and each worker of the tests has its own."""

import functools
import os
import socket
from collections.abc import Iterator

# Below 20,000, from where dtrain computes ports for jobs, and below the ephemeral ones. One that was bound to 0 and
# closed again would be such: between the question and its use, any connection of this machine may be given it.
FIRST, PER_WORKER, WORKERS = 10_000, 1_000, 10


def free_port() -> int:
    """A port on which nobody listens, and which this process is not given again for long."""
    for port in _own():
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the numbers go round")


@functools.cache
def _own() -> Iterator[int]:
    """The worker's ports, over and over; another session of tests on this machine begins elsewhere among them."""

    def numbers() -> Iterator[int]:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
        number = os.getpid()
        while True:
            number += 1
            yield FIRST + PER_WORKER * worker + number % PER_WORKER

    return numbers()
