"""Two machines for tests, each with a network of its own, joined by a cable that can be cut."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest


class Machines(list[list[str]]):
    """What to put before a command to run it on the first one, or on the second."""

    def __init__(self, names: list[str], cable: list[str]) -> None:
        super().__init__([["ip", "netns", "exec", name, sys.executable] for name in names])
        self.names, self.cable = names, cable

    def connect(self, is_on: bool = True) -> None:
        """Cut the cable, or mend it."""
        state = "up" if is_on else "down"
        command = ["ip", "-n", self.names[1], "link", "set", self.cable[1], state]
        subprocess.run(command, check=True, timeout=200)


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Two machines with a network of their own, joined by a cable: what to put before a command to run it there."""
    names = [f"dtrain{os.getpid() % 10000}{letter}" for letter in "ab"]
    cable = [f"v{os.getpid() % 10000}{letter}" for letter in "ab"]
    lines = [f"ip netns add {name}" for name in names]
    lines.append(f"ip link add {cable[0]} netns {names[0]} type veth peer name {cable[1]} netns {names[1]}")
    for number, name in enumerate(names):
        lines.append(f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev {cable[number]}")
        lines += [f"ip -n {name} link set {device} up" for device in ("lo", cable[number])]
    try:
        for line in lines:
            done = subprocess.run(line.split(), capture_output=True, text=True, timeout=200)
            if done.returncode:
                pytest.skip(f"SKIPPED, NOT TESTED HERE: network namespaces need root: {line}: {done.stderr.strip()}")
        yield Machines(names, cable)
    except FileNotFoundError:
        pytest.skip("SKIPPED, NOT TESTED HERE: network namespaces need the program ip (iproute2)")
    finally:
        for name in names:
            with_ip = shutil.which("ip")
            if with_ip:
                subprocess.run([with_ip, "netns", "del", name], capture_output=True, timeout=200, check=False)
