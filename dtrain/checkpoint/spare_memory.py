"""The state of the newest steps in the nodes' memory: kept beside the training, found again by the next start.

A process that is killed takes its memory with it, so the state lies in files of a folder in memory (/dev/shm). Of a
model that every rank has, one rank of each node keeps all of it there, and each rank what it alone knows; of a sharded
one, each rank keeps its shards. With several nodes, what a rank alone has goes to the next node, too. A thread seals
and sends what was copied, in a process group of its own, and all ranks wait for all before the next copy: of the last
two steps that were kept, one is whole on all of them at any moment.
"""

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.checkpoint.checkpoint_files import Loaded, read_manifest
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError, Snapshot, Weights, take_snapshot
from dtrain.checkpoint.memory_slot import (
    DATA,
    HEAD,
    Facts,
    Slot,
    damaged_in,
    facts_of,
    found_in,
    free_bytes,
    mapped,
    snapshot_of,
)
from dtrain.distributed.fsdp import joined
from dtrain.distributed.ranks import Ranks
from dtrain.tracking.run_folder import RunFolder, read_run, update_run
from dtrain.tracking.run_lock import writer_of
from dtrain.tracking.whole_file import fsync

ALL, OWN, SHARD = "all", "own", "shard"  # a part is one rank's: the whole model, what it alone has of it, its shards
MEMORY = "/dev/shm"
_DISTRUSTED = "memory_distrusted"  # in run.json: the number of a start
_MESSAGE = 256 * 2**20  # bytes
_CLOSE_SECONDS = 10.0  # of a training that failed, ranks that are gone are waited for so long
Place = tuple[int, int, int]  # step, epoch, step of the last validation
Part = tuple[str, int]  # kind, rank


class Kept(NamedTuple):
    """A step that is whole in memory."""

    place: Place
    parts: tuple[tuple[str, int], ...]  # names of files, each with a rank that can read it
    world_size: int  # of the training that kept it


