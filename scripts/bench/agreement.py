"""What ranks take to agree by node, beside gloo's flat forms: network namespaces as nodes, with a way between them.

    python scripts/bench/agreement.py [--cases 2x1 2x2 4x4 8x4] [--delay-us 1000] [--turns 7] [--json FILE]

It needs root and the program `ip`. Each node is a network namespace of its own; a relay in Python takes every packet
between two of them from a TUN device and hands it on after the delay (netem would do so in the kernel, where there is
one). All forms run in the same ranks in turns, and medians are printed, beside what simulate.py computes for as many
cores: two of its costs are fitted to the smallest cases, the others measured.
"""

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from overhead import machine
from simulate import Network, by_node, ring

import dtrain.distributed.by_node as trees
from dtrain.distributed.process import end_with
from dtrain.distributed.process_group import set_up
from dtrain.distributed.vote import Vote

CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 1, 0x1000  # linux/sched.h, linux/if_tun.h
NICE = -10  # so that what else this machine does counts less; its load is printed
STEP_SECONDS, STEPS = 0.002, 400


# -------------------------------------------------------------------------------------------------- nodes of a network


def relay(devices: list[int], delay_seconds: float) -> None:
    """Hand packets on between the nodes, for ever: the last byte of an address is the node's number, from 1."""
    os.nice(NICE)
    waiting: list[tuple[float, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, packet = heapq.heappop(waiting)
            os.write(devices[packet[19] - 1], packet)
        left = max(0.0, waiting[0][0] - now) if waiting else None
        for device in select.select(devices, [], [], left)[0]:
            packet = os.read(device, 65536)
            if packet[0] >> 4 == 4 and 0 < packet[19] <= len(devices):
                number += 1
                heapq.heappush(waiting, (time.monotonic() + delay_seconds, number, packet))


@contextmanager
def network_of(nodes: int, delay_us: float) -> Iterator[list[str]]:
    """Namespaces that reach one another after a delay, as 10.99.0.1 and so on; their names."""
    names = [f"agree-{os.getpid()}-{number}" for number in range(nodes)]
    devices, child = [], 0
    try:
        for number, name in enumerate(names):
            ip(f"netns add {name}")
            device = os.open("/dev/net/tun", os.O_RDWR)
            devices.append(device)
            tun = f"agree{number}"
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", tun.encode(), IFF_TUN | IFF_NO_PI))
            ip(f"link set {tun} netns {name} name node0")
            ip(f"-n {name} addr add 10.99.0.{number + 1}/24 dev node0")
            ip(f"-n {name} link set node0 up")
            ip(f"-n {name} link set lo up")
        parent = os.getpid()
        child = os.fork()
        if not child:
            end_with(parent)
            relay(devices, delay_us / 1e6)
        yield names
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for device in devices:
            os.close(device)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(words: str) -> None:
    """A command of iproute2; it must not fail."""
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {words}: {done.stderr.strip()}")


def enter(name: str) -> None:
    """Move this process into a namespace."""
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


# ----------------------------------------------------------------------------------------------------- what is measured


def forms(ranks: Any) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """What is done by node, the same as gloo does it for all, and how often in a turn."""
    ballot, blob, world = torch.zeros(3, dtype=torch.float64), os.urandom(13_000), ranks.world_size

    def gather() -> None:
        dist.gather_object(blob, [None] * world if ranks.is_main else None)

    return {
        "sum": (lambda: ranks.sum_(ballot), lambda: dist.all_reduce(ballot), 10),
        "gather": (lambda: ranks.gather(blob), gather, 3),
        "broadcast": (lambda: ranks.broadcast("x"), lambda: dist.broadcast_object_list(["x"]), 5),
    }


def seconds_of(action: Callable[[], object], times: int) -> float:
    """Of one of some calls that all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def vote_seconds(ranks: Any, steps: int) -> float:
    """What a vote costs each of so many steps."""
    vote, total = Vote(ranks), 0.0
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        began = time.perf_counter()
        vote.cast(False, False)
        total += time.perf_counter() - began
    vote.settle()
    return total / steps


def sockets() -> int:
    """How many this process has open."""
    return sum(1 for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED")


def one_rank(began: float, turns: int) -> dict[str, Any] | None:
    """What rank 0 finds; None on the others."""
    ranks = set_up("cpu", {"timeout_seconds": 300})
    ranks.broadcast("here")
    found: dict[str, Any] = {"met_s": time.monotonic() - began}
    counts = ranks.gather(sockets())
    found["sockets"] = statistics.median(counts or [0])
    tree = trees.tree()
    times: dict[str, list[float]] = {}
    for _ in range(turns if tree else 0):
        for name, (own, flat, often) in forms(ranks).items():
            times.setdefault(f"{name} by node", []).append(1e3 * seconds_of(own, often))
            times.setdefault(f"{name} flat", []).append(1e3 * seconds_of(flat, often))
    if tree:
        found["handover_us"] = 1e6 * statistics.median(seconds_of(lambda: tree._ask(int).wait(), 20) for _ in range(5))
    for _ in range(3 if tree else 0):
        times.setdefault("vote by node", []).append(1e3 * vote_seconds(ranks, STEPS))
        trees._tree = None
        times.setdefault("vote flat", []).append(1e3 * vote_seconds(ranks, STEPS))
        trees._tree = tree
    ranks.close()
    return found | {name: statistics.median(each) for name, each in times.items()} if ranks.is_main else None


def together(names: list[str], per_node: int, is_flat: bool, turns: int) -> dict[str, Any]:
    """What ranks find that are started in these namespaces; `is_flat`: as if one node had all of them."""
    world, began, pids = len(names) * per_node, time.monotonic(), []
    read, write = os.pipe()
    parent, port = os.getpid(), str(20000 + os.getpid() % 9000 + len(names) * 10 + per_node)
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        end_with(parent)
        status = 1
        try:
            os.nice(NICE)
            enter(names[rank // per_node])
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world} if is_flat else {
                "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": rank // per_node
            }  # fmt: skip
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": port, **local}
            os.environ.update({key: str(value) for key, value in place.items()} | {"GLOO_SOCKET_IFNAME": "node0"})
            if found := one_rank(began, turns):
                os.write(write, json.dumps(found).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = os.read(read, 65536)
    os.close(read)
    if any(statuses):
        raise SystemExit(f"ranks ended with {statuses}")
    return dict(json.loads(said))


def way_us(names: list[str], target: int) -> float:
    """Microseconds of a TCP message's way from node 0 to another or, with 0, within it: half the way and back."""
    parent, ready = os.getpid(), os.pipe()
    if not (pid := os.fork()):
        end_with(parent)
        os.nice(NICE)
        enter(names[target])
        with socket.create_server((f"10.99.0.{target + 1}", 19999)) as server:
            os.write(ready[1], b"x")
            peer, _ = server.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := peer.recv(64):
                peer.send(data)
        os._exit(0)
    os.read(ready[0], 1)
    if not (client := os.fork()):
        os.nice(NICE)
        enter(names[0])
        with socket.create_connection((f"10.99.0.{target + 1}", 19999)) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(300):
                began = time.perf_counter()
                peer.send(b"x")
                peer.recv(64)
                times.append(time.perf_counter() - began)
        os.write(ready[1], struct.pack("d", 5e5 * statistics.median(times)))
        os._exit(0)
    os.waitpid(client, 0)
    os.waitpid(pid, 0)
    return float(struct.unpack("d", os.read(ready[0], 8))[0])


# --------------------------------------------------------------------------------------------- beside the simulation


def fitted(cases: list[tuple[list[int], dict[str, Any]]], network: Network) -> Network:
    """The network with the two figures by which the simulation is nearest to what was measured."""

    def misses(tried: Network) -> float:
        pairs = [(form(nodes, tried).ms, found[f"sum {name}"])
                 for nodes, found in cases for name, form in (("by node", by_node), ("flat", ring))]  # fmt: skip
        return sum((one / other - 1) ** 2 for one, other in pairs)

    grid = [network._replace(message_us=message, wake_us=wake)
            for message in (4.0, 6.0, 8.0, 11.0, 15.0, 20.0, 30.0, 45.0)
            for wake in (0.0, 10.0, 20.0, 40.0, 80.0, 120.0, 160.0, 240.0, 400.0)]  # fmt: skip
    return min(grid, key=misses)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/agreement.py --cases 2x2"
    )
    parser.add_argument("--cases", nargs="*", default=["2x1", "2x2", "4x2", "4x4", "8x4"], metavar="NODESxRANKS")
    parser.add_argument("--delay-us", type=float, default=1000.0, help="added between two nodes (default 1000)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--fit", type=int, default=3, help="so many of the first cases fit the simulation (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    wish = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = [(int(nodes), int(ranks)) for nodes, ranks in (case.split("x") for case in wish.cases)]
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before\n")
    measured, network = [], Network()
    with network_of(max(nodes for nodes, _ in sizes), wish.delay_us) as names:
        network = Network(way_us(names, 1), way_us(names, 0), cores=len(os.sched_getaffinity(0)))
        print(
            f"the way of a message: {network.between_us:.0f} us between nodes, {network.inside_us:.0f} us within one\n"
        )
        columns = ["met_s", "sockets", *(f"{name} {form}" for name in ("sum", "gather", "broadcast", "vote")
                                         for form in ("by node", "flat"))]  # fmt: skip
        print(f"{'case':<8}{'met_s flat':>12}{'sock. flat':>12}" + "".join(f"{name:>18}" for name in columns))
        for nodes, per_node in sizes:
            flat = together(names[:nodes], per_node, True, 0)
            own = together(names[:nodes], per_node, False, wish.turns)
            own |= {"met_s flat": flat["met_s"], "sockets flat": flat["sockets"], "load": os.getloadavg()[0]}
            measured.append(([number // per_node for number in range(nodes * per_node)], own))
            print(f"{f'{nodes}x{per_node}':<8}{flat['met_s']:>12.2f}{flat['sockets']:>12.0f}"
                  + "".join(f"{own[name]:>18.3f}" for name in columns), flush=True)  # fmt: skip
    handover_us = statistics.median(found["handover_us"] for _, found in measured[: wish.fit])
    network = fitted(measured[: wish.fit], network._replace(handover_us=handover_us))
    print(f"\nms, load {os.getloadavg()[0]:.1f}; simulated with {network}\n")
    print(
        f"{'case':<8}"
        + "".join(f"{f'{form}, {how}':>24}" for form in ("by node", "flat") for how in ("measured", "simulated"))
    )
    for nodes, found in measured:
        found |= {"simulated by node": by_node(nodes, network).ms, "simulated flat": ring(nodes, network).ms}
        row = [found[f"{how} {form}"] for form in ("by node", "flat") for how in ("sum", "simulated")]
        print(f"{f'{nodes[-1] + 1}x{nodes.count(0)}':<8}" + "".join(f"{value:>24.2f}" for value in row))
    if wish.json:
        data = {
            "machine": machine(),
            "network": network._asdict(),
            "cases": dict(zip(wish.cases, [f for _, f in measured], strict=True)),
        }
        wish.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
