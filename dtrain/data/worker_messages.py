"""How loader workers pass batches on: small ones several at a time through the pipe, others in memory that is shared.

For each tensor torch makes a new file of shared memory and sends its descriptor over a connection of its own: half a
millisecond for a batch that takes a tenth of that to load. Here all tensors of a message lie in one piece of memory. A
small one travels with the message. A larger one is a block that the worker keeps and uses again once the rank has let
go of all tensors in it; the rank copies nothing.
"""

import contextlib
import ctypes
import functools
import io
import itertools
import multiprocessing
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map

PIPE_BYTES = 1 << 16  # of a message whose tensors travel with it: what a pipe holds
GROUP_SECONDS = 0.002  # of loading that are worth a message of their own
GROUP_BYTES = 1 << 20
MOST_IN_GROUP = 16  # batches
MOST_BLOCKS = 8  # that a worker keeps; what needs one more has it for one message
_ALIGNED = 64  # bytes, at which tensors begin
_HEAD = 64  # bytes of a block before its tensors; the first says whether the rank still uses it

Counted = tuple[Any, int]  # a batch, and how many of its samples count


class Group(list[Any]):
    """Requests for several batches, which come in one message."""


class Made(NamedTuple):
    """What a worker made of a group."""

    batches: list[Any]  # each with the number of its samples; in place of the last one, an error
    seconds: float


class Groups:
    """A batch sampler's requests in groups of as many as are worth a message, by what the last one took."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.size = sampler, 1

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Group]:
        requests = iter(self.sampler)
        for request in requests:
            yield Group([request, *itertools.islice(requests, self.size - 1)])

    def batches_of(self, message: tuple[Made, int]) -> Iterator[Counted]:
        """The batches of a message that came from a worker, with its size in bytes.

        Raises:
            Exception: What was raised in the worker, after the batches before it.
        """
        made, size = message
        count = len(made.batches)
        worth = min(GROUP_SECONDS / max(made.seconds, 1e-9), GROUP_BYTES / max(size, 1))
        self.size = max(1, min(int(count * worth), 2 * count, MOST_IN_GROUP))
        for batch in made.batches:
            if isinstance(batch, ExceptionWrapper):
                batch.reraise()
            yield batch


def made(group: Iterator[Counted], may_share: bool = False) -> Made:
    """The batches of a group, up to the first that cannot be made.

    Those that may share memory, which a dataset fills anew for each sample, are taken down one by one.
    """
    began, batches = time.perf_counter(), list[Any]()
    try:
        batches.extend(map(_Pickled, group) if may_share else group)
    except Exception:
        if not batches:
            raise
        worker: Any = get_worker_info()
        batches.append(ExceptionWrapper(where=f"in DataLoader worker process {worker.id}"))
    return Made(batches, time.perf_counter() - began)


def collated(items: list[Any]) -> Any:
    """What torch's default_collate gives; in a worker right in the block in which it will be passed on."""
    if get_worker_info() is not None:
        return collate(items, collate_fn_map=_collate_map())
    first = items[0]
    if not isinstance(first, tuple(default_collate_fn_map)):  # to which a user may have added
        with contextlib.suppress(Exception):  # which default_collate raises, too, and with a better message
            if type(first) is tuple:
                return [*map(_column, zip(*items, strict=True))]
            if type(first) is dict:
                return {key: _column([item[key] for item in items]) for key in first}
    return default_collate(items)


def _column(values: Any) -> Any:
    """The same of one entry of each sample; where these are tensors, in half of the time."""
    first = values[0]
    is_stacked = type(first) is torch.Tensor and default_collate_fn_map[torch.Tensor] is collate_tensor_fn
    if is_stacked and first.layout is torch.strided and not first.is_nested:
        return torch.stack(values)
    return default_collate(values)


def _collate_map() -> dict[Any, Any]:
    if default_collate_fn_map[torch.Tensor] is not collate_tensor_fn:  # a user's own
        return default_collate_fn_map
    # What a function of a user's own makes of a tensor may outlive the message.
    are_torchs = all(getattr(each, "__module__", "") == collate.__module__ for each in default_collate_fn_map.values())
    return {**default_collate_fn_map, torch.Tensor: _stacked_in_block if are_torchs else _stacked}


