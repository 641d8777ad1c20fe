"""What ranks of many nodes take to agree, simulated message by message: by node, and in one ring as gloo does it.

    python scripts/bench/simulate.py [--nodes 1000] [--ranks 8] [--between-us 30] [--inside-us 5] [--message-us 6] ...

Each rank runs the program that it runs in truth: `dtrain.distributed.by_node`'s, or gloo's ring. For each message gloo
sends three: the receiver says that it is ready, the sender that it has something, and after the first of these comes
the data. A rank spends `message_us` of a processor to write or to take one of them, and `call_us` for each call of its
program; between lies the way, inside a node or between two, and the time until the receiver wakes up. agreement.py
measures small cases, and compares.
"""

import argparse
import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from dtrain.distributed.by_node import FAN_OUT, HEAD_BYTES, tree_of

SUM_BYTES = 24  # of a vote: three numbers
GATHER_BYTES = 13_000  # of a checkpoint: a rank's random generators


class Network(NamedTuple):
    """Times in microseconds; `cores` are shared by all ranks, None: each has its own."""

    between_us: float = 30.0  # the way of a message between two nodes
    inside_us: float = 5.0  # within a node
    wake_us: float = 15.0  # until a thread that waits for it runs
    message_us: float = 8.0  # of a processor, to write or to take a message
    call_us: float = 5.0  # of a processor, for one call of a program in Python; gloo's own ring has none
    handover_us: float = 25.0  # of a processor, until the thread that does it has begun, and the caller has heard
    gb_per_s: float = 1.0  # into a node
    cores: int | None = None


class Step(NamedTuple):
    """What a rank does next: "ready" (to receive), "send", "arrived" or "sent" (wait until it is), "begin" one more."""

    do: str
    peer: int
    name: Any  # of the message, unique between these two
    size: int = 0  # bytes


class Found(NamedTuple):
    """What a simulation found."""

    ms: float  # until the last rank is done
    messages: int  # with data
    busy_us: float  # of a processor, of the rank that has most to do