class SpareMemory:
    """Keeps a training's newest state in memory, and finds what an earlier start of the same training has kept.

    All ranks call its methods in the same order; `kinds` are the parts that this rank is to `take`.

    Args:
        every_steps: How often the loop is to keep the state.
        memory: A folder in memory, on every node.
        say: Is given a line for what cannot be kept.
    """

    def __init__(self, ranks: Ranks, every_steps: int, memory: Path, say: Callable[[str], object]) -> None:
        self.every_steps, self.memory, self._ranks, self._say = every_steps, memory, ranks, say
        self._group: Any = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._node, self._target, self._sources = _neighbours(ranks, _identity(memory))
        self._has_neighbour = self._target is not None
        is_first = ranks.rank == self._node[0]
        self._is_first = is_first
        if ranks.strategy.is_sharded:
            self.kinds: tuple[str, ...] = (SHARD,)
        else:  # one that has it all has its own, too, but for other nodes
            self.kinds = (*([ALL] if is_first else []), *([OWN] if self._has_neighbour or not is_first else []))
        self._home: Path | None = None
        self._facts: Facts = {}
        self._slots: dict[Part, list[Slot]] = {}  # two of each part
        self._turn = 0
        self._taken: dict[str, Snapshot] = {}
        self._thread: threading.Thread | None = None
        self._is_full = False
        _AT_WORK.append(self)

    # -------------------------------------------------------------------------------------------- while it trains

    def open(self, training: str, attempt: int) -> None:
        """Begin to keep the states of this start of a training, both as the main rank names them; old ones go."""
        training, attempt = self._ranks.broadcast((training, attempt))
        home = home_of(self.memory, training)
        if self._is_first:
            for old in {home, self._home or home}:
                with contextlib.suppress(OSError):  # another user's
                    remove(old)
            with contextlib.suppress(OSError):
                home.mkdir(mode=0o700)
        self._home, self._slots, self._turn, self._is_full = home, {}, 0, False
        self._facts = {"attempt": attempt, "world_size": self._ranks.world_size, "rank": self._ranks.rank}
        self._agree()
        if not _is_own(home):
            self._give_up(f"{home} cannot be made a folder of this user's")

    def check(self, need_bytes: int) -> str:
        """Which node has no space for two copies of what this rank and the others of its node keep; '' if all have."""
        copies = 4 if self._has_neighbour and SHARD in self.kinds else 2
        need = copies * need_bytes if {ALL, SHARD} & {*self.kinds} else 0
        told = self._ranks.gather((self._node[0], need, free_bytes(self.memory), self._ranks.host))
        problem = ""
        for first, _, free, host in told or ():
            need = sum(its for node, its, *_ in told or () if node == first)
            if need > free:
                problem = f"{self.memory} of {host} has {free / 1e9:.3g} GB free, and at least {need / 1e9:.3g} GB are "
                problem += "needed: two copies of what a checkpoint holds, and the optimizer's state on top"
                break
        return str(self._ranks.broadcast(problem))

    def is_due(self, step: int) -> bool:
        """Whether a step that was just done is to be kept; then what was kept last is sealed by now, on all ranks."""
        if step % self.every_steps:
            return False
        self.wait()
        return True

    def take(
        self,
        kind: str,
        state: Mapping[str, Any],
        weights: Mapping[str, Any],
        ema: Mapping[str, Any] | None,
        others: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Copy one of this rank's parts, while nothing is being sealed."""
        if self._is_full:
            return
        try:
            slot = self._slot(kind, self._ranks.rank, self._turn)
            self._taken[kind] = slot.take(weights, state, ema, others, take_snapshot)
        except (OSError, CheckpointError) as error:
            self._give_up(str(error))

    def seal(self, place: Place, journal: Path) -> None:
        """What was taken becomes valid, and is sent to the next node, while the training continues.

        Where it shall outlive this node, what the main rank has logged so far must do so first.
        """
        work = place, self._turn, journal if self._has_neighbour and self._ranks.is_main else None
        self._thread = threading.Thread(target=self._seal, args=work, name="spare memory", daemon=True)
        self._thread.start()
        self._turn = 1 - self._turn

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when nothing is being sealed or sent."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def close(self, is_saved: bool) -> None:
        """End; where all that was kept is saved elsewhere, the memory is given back. No collective."""
        self.wait(None if is_saved else _CLOSE_SECONDS)
        if self._is_first and self._home is not None and _is_own(self._home):
            if is_saved:
                remove(self._home)
            else:
                with contextlib.suppress(OSError):  # where nothing was kept, no folder stays
                    self._home.rmdir()
        with contextlib.suppress(ValueError):
            _AT_WORK.remove(self)

    def _give_up(self, reason: str) -> None:
        """This rank keeps nothing from now on; the training continues."""
        self._is_full, self._taken = True, {}
        for slots in self._slots.values():
            for slot in slots:
                slot.remove()
        self._slots = {}
        self._say(f"warning: {self._ranks.host} keeps nothing in memory from now on: {reason}")

    def _slot(self, kind: str, rank: int, turn: int) -> Slot:
        """Where a turn's copy of a part goes."""
        assert self._home is not None
        if (kind, rank) not in self._slots:
            self._slots[kind, rank] = [Slot(self._home / f"{kind}-{rank}-{number}") for number in (0, 1)]
        return self._slots[kind, rank][turn]

    def _seal(self, place: Place, turn: int, journal: Path | None) -> None:
        """The thread's part."""
        if journal is not None:
            with contextlib.suppress(OSError):
                fsync(journal)
        facts, taken, self._taken = {**self._facts, "place": place}, self._taken, {}
        head, extents = b"", list[Tensor]()
        try:
            for kind, snapshot in taken.items():
                slot = self._slot(kind, self._ranks.rank, turn)
                head = slot.seal({**facts, "kind": kind}, snapshot)
                extents = slot.extents
        except (OSError, CheckpointError) as error:
            self._give_up(str(error))
            head, extents = b"", []
        with contextlib.suppress(RuntimeError):  # another rank is gone: the training's own collectives will say so
            if self._has_neighbour:
                self._exchange(head, extents, turn)
            self._agree()

    def _exchange(self, head: bytes, extents: Sequence[Tensor], turn: int) -> None:
        """Send this rank's part to the next node, and keep those that come from the one before."""
        assert self._target is not None
        sent = _send(head, extents, self._target, self._group)
        for source in self._sources:
            if its_head := _receive_head(source, self._group):
                self._keep_for(its_head, source, turn)
        for work, _ in sent:
            work.wait()

    def _keep_for(self, head: bytes, source: int, turn: int) -> None:
        """Keep the part of a rank of another node."""
        facts = facts_of(head)
        slot = None
        try:
            slot = None if self._is_full else self._slot(facts["kind"], source, turn)
            if slot is not None:
                slot.reserve(facts["sizes"])
        except OSError as error:
            self._give_up(str(error))
            slot = None
        empty = (torch.empty(size, dtype=torch.uint8) for size in facts["sizes"])
        _receive(empty if slot is None else slot.extents, source, self._group)
        if slot is not None:
            slot.accept(head)

    def _agree(self) -> None:
        """Return when all ranks have come so far."""
        if self._group is not None:
            dist.barrier(group=self._group)

    # -------------------------------------------------------------------------------------------- at the next start

    def look(self, run_folder: Path) -> Kept | None:
        """The newest step of the training in a run folder that is whole in memory; on the main rank."""
        training, attempt = self._ranks.decide(partial(_last_start, run_folder))
        self._home = home_of(self.memory, training)
        own = kept_in(self._home, attempt) if training and self._is_first else []
        if training and self._is_first and _is_own(self._home):
            for path in damaged_in(self._home):
                self._say(f"warning: {path} is damaged: it differs from its checksum, and is not used")
        found = self._ranks.gather(own)
        return newest(found) if found else None

    def fetch(self, kept: Kept) -> Loaded | None:
        """Bring the parts of a step to the main rank, and there together; None on the others."""
        snapshots = []
        for name, holder in kept.parts:
            assert self._home is not None
            if holder == self._ranks.rank:
                head, extents = _read(self._home, name)
                if not self._ranks.is_main:
                    for work, _ in _send(head, extents, 0, self._group):
                        work.wait()
            elif self._ranks.is_main:
                head = _receive_head(holder, self._group)
                extents = [torch.empty(size, dtype=torch.uint8) for size in facts_of(head)["sizes"]]
                _receive(extents, holder, self._group)
            if self._ranks.is_main:
                snapshots.append((facts_of(head), snapshot_of(head, extents)))
        return together(snapshots) if self._ranks.is_main else None


_AT_WORK: list[SpareMemory] = []


def _settle() -> None:
    """Before a fork: what is forked while a thread uses native code may find a lock taken for ever."""
    for each in _AT_WORK:
        each.wait()


os.register_at_fork(before=_settle)


# ------------------------------------------------------------------------------------------------- folders in memory


def why_not_usable(memory: Path) -> str:
    """Why nothing can be kept in a folder; '' where it can."""
    if not hasattr(os, "posix_fallocate"):
        return "this system cannot reserve memory for a file (posix_fallocate)"
    if not memory.is_dir():
        return f"there is no folder {memory} on this node; name one in memory, such as a tmpfs"
    return "" if os.access(memory, os.W_OK | os.X_OK) else f"{memory} cannot be written"


def home_of(memory: Path, training: str) -> Path:
    """Where the states of a training (`id` in run.json) lie in a node's memory."""
    return memory / f"dtrain-{os.getuid()}-{training}"


def remove(home: Path) -> None:
    """Give a training's memory back, if it has any; of what somebody put in its place, nothing but the name."""
    with contextlib.suppress(FileNotFoundError):
        if home.is_symlink() or not home.is_dir():
            home.unlink()
        else:
            shutil.rmtree(home)


def _is_own(home: Path) -> bool:
    """Whether it is a folder, no link to one, and this user's."""
    with contextlib.suppress(FileNotFoundError):
        found = home.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return False


def kept_in(home: Path, attempt: int) -> list[tuple[str, Facts]]:
    """The parts that lie in a folder and are whole, of the last start of their training: names and facts.

    What an earlier start has kept is older than what the training is now, which may have gone another way.
    """
    if not _is_own(home):
        return []
    return [(path.stem, facts) for path, facts in found_in(home) if facts["attempt"] == attempt]


def save_what_is_kept(run_folder: Path, memory: Path) -> str:
    """Where a training has ended for good, make a checkpoint of what its last start left in this node's memory.

    The memory is given back, unless ranks of another launcher on this machine use it. Where other nodes continue, it is
    not needed. Returns a line for what was saved or lost; '' where there was nothing newer.
    """
    training, attempt = _last_start(run_folder)
    home = home_of(memory, training)
    if not training or not _is_own(home) or _is_in_use(home):
        return ""
    try:
        if writer_of(run_folder):
            return ""
        kept = newest([kept_in(home, attempt)])
        checkpoints = Checkpoints(RunFolder(run_folder).checkpoints, keep_last=10**9, keep_best=10**9,
                                  mode=read_run(run_folder).get("mode") or "max")  # fmt: skip
        if kept is None or kept.place[0] <= last_step(checkpoints):
            return ""
        parts = [_read(home, name) for name, _ in kept.parts]
        save(checkpoints, together([(facts_of(head), snapshot_of(head, extents)) for head, extents in parts]))
        return f"step {kept.place[0]} was kept in memory, and is now a checkpoint in {checkpoints.folder}"
    except (CheckpointError, OSError) as error:
        return f"warning: what was kept in memory is lost: {error}"
    finally:
        remove(home)


def _is_in_use(home: Path) -> bool:
    """Whether a process holds a file of such a folder open, as ranks do that keep something there."""
    names = {path.name for path in home.iterdir()}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile, or is another user's
            files = {Path(file.path) for file in process.open_files() if Path(file.path).name in names}
            if any(file.parent.samefile(home) for file in files):
                return True
    return False


def last_step(checkpoints: Checkpoints) -> int:
    """The step of the newest whole checkpoint; -1 where there is none."""
    path = checkpoints.last()
    return -1 if path is None else int(read_manifest(path)["step"])


def save(checkpoints: Checkpoints, loaded: Loaded) -> Path:
    """Write what was kept as a checkpoint like any other."""
    state = loaded.state
    score = state["score"] if state["validated_step"] == state["step"] else None
    return checkpoints.save(state["step"], loaded.weights, state, ema=loaded.ema, score=score, others=loaded.others)


def _last_start(run_folder: Path) -> tuple[str, int]:
    """The training in a run folder, and the number of its last start; 0 where that has kept nothing of use."""
    facts = read_run(run_folder)
    attempt = int(facts.get("attempt") or 0)
    return str(facts.get("id") or ""), 0 if attempt == facts.get(_DISTRUSTED) else attempt


def distrust(run_folder: Path) -> None:
    """What the last start keeps in memory is not to be used: it is not known since when it is wrong."""
    update_run(run_folder, **{_DISTRUSTED: read_run(run_folder).get("attempt")})


def _read(home: Path, name: str) -> tuple[bytes, list[Tensor]]:
    head = (home / f"{name}{HEAD}").read_bytes()
    return head, mapped(home / f"{name}{DATA}", facts_of(head)["sizes"])


# ------------------------------------------------------------------------------------------------------------- nodes


def _identity(memory: Path) -> tuple[str, int, int]:
    """What tells whether two ranks see the same memory: the boot of their machine, and the folder in it."""
    found = memory.stat()
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(), found.st_dev, found.st_ino
    return "", found.st_dev, found.st_ino


def _neighbours(ranks: Ranks, own: tuple[str, int, int]) -> tuple[list[int], int | None, list[int]]:
    """The ranks of this rank's node; the one of the next node that keeps its part, if any; and whose part it keeps."""
    identities = ranks.broadcast(ranks.gather(own))
    nodes = [[rank for rank, its in enumerate(identities) if its == each] for each in dict.fromkeys(identities)]
    targets: dict[int, int] = {}
    for number, node in enumerate(nodes):
        following = nodes[(number + 1) % len(nodes)]
        targets |= {rank: following[index % len(following)] for index, rank in enumerate(node)}
    mine = next(node for node in nodes if ranks.rank in node)
    if len(nodes) == 1:
        return mine, None, []
    return mine, targets[ranks.rank], [rank for rank, target in targets.items() if target == ranks.rank]


def _send(head: bytes, extents: Sequence[Tensor], target: int, group: Any) -> list[tuple[Any, Tensor]]:
    """Begin to send a part; returns the messages under way, with what must stay until they are there."""
    content = torch.frombuffer(bytearray(head or b"\0"), dtype=torch.uint8)
    messages = [torch.tensor([len(head)]), *([content] if head else ()), *_pieces(extents if head else ())]
    return [(dist.isend(message, target, group=group), message) for message in messages]


def _receive_head(source: int, group: Any) -> bytes:
    """The head of a part that is on its way; empty where its rank has none."""
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source, group=group)
    content = torch.empty(int(length), dtype=torch.uint8)
    if content.numel():
        dist.recv(content, source, group=group)
    return bytes(content.numpy())