def _stacked(batch: Any, *, collate_fn_map: Any = None, has_space: bool = False) -> torch.Tensor:
    """Without workers torch gives samples of several dtypes the one that holds all; in a worker the first one's."""
    first = batch[0]
    if first.is_nested or first.layout is not torch.strided or first.device.type != "cpu":
        stacked: torch.Tensor = default_collate_fn_map[torch.Tensor](batch, collate_fn_map=collate_fn_map)
        return stacked
    is_plain = has_space and all(type(each) is torch.Tensor and each.dtype is first.dtype for each in batch)
    return torch.stack(batch, 0, out=_blocks.space((len(batch), *first.shape), first.dtype) if is_plain else None)


_stacked_in_block = functools.partial(_stacked, has_space=True)


def packed(value: Any) -> "Message | Any":
    """What a worker hands over to torch; without workers, the value."""
    return _blocks.packed(value) if isinstance(value, Made) else value


class Message:
    """Content and memory of what a worker passes on; unpickled, it is that, and its size in bytes."""

    def __init__(self, unpack: Callable[..., Any], *arguments: Any) -> None:
        self.unpack, self.arguments = unpack, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.unpack, self.arguments


class _Pickler(ForkingPickler):
    """Torch's for other processes, but for plain tensors in memory, which it hands out as buffers."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not _is_plain(value):
            return NotImplemented
        buffer: Any = value.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(buffer), value.dtype, tuple(value.shape))


class _Pickled:
    """A value as it is now, whatever becomes of the memory that it lies in."""

    def __init__(self, value: Any) -> None:
        self.content, parts = _pickled(value)
        self.buffers: list[Any] = [np.frombuffer(part.raw(), np.uint8).copy() for part in parts]

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_pickled, (self.content, [pickle.PickleBuffer(buffer) for buffer in self.buffers])


def _pickled(value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    parts: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, 5, True, parts.append).dump(value)
    return file.getvalue(), parts


def _of_pickled(content: bytes, buffers: list[Any]) -> Any:
    return pickle.loads(content, buffers=buffers)


def _is_plain(value: torch.Tensor) -> bool:
    if value.device.type != "cpu" or value.layout is not torch.strided or value.requires_grad or value.is_quantized:
        return False
    return bool(value.is_contiguous() and value.numel()) and not (value.is_conj() or value.is_neg() or value.is_nested)


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


# ------------------------------------------------------------------------------------------------------- in the worker


class _Block:
    """Shared memory in which a worker passes a message on."""

    def __init__(self, size: int, slot: int) -> None:
        self.shared = torch.zeros(_HEAD + size, dtype=torch.uint8).share_memory_()
        self.slot, self.is_known, self.used = slot, False, 0  # bytes, of those after the head
        self.bytes = self.shared.numpy()
        self.begin = self.shared.data_ptr() + _HEAD
        self.size = size

    @property
    def is_free(self) -> bool:
        return not self.bytes[0]

    def lacks(self, buffers: list[np.ndarray]) -> bool:
        """Whether those that are not in it already do not fit."""
        return self.used + sum(_aligned(each.nbytes) for each in buffers if self.place(each) is None) > self.size

    def place(self, buffer: np.ndarray) -> int | None:
        """Where in it a buffer lies; None: elsewhere."""
        place = buffer.ctypes.data - self.begin
        return place if 0 <= place < self.size else None

    def put(self, buffer: np.ndarray) -> int:
        """Where in it a buffer lies, which is copied into it unless it is there already."""
        if (place := self.place(buffer)) is None:
            place, self.used = self.used, _aligned(self.used + buffer.nbytes)
            self.bytes[_HEAD + place : _HEAD + place + buffer.nbytes] = buffer
        return place


class _Blocks:
    """The blocks of this worker, of which one is open: batches are collated right into it."""

    def __init__(self) -> None:
        self.slots: list[_Block] = []
        self.open: _Block | None = None

    def space(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Where a tensor may be made, if the next message will have a block with space for it."""
        block, size = self.open, dtype.itemsize
        for extent in shape:
            size *= extent
        if block is None or not size or block.used + size > block.size:
            return None
        place, block.used = _HEAD + block.used, _aligned(block.used + size)
        return block.shared[place : place + size].view(dtype).view(shape)

    def packed(self, value: Any) -> Message:
        """A message of a value; the next one's block is open then."""
        content, parts = _pickled(value)
        buffers = [np.frombuffer(part.raw(), np.uint8) for part in parts]
        sizes = [buffer.nbytes for buffer in buffers]
        size = sum(map(_aligned, sizes))
        if size <= PIPE_BYTES:
            memory, places = np.empty(size, np.uint8), [0, *np.cumsum([*map(_aligned, sizes)]).tolist()][:-1]
            for place, buffer in zip(places, buffers, strict=True):
                memory[place : place + buffer.nbytes] = buffer
            self._open(0)
            return Message(_from_bytes, content, places, sizes, memory.tobytes())
        block = self.open
        if block is None or block.lacks(buffers):  # then it is passed over, whatever was made in it
            block = self._free(size)
        places = [block.put(buffer) for buffer in buffers]
        block.bytes[0] = 1
        known, block.is_known = block.is_known, True
        self._open(size)
        shared = None if known else block.shared
        return Message(_from_block, content, places, sizes, (os.getpid(), block.slot), shared)

    def _open(self, size: int) -> None:
        """Have a block for a message of that size, where there is one already; 0: it has none."""
        fitting = (block for block in self.slots if size and block.is_free and block.size >= size)
        if (block := next(fitting, None)) is not None:
            block.used = 0
        self.open = block

    def _free(self, size: int) -> _Block:
        """A block in which nothing is, for so many bytes."""
        free = [block for block in self.slots if block.is_free and block is not self.open]
        if fitting := [block for block in free if block.size >= size]:
            fitting[0].used = 0
            return fitting[0]
        if len(self.slots) < MOST_BLOCKS:
            self.slots.append(_Block(size + size // 8, len(self.slots)))
            return self.slots[-1]
        if not free:
            return _Block(size, -1)
        slot = free[0].slot
        self.slots[slot] = _Block(size + size // 8, slot)
        return self.slots[slot]


_blocks = _Blocks()  # of a worker; its own, since they are made in it alone


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


# --------------------------------------------------------------------------------------------------------- in the rank

_received: dict[tuple[int, int], np.ndarray] = {}  # the blocks of workers, by process and slot


def _from_bytes(content: bytes, places: list[int], sizes: list[int], memory: bytes) -> tuple[Any, int]:
    view = memoryview(bytearray(memory))
    return _unpickled(content, places, sizes, view), len(memory)


def _from_block(
    content: bytes, places: list[int], sizes: list[int], key: tuple[int, int], shared: torch.Tensor | None
) -> tuple[Any, int]:
    if shared is None:
        block: Any = _received[key]
    else:
        block = shared.numpy()
        living = {child.pid for child in multiprocessing.active_children()}
        for process, slot in [*_received]:
            if process not in living:
                del _received[process, slot]
        if key[1] >= 0:
            _received[key] = block
    lent = (ctypes.c_ubyte * block.nbytes).from_buffer(block)
    # Every tensor holds the memory that it lies in, and that is freed with the last of them.
    weakref.finalize(lent, _give_back, block, os.getpid()).atexit = False
    return _unpickled(content, places, sizes, memoryview(lent).cast("B")[_HEAD:]), sum(sizes)


def _unpickled(content: bytes, places: list[int], sizes: list[int], memory: memoryview) -> Any:
    buffers = [memory[place : place + size] for place, size in zip(places, sizes, strict=True)]
    return pickle.loads(content, buffers=buffers)


def _give_back(block: np.ndarray, process: int) -> None:
    with contextlib.suppress(Exception):
        if os.getpid() == process:  # a fork has it, too, but no say in it
            block[0] = 0