class Simulation:
    """Events in order of time: each a message that arrives, or a processor that is done with something."""

    def __init__(self, programs: list[list[Step]], nodes: list[int], network: Network, in_python: bool = True) -> None:
        self.programs, self.nodes, self.network = programs, nodes, network
        self.call_us = network.call_us if in_python else 0.0
        self.now, self.messages = 0.0, 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = count()  # of events at the same time, the first asked for is the first
        ranks = len(programs)
        self._at = [0] * ranks
        self._seen: list[set[Any]] = [set() for _ in range(ranks)]  # what has come to a rank, or left it
        self._unsent: list[dict[Any, int]] = [{} for _ in range(ranks)]  # sizes of what waits for its receiver
        self._tasks: list[deque[Any]] = [deque() for _ in range(ranks)]
        self._in_line: deque[int] = deque()  # ranks that want a core
        self._is_running = [False] * ranks
        self._free_cores = ranks if network.cores is None else network.cores
        self._link_free: defaultdict[int, float] = defaultdict(float)
        self.busy_us = [0.0] * ranks

    def run(self) -> Found:
        """To the end; RuntimeError where ranks wait for one another for ever."""
        for rank in range(len(self.programs)):
            self._next(rank)
        while self._events:
            self.now, _, do, arguments = heapq.heappop(self._events)
            do(*arguments)
        if stuck := [rank for rank, at in enumerate(self._at) if at < len(self.programs[rank])]:
            raise RuntimeError(f"ranks wait for ever: {stuck[:5]} ...")
        return Found(self.now / 1e3, self.messages, max(self.busy_us))

    def _later(self, when: float, do: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._number), do, arguments))

    # ------------------------------------------------------------------------------------------------- processors

    def _spend(self, rank: int, cost_us: float, do: Callable[..., None], *arguments: Any) -> None:
        """Have a rank's processor do something, after what it has to do already."""
        self._tasks[rank].append((cost_us, do, arguments))
        if not self._is_running[rank] and len(self._tasks[rank]) == 1:
            self._in_line.append(rank)
            self._dispatch()

    def _dispatch(self) -> None:
        while self._free_cores and self._in_line:
            rank = self._in_line.popleft()
            cost_us, do, arguments = self._tasks[rank].popleft()
            self._free_cores -= 1
            self._is_running[rank] = True
            self.busy_us[rank] += cost_us
            self._later(self.now + cost_us, self._done, rank, do, arguments)

    def _done(self, rank: int, do: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._free_cores += 1
        self._is_running[rank] = False
        if self._tasks[rank]:
            self._in_line.append(rank)
        do(*arguments)
        self._dispatch()

    # --------------------------------------------------------------------------------------------------- messages

    def _next(self, rank: int) -> None:
        """A rank's program, until it must wait."""
        if self._at[rank] == len(self.programs[rank]):
            return
        step = self.programs[rank][self._at[rank]]
        message_us = self.network.message_us
        if step.do == "begin":
            self._at[rank] += 1
            self._spend(rank, self.network.handover_us, self._next, rank)
        elif step.do == "ready":
            self._at[rank] += 1
            self._spend(rank, self.call_us + message_us, self._said_ready, rank, step)
        elif step.do == "send":
            self._at[rank] += 1
            self._spend(rank, self.call_us + message_us, self._said_send, rank, step)
        elif (step.do, step.peer, step.name) in self._seen[rank]:
            self._at[rank] += 1
            self._spend(rank, self.call_us, self._next, rank)

    def _said_ready(self, rank: int, step: Step) -> None:
        self._travel(rank, step.peer, 0, self._hears_ready, step.peer, rank, step.name)
        self._next(rank)

    def _said_send(self, rank: int, step: Step) -> None:
        self._travel(rank, step.peer, 0, lambda: None)
        if ("ready", step.peer, step.name) in self._seen[rank]:
            self._spend(rank, self.network.message_us, self._send_data, rank, step.peer, step.name, step.size)
        else:
            self._unsent[rank][step.peer, step.name] = step.size
        self._next(rank)

    def _hears_ready(self, rank: int, peer: int, name: Any) -> None:
        self._seen[rank].add(("ready", peer, name))
        if (peer, name) in self._unsent[rank]:
            size = self._unsent[rank].pop((peer, name))
            self._spend(rank, self.network.message_us, self._send_data, rank, peer, name, size)

    def _send_data(self, rank: int, peer: int, name: Any, size: int) -> None:
        self.messages += 1
        self._travel(rank, peer, size, self._comes, peer, ("arrived", rank, name))
        self._comes(rank, ("sent", peer, name))

    def _comes(self, rank: int, what: tuple[str, int, Any]) -> None:
        self._seen[rank].add(what)
        program, at = self.programs[rank], self._at[rank]
        if at < len(program) and (program[at].do, program[at].peer, program[at].name) == what:
            self._next(rank)

    def _travel(self, rank: int, peer: int, size: int, do: Callable[..., None], *arguments: Any) -> None:
        network, node = self.network, self.nodes[peer]
        way_us = network.inside_us
        if self.nodes[rank] != node:
            begins = max(self.now + network.between_us, self._link_free[node])
            self._link_free[node] = begins + size / network.gb_per_s / 1e3
            way_us = self._link_free[node] - self.now
        self._later(self.now + way_us + network.wake_us, self._spend, peer, network.message_us, do, *arguments)


# ------------------------------------------------------------------------------------------------- what each rank does


def above_of(below: list[list[int]]) -> dict[int, int]:
    """The rank above each, of a tree as `tree_of` gives it."""
    return {lower: upper for upper, lowers in enumerate(below) for lower in lowers}


def sum_by_node(below: list[list[int]], rounds: int = 1, size: int = SUM_BYTES) -> list[list[Step]]:
    """`by_node`'s sum, some times over."""
    above, programs = above_of(below), []
    for rank, lowers in enumerate(below):
        program = []
        for turn in range(rounds):
            up, down = ("up", turn), ("down", turn)
            upper = above.get(rank)
            program += [Step("begin", rank, turn), *(Step("ready", lower, up) for lower in lowers)]
            program += [] if upper is None else [Step("ready", upper, down)]
            program += [Step("arrived", lower, up) for lower in lowers]
            if upper is not None:
                program += [Step("send", upper, up, size), Step("sent", upper, up), Step("arrived", upper, down)]
            program += [Step("send", lower, down, size) for lower in lowers[::-1]]
            program += [Step("sent", lower, down) for lower in lowers[::-1]]
        programs.append(program)
    return programs


def gather_by_node(below: list[list[int]], size: int = GATHER_BYTES) -> list[list[Step]]:
    """`by_node`'s gather: of each rank below the head, which says how much there is, then the rest."""
    above, programs = above_of(below), []
    under = [1] * len(below)  # ranks whose bytes a rank sends up
    for rank in sorted(range(len(below)), key=lambda rank: -_depth(rank, above)):
        under[rank] += sum(under[lower] for lower in below[rank])
    for rank, lowers in enumerate(below):
        program = [Step("begin", rank, None), *(Step("ready", lower, "head") for lower in lowers)]
        for lower in lowers:
            program += [Step("arrived", lower, "head"), Step("ready", lower, "rest"), Step("arrived", lower, "rest")]
        if (upper := above.get(rank)) is not None:
            program += [Step("send", upper, "head", HEAD_BYTES), Step("send", upper, "rest", size * under[rank])]
            program += [Step("sent", upper, "head"), Step("sent", upper, "rest")]
        programs.append(program)
    return programs


def _depth(rank: int, above: dict[int, int]) -> int:
    return 1 + _depth(above[rank], above) if rank in above else 0


def sum_in_ring(ranks: int, rounds: int = 1, numbers: int = SUM_BYTES // 8) -> list[list[Step]]:
    """gloo's ring for a few numbers of 8 bytes (gloo/allreduce.cc): each is a segment, which passes all ranks twice."""
    segments, programs = 2 * ranks, []
    for rank in range(ranks):
        program: list[Step] = []
        source, target = (rank + 1) % ranks, (rank - 1) % ranks
        for turn in range(rounds):
            for part, first in (("reduce", rank + 1), ("gather", rank)):
                sends = {(each - 2 * first) % segments: each for each in range(min(numbers, segments))}
                receives = {(each - 2 * (first + 1)) % segments: each for each in range(min(numbers, segments))}
                waited = sorted({at for at in {*sends, *receives} if at < segments - 2})
                for at in sorted({*waited, *(at + 2 for at in waited)}):
                    program += _of_ring(at - 2, waited, (sends, receives), (source, target), (part, turn), True)
                    program += _of_ring(at, waited, (sends, receives), (source, target), (part, turn), False)
        programs.append(program)
    return programs


def _of_ring(
    at: int,
    valid: list[int],
    moved: tuple[dict[int, int], dict[int, int]],
    peers: tuple[int, int],
    name: Any,
    waits: bool,
) -> list[Step]:
    """What one pass of the ring's loop begins, or waits for two passes later."""
    if at not in valid:
        return []
    (sends, receives), (source, target) = moved, peers
    first, second = ("arrived", "sent") if waits else ("ready", "send")
    steps = [Step(first, source, (*name, receives[at]), 8)] if at in receives else []
    return steps + ([Step(second, target, (*name, sends[at]), 8)] if at in sends else [])


def by_node(nodes: list[int], network: Network, fan_out: int = FAN_OUT, rounds: int = 3) -> Found:
    """A sum by node, the mean of some."""
    found = Simulation(sum_by_node(tree_of(nodes, fan_out), rounds), nodes, network).run()
    return Found(found.ms / rounds, found.messages // rounds, found.busy_us / rounds)


def ring(nodes: list[int], network: Network, rounds: int = 1) -> Found:
    """A sum in gloo's ring of all ranks, the mean of some."""
    found = Simulation(sum_in_ring(len(nodes), rounds), nodes, network, in_python=False).run()
    return Found(found.ms / rounds, found.messages // rounds, found.busy_us / rounds)


def main() -> None:
    """Print a table."""
    defaults = Network()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/simulate.py --nodes 100"
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8, help="of each node (default 8)")
    parser.add_argument("--fan-out", type=int, nargs="*", default=[2, 3, 4, 6, 8, 16, 32])
    names = [name for name in Network._fields if name != "cores"]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    wish = parser.parse_args()
    network = Network(**{name: getattr(wish, name) for name in names})
    nodes = [number // wish.ranks for number in range(wish.nodes * wish.ranks)]
    print(
        f"{wish.nodes} nodes x {wish.ranks} ranks; {network}\n\n{'':<16}{'ms':>12}{'messages':>12}{'busiest, us':>14}"
    )
    for fan_out in wish.fan_out:
        found = by_node(nodes, network, fan_out)
        print(f"{f'sum, by {fan_out}':<16}{found.ms:>12.3f}{found.messages:>12}{found.busy_us:>14.0f}", flush=True)
    found = ring(nodes, network)
    print(f"{'sum, ring':<16}{found.ms:>12.3f}{found.messages:>12}{found.busy_us:>14.0f}")
    found = Simulation(gather_by_node(tree_of(nodes)), nodes, network).run()
    print(f"{f'gather, by {FAN_OUT}':<16}{found.ms:>12.3f}{found.messages:>12}{found.busy_us:>14.0f}")


if __name__ == "__main__":
    main()