def _receive(extents: Iterable[Tensor], source: int, group: Any) -> None:
    for piece in _pieces(extents):
        dist.recv(piece, source, group=group)


def _pieces(extents: Iterable[Tensor]) -> list[Tensor]:
    return [piece for extent in extents for piece in extent.split(_MESSAGE)]


# ------------------------------------------------------------------------------------------------- parts, to a whole


def newest(found: Sequence[Sequence[tuple[str, Facts]]]) -> Kept | None:
    """The newest step of which all parts are there; `found` has what each rank can read, by rank."""
    steps: dict[tuple[Place, int], dict[Part, tuple[str, int]]] = {}
    for holder, its in enumerate(found):
        for name, facts in its:
            step = steps.setdefault((tuple(facts["place"]), facts["world_size"]), {})
            step.setdefault((facts["kind"], facts["rank"]), (name, holder))
    for (place, world_size), parts in sorted(steps.items(), reverse=True, key=lambda item: item[0]):
        if names := _complete(parts, world_size):
            return Kept(place, tuple(parts[name] for name in names), world_size)
    return None


def _complete(parts: Mapping[Part, Any], world_size: int) -> list[Part]:
    """Those that make a whole of a step; [] where some are missing."""
    shards = [(SHARD, rank) for rank in range(world_size)]
    if all(shard in parts for shard in shards):
        return shards
    for writer in sorted(rank for kind, rank in parts if kind == ALL):
        own = [(OWN, rank) for rank in range(world_size) if rank != writer or (OWN, rank) in parts]
        if all(part in parts for part in own):
            return [(ALL, writer), *own]
    return []


