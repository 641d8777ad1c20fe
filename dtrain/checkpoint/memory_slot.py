"""A snapshot in shared memory: copied there once, sealed when it is whole, and read back by whoever comes later."""

import contextlib
import copyreg
import errno
import io
import mmap
import os
import pickle
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dtrain.checkpoint.contents import CheckpointError, HostMemory, Snapshot, Weights
from dtrain.tracking.whole_file import write_bytes

HEAD, DATA = ".head", ".data"
_ALIGNMENT, _PAGE = 64, mmap.ALLOCATIONGRANULARITY  # bytes: of a tensor, and of an extent of a file
_LARGEST_SHARED = 16 * 2**20  # bytes of an extent that tensors share; it is as large as all of these before it
_BLOCK = 512  # numbers of 8 bytes, of which the checksum takes one sum
Facts = dict[str, Any]  # what a head says first, in plain values: which part of which step it is, and where it lies


class Slot(HostMemory):
    """Two files in shared memory, for one snapshot after another: the tensors, and a head that makes them valid.

    `take` copies into the first and takes the head of the last snapshot away; `seal` writes the new head, whole or not
    at all. Between the two nothing is there, however the process ends.

    Args:
        stem: The files' path without ending. What is there is removed.
    """

    def __init__(self, stem: Path) -> None:
        self.head, self.data = Path(f"{stem}{HEAD}"), Path(f"{stem}{DATA}")
        self.remove()
        self._file = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.extents: list[Tensor] = []  # of bytes: the file, in pieces
        self._shared, self._used, self._shared_bytes = 0, 0, 0  # the one that gets tensors now, its used bytes, of all
        self._copies: dict[str, Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}  # address of a copy -> extent, offset

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._file)

    def remove(self) -> None:
        """Take both files away; memory that is still in use stays as long as it is."""
        self.head.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)

    def take(self, weights: Any, state: Any, ema: Any, others: Any, take_snapshot: Callable[..., Snapshot]) -> Snapshot:
        """A snapshot whose tensors lie in the file; OSError (ENOSPC) where they do not fit."""
        self.head.unlink(missing_ok=True)
        return take_snapshot(weights, state, ema, self._copies, others, memory=self)

    def seal(self, facts: Facts, snapshot: Snapshot) -> bytes:
        """Make it valid; returns the head."""
        content = sealed(facts, snapshot, self.extents, self._places)
        write_bytes(self.head, content)
        return content

    def reserve(self, sizes: Sequence[int]) -> None:
        """Have extents of these sizes, which are about to be written; OSError where they do not fit."""
        self.head.unlink(missing_ok=True)
        if [extent.numel() for extent in self.extents] != sizes:
            self.extents = []
            os.ftruncate(self._file, 0)
            for size in sizes:
                self.grow(size)

    def accept(self, head: bytes) -> None:
        """Make valid what another node has sealed, and whose extents were written to this file."""
        write_bytes(self.head, head)

    def grow(self, size: int) -> Tensor:
        """Another extent of at least so many bytes, reserved: else a full memory would end the process."""
        size = -(-size // _PAGE) * _PAGE
        at = sum(extent.numel() for extent in self.extents)
        if size > (free := free_bytes(self.data.parent)):
            text = f"{size / 1e9:.3g} GB more are needed, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, text, str(self.data.parent))
        os.posix_fallocate(self._file, at, size)
        self.extents.append(torch.frombuffer(mmap.mmap(self._file, size, offset=at), dtype=torch.uint8))
        return self.extents[-1]

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory in the file for a tensor, with its strides."""
        strides = torch.empty_like(tensor, device="meta").stride()
        if not (size := tensor.nbytes):
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        number, at = self._space_for(size)
        memory = self.extents[number][at : at + size]
        view = memory.view(tensor.dtype).as_strided(tensor.shape, strides, at // tensor.itemsize)
        self._places[view.data_ptr()] = number, at
        return view

    def _space_for(self, size: int) -> tuple[int, int]:
        """The number of an extent and an offset in it, for so many bytes: large tensors have extents of their own."""
        if size >= _LARGEST_SHARED:
            self.grow(size)
            return len(self.extents) - 1, 0
        if not self._shared_bytes or self._used + size > self.extents[self._shared].numel():
            grown = self.grow(max(size, min(_LARGEST_SHARED, self._shared_bytes)))
            self._shared, self._used = len(self.extents) - 1, 0
            self._shared_bytes += grown.numel()
        at, self._used = self._used, self._used + -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._shared, at


def free_bytes(folder: Path) -> int:
    """What a folder in memory can still take: of its own limit, of the machine's memory, and of the control group's."""
    space = os.statvfs(folder)
    return max(0, min(space.f_bavail * space.f_frsize, psutil.virtual_memory().available, _free_of_group()))


def _free_of_group() -> int:
    """What this process's control group (a container, a batch job) may still take; where it has no limit, all."""
    free = 2**62
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))[3:]
        group = Path(f"/sys/fs/cgroup/{own}")
        for folder in (group, *list(group.parents)[: len(Path(own).parts) - 1]):
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, int(limit) - int(used["anon"]) - int(used["shmem"]))
    return free


