"""Small collectives where there are several nodes: among the ranks of a node first, then among one of each.

gloo's all-reduce is a ring: 2 (ranks - 1) messages in turn, and every rank is connected with every other one. Here
messages follow a tree: each rank has few neighbours, and none is further than some hops away from rank 0. On one node
there is no tree: its ranks use torch.distributed as it is. Gradients and whole weights do so in any case: for large
tensors a ring is best, and on GPUs NCCL has trees of its own.
"""

import os
import pickle
import queue
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# So many ranks, or firsts of nodes, make a group of the tree, its first included: the least time for 1,000 nodes of 8
# in scripts/bench/agreement.py.
FAN_OUT = 4
SMALL_BYTES = 1 << 16  # beyond it gloo's ring is faster, which sends each number twice, not once for each hop
_BATCH = 512  # keys of the store that are asked for at once
HEAD_BYTES = 1024  # of a message that says how much there is, and brings the first of it; mostly that is all
_SIZE = struct.Struct("<q")
_FRAME = struct.Struct("<qq")  # before each rank's bytes: its number, and how many
_COMBINE: dict[Any, Callable[..., Any]] = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MAX: torch.maximum}

_tree: "Tree | None" = None  # of this process, as torch keeps its default group; None on one node


def expect_several_nodes() -> None:
    """Before the ranks meet: let gloo connect two of them when they first have something to say to one another.

    Else each rank of 8,000 would have 8,000 connections, for every process group.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def join(store: Any, rank: int, world_size: int, place: tuple[str, str, int], timeout: timedelta | None = None) -> None:
    """Agree on who is on which node, and use the tree from now on. All ranks of several nodes call it.

    `store` is the process group's, `place` this rank's, see `nodes_of`. It connects each rank with those that it needs:
    the end of one that is connected shows at once, while gloo tries to connect with one that is gone until its timeout.
    """
    global _tree
    nodes = _agreed_nodes(store, rank, world_size, place)
    _tree = Tree(rank, tree_of(nodes), dist.new_group(backend="gloo", timeout=timeout))
    _tree.sum(torch.zeros(1)).wait()
    if dist.get_backend() == "gloo":  # where gradients and weights take its ring and its tree
        dist.all_reduce(torch.zeros(1))
        dist.broadcast(torch.zeros(1), 0)


def leave() -> None:
    """Use it no longer; the process group ends."""
    global _tree
    if _tree is not None:
        _tree.close()
        _tree = None


def tree() -> "Tree | None":
    """The tree of several nodes; None on one node."""
    return _tree


def begun() -> int:
    """How many of its collectives this rank has begun; the others count torch.distributed's own."""
    return 0 if _tree is None else _tree.begun


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, async_op: bool = False) -> Any:
    """As torch.distributed's, SUM or MAX; by node where there are several, for a small tensor on the CPU.

    The result is the same on all ranks, bit by bit.
    """
    if _tree is None or tensor.device.type != "cpu" or tensor.nbytes > SMALL_BYTES:
        return dist.all_reduce(tensor, op, async_op=async_op)
    pending = _tree.sum(tensor, _COMBINE[op])
    return pending if async_op else pending.wait()


# ---------------------------------------------------------------------------------------------------- who is where


def nodes_of(places: Sequence[tuple[str, str, int]]) -> list[int]:
    """A number for each rank's node, by host, the launcher's number of the node ('' for none) and local rank.

    Two ranks with the same of all three are on nodes that cannot be told apart, such as containers of one name: the
    first ones of each local rank make one node, the second ones another. Where that is wrong, it costs time alone.
    """
    seen, numbers, nodes = Counter[Hashable](), dict[Hashable, int](), []
    for host, number, local_rank in places:
        place = host, number, local_rank
        nodes.append(numbers.setdefault((host, number, seen[place]), len(numbers)))
        seen[place] += 1
    return nodes


def _agreed_nodes(store: Any, rank: int, world_size: int, place: tuple[str, str, int]) -> list[int]:
    """`nodes_of` all ranks: rank 0 reads what all have left in the store, and leaves what follows from it."""
    store.set(f"dtrain/place/{rank}", pickle.dumps(place))
    if rank == 0:
        keys = [f"dtrain/place/{number}" for number in range(world_size)]
        parts = [store.multi_get(keys[low : low + _BATCH]) for low in range(0, world_size, _BATCH)]
        nodes = nodes_of([pickle.loads(item) for part in parts for item in part])
        store.set("dtrain/nodes", zlib.compress(pickle.dumps(nodes)))
    found: list[int] = pickle.loads(zlib.decompress(store.get("dtrain/nodes")))
    return found


def tree_of(nodes: Sequence[Hashable], fan_out: int = FAN_OUT) -> list[list[int]]:
    """The ranks below each rank, those of its node first; rank 0 is above all.

    The ranks of a node are cut into blocks, the first of each block stands above the others, and the firsts are cut
    into blocks again, until one is left; so then are those of all nodes.
    """
    below: list[list[int]] = [[] for _ in nodes]

    def link(ranks: list[int]) -> int:
        while len(ranks) > 1:
            blocks = [ranks[low : low + fan_out] for low in range(0, len(ranks), fan_out)]
            for first, *others in blocks:
                below[first] += others
            ranks = [block[0] for block in blocks]
        return ranks[0]

    of_node: dict[Hashable, list[int]] = {}
    for rank, node in enumerate(nodes):
        of_node.setdefault(node, []).append(rank)
    link([link(ranks) for ranks in of_node.values()])
    return below


# ------------------------------------------------------------------------------------------------------ what they do


class Pending(Future):
    """A collective under way, with what torch.distributed's have."""

    def wait(self) -> Any:
        """Its result, once it is there; what failed is raised here."""
        return self.result()