def together(parts: Sequence[tuple[Facts, Snapshot]]) -> Loaded:
    """What a checkpoint of these parts would hold, in the order of `_complete`."""
    trees = [_tree(snapshot) for _, snapshot in parts]
    owned = {facts["rank"]: tree["state"] for (facts, _), tree in zip(parts, trees, strict=True)}
    if parts[0][0]["kind"] == SHARD:
        whole = joined(trees)
    else:
        whole, main = trees[0], owned[0]
        whole["state"]["kept"] = main["kept"]
        for key, buffers in main.get("buffers", {}).items():  # each rank has its own, and the main rank's count
            into = whole["others"][key] if key in whole["others"] else whole[key]
            for name, value in buffers.items():
                into[name].copy_(value)
    sums: dict[str, float] = {}
    for _, state in sorted(owned.items()):
        for name, value in state["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
    state = {**whole["state"], "sums": sums, "rng": [state["rng"][0] for _, state in sorted(owned.items())]}
    return Loaded(whole["weights"], state, whole["ema"], whole["others"], {"step": state["step"]})


def _tree(snapshot: Snapshot) -> dict[str, Any]:
    others = {name: _entries(weights) for name, weights in snapshot.others.items()}
    ema = None if snapshot.ema is None else _entries(snapshot.ema)
    return {"weights": _entries(snapshot.weights), "state": snapshot.state, "ema": ema, "others": others}


def _entries(weights: Weights) -> dict[str, Any]:
    """A state_dict again, as `read_tensors` makes it of files."""
    weights.rest.update(weights.tensors)
    weights.rest.update({name: weights.rest[tied] for name, tied in weights.aliases.items()})
    return weights.rest