# ---------------------------------------------------------------------------------------------------- heads, and back


def stored_tensor(*_: Any) -> Tensor:
    """Stands in a head for a tensor in the file; the reader puts its own function in its place."""
    raise NotImplementedError


def loose_tensor(*_: Any) -> Tensor:
    """The same for a tensor that a head holds itself."""
    raise NotImplementedError


def sealed(facts: Facts, snapshot: Snapshot, extents: Sequence[Tensor], places: Mapping[int, tuple[int, int]]) -> bytes:
    """A head: a checksum of what follows, the facts, and the snapshot, with places in the extents for its tensors."""
    stream = io.BytesIO()
    sizes = [extent.numel() for extent in extents]
    pickle.dump({**facts, "sizes": sizes, "sums": [checksum(extent) for extent in extents]}, stream, protocol=5)

    def reduce(tensor: Tensor) -> tuple[Any, ...]:
        place = places.get(tensor.data_ptr()) if tensor.layout == torch.strided else None
        if place is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return stored_tensor, (*place, dtype, tuple(tensor.shape), tensor.stride())
        loose = io.BytesIO()
        torch.save(tensor, loose)
        return loose_tensor, (loose.getvalue(),)

    pickler = pickle.Pickler(stream, protocol=5)
    pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: reduce}
    pickler.dump(snapshot)
    content = stream.getvalue()
    return zlib.crc32(content).to_bytes(4, "little") + content


def checksum(extent: Tensor) -> int:
    """Of bytes: at a tenth of the time of a CRC of all of them, it takes a CRC of the sums of their blocks."""
    numbers = extent.view(torch.int64)
    return zlib.crc32(memoryview(numbers.view(-1, _BLOCK).sum(1).numpy()))  # type: ignore[arg-type]


def facts_of(head: bytes) -> Facts:
    """What a head says; CheckpointError where it is damaged."""
    return _begun(head)[1]


def snapshot_of(head: bytes, extents: Sequence[Tensor]) -> Snapshot:
    """The snapshot, whose tensors are copies; nothing in the head is executed. CheckpointError where it is damaged."""
    stream, facts = _begun(head)
    if [extent.numel() for extent in extents] != facts["sizes"] or [*map(checksum, extents)] != facts["sums"]:
        raise CheckpointError("what was kept in memory is damaged: it differs from its checksum")
    snapshot: Snapshot = _Reader(stream, extents).load()
    return snapshot


def _begun(head: bytes) -> tuple[io.BytesIO, Facts]:
    if int.from_bytes(head[:4], "little") != zlib.crc32(head[4:]):
        raise CheckpointError("what was kept in memory is damaged: its head differs from its checksum")
    stream = io.BytesIO(head[4:])
    facts: Facts = _Reader(stream, []).load()
    return stream, facts


def mapped(data: Path, sizes: Sequence[int]) -> list[Tensor]:
    """The extents of a file as they lie there; who writes to them does not change the file."""
    extents, at = [], 0
    with data.open("rb") as file:
        for size in sizes:
            memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, offset=at)
            extents.append(torch.frombuffer(memory, dtype=torch.uint8))
            at += size
    return extents


def found_in(folder: Path) -> list[tuple[Path, Facts]]:
    """The heads in a folder whose snapshots are whole, with what they say."""
    return [(path, facts) for path in _heads_in(folder) if (facts := _whole(path)) is not None]


def damaged_in(folder: Path) -> list[Path]:
    """The heads of which something is not what was sealed; a process that was killed leaves none of these."""
    return [path for path in _heads_in(folder) if _whole(path) is None]


def _heads_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"[!.]*{HEAD}"))


def _whole(head: Path) -> Facts | None:
    with contextlib.suppress(CheckpointError, OSError, ValueError):
        facts = facts_of(head.read_bytes())
        if [*map(checksum, mapped(head.with_suffix(DATA), facts["sizes"]))] == facts["sums"]:
            return facts
    return None


class _Reader(pickle.Unpickler):
    """Builds what a checkpoint may hold, and nothing else."""

    def __init__(self, stream: io.BytesIO, extents: Sequence[Tensor]) -> None:
        super().__init__(stream)
        self._known: dict[tuple[str, str], Any] = {
            (each.__module__, each.__qualname__): each
            for each in (OrderedDict, Counter, torch.Size, torch.device, Snapshot, Weights, set, complex, bytearray)
        }
        self._known[__name__, "stored_tensor"] = self._stored
        self._known[__name__, "loose_tensor"] = self._loose
        self._extents = extents

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for what is not known."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a checkpoint holds")
        return self._known[module, name]

    def _stored(self, extent: int, offset: int, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        memory = self._extents[extent][offset:]
        kind: torch.dtype = getattr(torch, dtype)
        usable = memory[: memory.numel() // kind.itemsize * kind.itemsize].view(kind)
        # A copy: the file may go while it is in use.
        return usable.as_strided(shape, stride, usable.storage_offset()).clone()

    def _loose(self, content: bytes) -> Tensor:
        tensor: Tensor = torch.load(io.BytesIO(content), weights_only=True)
        return tensor