class Tree:
    """Collectives over a tree of ranks: up to rank 0, and down again.

    All ranks call the same methods in the same order. One thread does what they ask for, in that order, so that none
    that is started meets another one's messages. When a neighbour is gone, gloo raises; this rank ends, and so its own
    neighbours hear of it.

    Args:
        rank: This rank's number.
        below: The ranks below each rank, as `tree_of` gives them.
        group: A process group of all ranks, for these messages alone.
    """

    def __init__(self, rank: int, below: list[list[int]], group: Any) -> None:
        self.rank, self.below, self.begun = rank, below[rank], 0
        self._above = {lower: upper for upper, lowers in enumerate(below) for lower in lowers}
        self.above = self._above.get(rank)
        self._world_size, self._group = len(below), group
        self._asked: queue.SimpleQueue[tuple[Pending, Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        # A daemon: a rank that fails must not wait for a message that will never come.
        self._thread = threading.Thread(target=self._work, name="by node", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after what was asked for."""
        self._asked.put(None)
        self._thread.join()

    def sum(self, tensor: torch.Tensor, combine: Callable[..., Any] = torch.add) -> Pending:
        """Start to combine a tensor of the CPU over all ranks, in place, the same bits everywhere."""
        return self._ask(self._sum, tensor, combine)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in the order of ranks, on rank 0; None on the others."""
        blob = self._ask(self._gather, pickle.dumps(value)).wait()
        if self.rank:
            return None
        values: list[Any] = [None] * self._world_size
        at, view = 0, memoryview(blob)
        while at < len(view):
            rank, size = _FRAME.unpack_from(view, at)
            at += _FRAME.size + size
            values[rank] = pickle.loads(view[at - size : at])
        return values

    def broadcast(self, value: Any, source: int) -> Any:
        """A rank's value on every rank."""
        own = pickle.dumps(value) if self.rank == source else b""
        blob = self._ask(self._broadcast, own, source).wait()
        return value if self.rank == source else pickle.loads(blob)

    def _ask(self, do: Callable[..., Any], *arguments: Any) -> Pending:
        self.begun += 1
        pending = Pending()
        self._asked.put((pending, do, arguments))
        return pending

    def _work(self) -> None:
        while asked := self._asked.get():
            pending, do, arguments = asked
            try:
                pending.set_result(do(*arguments))
            except BaseException as error:
                pending.set_exception(error)

    def _sum(self, tensor: torch.Tensor, combine: Callable[..., Any]) -> torch.Tensor:
        own = tensor.contiguous()
        arrived = [torch.empty_like(own) for _ in self.below]
        works = [self._receiving(part, rank) for part, rank in zip(arrived, self.below, strict=True)]
        total = torch.empty_like(own)
        # gloo sends once it knows that it is waited for: to say so early spares a way there and back.
        down = None if self.above is None else self._receiving(total, self.above)
        for work, part in zip(works, arrived, strict=True):
            work.wait()
            combine(own, part, out=own)
        if self.above is None or down is None:
            total = own
        else:
            self._sending(own, self.above).wait()
            down.wait()
        # Those of other nodes come first, whose way is longer.
        for work in [self._sending(total, rank) for rank in reversed(self.below)]:
            work.wait()
        return tensor.copy_(total)

    def _gather(self, own: bytes) -> bytes:
        heads = [torch.empty(HEAD_BYTES, dtype=torch.uint8) for _ in self.below]
        works = [self._receiving(head, rank) for head, rank in zip(heads, self.below, strict=True)]
        parts: list[Any] = [_FRAME.pack(self.rank, len(own)), own]
        for work, head, rank in zip(works, heads, self.below, strict=True):
            work.wait()
            parts.append(self._rest(head, rank))
        blob = b"".join(parts)
        if self.above is not None:
            self._send(blob, [self.above])
        return blob

    def _broadcast(self, blob: bytes, source: int) -> bytes:
        way = [source]  # up to rank 0, from where it comes down to all
        while way[-1]:
            way.append(self._above[way[-1]])
        if self.rank in way:
            at = way.index(self.rank)
            if at:
                blob = self._receive(way[at - 1])
            if self.above is not None:
                self._send(blob, [self.above])
        if self.above is not None:
            blob = self._receive(self.above)
        self._send(blob, self.below[::-1])
        return blob

    def _send(self, blob: bytes, ranks: list[int]) -> None:
        head = bytearray(HEAD_BYTES)
        _SIZE.pack_into(head, 0, len(blob))
        begins = blob[: HEAD_BYTES - _SIZE.size]
        head[_SIZE.size : _SIZE.size + len(begins)] = begins
        parts = [head, bytearray(rest)] if (rest := blob[len(begins) :]) else [head]
        tensors = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
        for work in [self._sending(tensor, rank) for rank in ranks for tensor in tensors]:
            work.wait()

    def _receive(self, rank: int) -> bytes:
        self._receiving(head := torch.empty(HEAD_BYTES, dtype=torch.uint8), rank).wait()
        return self._rest(head, rank)

    def _rest(self, head: torch.Tensor, rank: int) -> bytes:
        """All of what came with a head, which says how much there is."""
        begins = head.numpy().tobytes()
        (size,) = _SIZE.unpack_from(begins)
        begins = begins[_SIZE.size : _SIZE.size + size]
        if not (left := size - len(begins)):
            return begins
        self._receiving(rest := torch.empty(left, dtype=torch.uint8), rank).wait()
        return begins + rest.numpy().tobytes()

    def _sending(self, tensor: torch.Tensor, rank: int) -> Any:
        return dist.isend(tensor, rank, group=self._group)

    def _receiving(self, tensor: torch.Tensor, rank: int) -> Any:
        return dist.irecv(tensor, rank, group=self._group)
