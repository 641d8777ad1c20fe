"""What a checkpoint holds: state_dicts and plain values, copied to host memory and checked."""

import dataclasses
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.distributed.fsdp import chunk_of, is_shard


def _name(kind: type) -> str:
    public = kind.__module__.partition("._")[0]  # pathlib's own from 3.13 on is pathlib._local
    return kind.__qualname__ if public == "builtins" else f"{public}.{kind.__qualname__}"


# What torch.load(weights_only=True) builds without being told to trust anything (torch/_weights_only_unpickler.py).
# Types are compared exactly: numpy.float64 is a float and an IntEnum an int, yet both are pickled as themselves.
_SCALARS = (NoneType, bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, dict, OrderedDict, Counter)
_ALLOWED = "tensors, None, " + ", ".join(_name(kind) for kind in (*_SCALARS[1:], *_CONTAINERS))
_MAX_DEPTH = 100
_MAX_INT_BITS = 2039  # a longer int gets a pickle opcode that weights_only does not know; so do empty bytes

_LAYOUTS = {torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_DTYPES = {*SAFETENSORS_NAMES, torch.complex32, torch.complex128}

_PLAIN_FORMS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda x: hasattr(x, "tolist"), "give x.item() of a scalar, torch.from_numpy(x) or x.tolist() of an array"),
    (lambda x: isinstance(x, PurePath), "give str(x)"),
    (lambda x: isinstance(x, Enum), "give x.value or x.name"),
    (dataclasses.is_dataclass, "give dataclasses.asdict(x)"),
    (lambda x: hasattr(x, "to_dict"), "give x.to_dict()"),
    (lambda x: hasattr(x, "state_dict"), "give x.state_dict()"),
    (lambda x: isinstance(x, torch.Generator), "give x.get_state()"),
    (lambda x: isinstance(x, Mapping), "give dict(x)"),
    (lambda x: isinstance(x, tuple), "give tuple(x)"),
    (lambda x: hasattr(x, "isoformat"), "give x.isoformat()"),
    (lambda x: hasattr(x, "__iter__"), "give list(x)"),
    (lambda x: True, "save the plain values in it"),
)


class CheckpointError(Exception):
    """A checkpoint that cannot be written, is damaged, or does not exist; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """One state_dict, split by what can hold it."""

    tensors: dict[str, Tensor]  # in host memory, of which they share none, for safetensors
    aliases: dict[str, str]  # the tied names: name -> the name in `tensors` that has the same elements
    rest: dict[str, Any]  # all other entries (`get_extra_state`, sparse tensors), in plain types
    offsets: dict[str, tuple[int, ...]] | None = None  # where shards begin; None: all tensors are whole


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that one checkpoint holds, or what one rank gives to it, in host memory.

    `need_bytes` is the size of its tensors. In the `state` of a sharded one, tensors of the meta device stand for those
    that lie in `shards`.
    """

    weights: Weights
    ema: Weights | None
    state: dict[str, Any]
    need_bytes: int
    others: dict[str, Weights] = dataclasses.field(default_factory=dict)  # further ones, by the name of their file
    shards: Weights | None = None  # of the state, by their path in it (`dotted`); None: all of it is whole
    until_there: Callable[[], None] | None = None  # waits until all copies are made, where a device still makes them

    def is_finite(self) -> bool:
        """Whether no weight, averaged ones included, is nan or infinite."""
        parts = [part.tensors for part in (self.weights, self.ema, *self.others.values()) if part is not None]
        return all(_is_finite(tensor) for tensors in parts for tensor in tensors.values())


class HostMemory:
    """Where a snapshot's copies come to lie, and how they get there."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        """New memory for the copy of a tensor."""
        return torch.empty_like(tensor, device="cpu")

    def copy(self, host: Tensor, tensor: Tensor) -> None:
        """Copy a tensor there as it is now; it may take until `finish`'s answer has returned."""
        host.copy_(tensor)

    def finish(self) -> Callable[[], None] | None:
        """Called after a snapshot's last copy: what waits until all are made, or None where they are."""
        return None


def take_snapshot(
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    ema: Mapping[str, Any] | None = None,
    copies: dict[str, Tensor] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    share: Literal["all", "main", "shards"] = "all",
    memory: HostMemory | None = None,
) -> Snapshot:
    """Bring everything to host memory and check that it can be loaded again with `weights_only=True`.

    With `copies`, all tensors are copied, into the memory of those of the last snapshot that it was given to, which
    must be written by now: new memory costs four times the copy; `memory` gives what more is needed, and copies.
    Without `copies`, only tensors of a device are copied, and those on the CPU must not change until the
    snapshot is written. `share` is what this rank gives to the checkpoint: all of it; of a sharded one its shards, and
    on the main rank whatever is not sharded. Raises CheckpointError for values of other types, each with its key path,
    its type and what to give instead.
    """
    memory = memory or HostMemory()
    walk = _Walk(copies, share, memory)
    own, averaged = walk.weights(weights, "weights"), None if ema is None else walk.weights(ema, "ema")
    further = {name: walk.weights(each, name) for name, each in (others or {}).items()}
    plain = walk.value(dict(state), "state")
    shards = None if share == "all" else Weights(walk.shards, {}, {}, walk.offsets)
    snapshot = Snapshot(own, averaged, plain, walk.need_bytes, further, shards, memory.finish())
    if walk.problems:
        shown, hidden = walk.problems[:10], len(walk.problems[10:])
        raise CheckpointError(
            "\n  ".join(["a checkpoint holds only what can be loaded without running code:", *shown])
            + (f"\n  and {hidden} more" if hidden else "")
            + f"\nPossible: {_ALLOWED}. Nothing was saved."
        )
    return snapshot


class _Walk:
    """One walk over all that is to be saved; collects every problem before any is raised.

    A tensor or container that is met twice is copied once, and so stored once. The originals are held until the walk is
    over: an address says who is who only as long as its owner lives.
    """

    def __init__(self, copies: dict[str, Tensor] | None, share: str, memory: HostMemory) -> None:
        self._memory = memory
        self.problems: list[str] = []
        self.need_bytes = 0
        self.shards: dict[str, Tensor] = {}  # of the state, with
        self.offsets: dict[str, tuple[int, ...]] = {}
        self._divides, self._is_main = share != "all", share != "shards"
        self._shards_met = 0
        self._copies = copies
        self._last_copies = {} if copies is None else dict(copies)
        if copies is not None:
            copies.clear()  # what is not used again is freed
        self._done: dict[int, tuple[Any, Any]] = {}
        self._texts: dict[str, str] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    def value(self, value: Any, place: str, depth: int = 0) -> Any:
        """The host copy of a value; `place` is its key path, for messages."""
        if isinstance(value, Tensor):
            return self.tensor(value, place)
        kind = type(value)
        if kind in _SCALARS:
            if (kind is bytes and not value) or (kind is int and value.bit_length() > _MAX_INT_BITS):
                self._refuse(value, place, f"empty bytes and ints of over {_MAX_INT_BITS} bits cannot be loaded again")
            # Equal texts become one object, or the file would tell which of them were one in this process.
            return self._texts.setdefault(value, value) if kind is str else value
        if kind not in _CONTAINERS:
            self._refuse(value, place, next(cure for fits, cure in _PLAIN_FORMS if fits(value)))
            return None
        if id(value) not in self._done:
            self._done[id(value)] = value, self  # itself as the mark of one whose inside is being walked
            self._done[id(value)] = value, self._container(value, place, depth + 1)
        copy = self._done[id(value)][1]
        if copy is self or depth == _MAX_DEPTH:
            self._refuse(value, place, f"it contains itself or lies deeper than {_MAX_DEPTH} levels")
            return None
        return copy

    def tensor(self, tensor: Tensor, place: str) -> Tensor:
        """A tensor in host memory, detached; with no more memory behind it than it shows."""
        if id(tensor) in self._done:
            return self._done[id(tensor)][1]
        if self._divides and is_shard(tensor):
            own = self._shard(tensor, place, self.offsets, name := dotted(place))
            if name in self.shards:
                self._refuse(tensor, place, f"two tensors have the path {name!r}; rename a key")
            if own is not None:
                self.shards[name] = own
            self._done[id(tensor)] = tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            return self._done[id(tensor)][1]
        if not self._is_main:
            return torch.empty(0)
        if reason := _why_not(tensor):
            self._refuse(tensor, place, reason)
            return torch.empty(0)
        host = self._host(tensor, place)
        self._done[id(tensor)] = tensor, host
        return host

    def _shard(self, tensor: Any, place: str, offsets: dict[str, tuple[int, ...]], name: str) -> Tensor | None:
        """The host copy of this rank's part of a sharded tensor, and its offsets; None where another rank writes it."""
        chunk = chunk_of(tensor, self._shards_met)
        self._shards_met += 1
        if chunk.local.dtype not in SAFETENSORS_NAMES:
            self._refuse(tensor, place, f"shards of {chunk.local.dtype} cannot be stored; state_dict_type: full can")
            return None
        if not chunk.is_written_here:
            return None
        offsets[name] = chunk.offsets
        return self._host(chunk.local, place)

    def _host(self, tensor: Tensor, place: str) -> Tensor:
        host = self._copy(tensor.detach(), place)
        if self._copies is None and host.layout == torch.strided:
            memory = host.untyped_storage()
            # torch.save would write all the memory behind a view, and refuses to write any under two dtypes.
            if memory.nbytes() > host.nbytes or self._dtypes.setdefault(memory.data_ptr(), host.dtype) != host.dtype:
                host = host.clone()
        self.need_bytes += _elements(host).nbytes
        return host

    def _copy(self, tensor: Tensor, place: str) -> Tensor:
        """A tensor of the CPU itself or the copy of another; with `copies` always a copy."""
        if self._copies is None or tensor.layout != torch.strided:
            return tensor.to("cpu", copy=self._copies is not None).resolve_conj().resolve_neg()
        host = self._last_copies.pop(place, None)
        if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
            host = self._memory.empty_like(tensor)
        self._copies[place] = host
        self._memory.copy(host, tensor)
        return host

    def weights(self, weights: Mapping[str, Any], place: str) -> Weights:
        """Split a state_dict into what safetensors can hold, the aliases among it, and the rest."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        rest: OrderedDict[str, Any] = OrderedDict()
        if metadata := getattr(weights, "_metadata", None):
            rest._metadata = metadata  # type: ignore[attr-defined]  # by these versions modules upgrade old entries
        names: dict[tuple[Any, ...], str] = {}
        memory: set[int] = set()
        offsets: dict[str, tuple[int, ...]] = {}
        for name, value in weights.items():
            if self._divides and is_shard(value):
                local = value.to_local()
                if local.numel() and (tied := names.setdefault(_identity(local), name)) != name:
                    self._shards_met += 1
                    aliases[name] = tied
                elif (own := self._shard(value, f"{place}[{name!r}]", offsets, name)) is not None:
                    tensors[name] = own
                continue
            if not self._is_main:
                continue
            if not _fits_safetensors(name, value):
                rest[name] = value
            elif value.numel() and (tied := names.setdefault(_identity(value), name)) != name:
                aliases[name] = tied
            else:
                host = self.tensor(value, f"{place}[{name!r}]")
                # The same memory in another shape is not an alias, and safetensors refuses to write it twice.
                tensors[name] = host.clone() if host.data_ptr() in memory else host
                memory.add(tensors[name].data_ptr())
        return Weights(tensors, aliases, self.value(rest, place), offsets if self._divides else None)

    def _container(self, value: Any, place: str, depth: int) -> Any:
        kind = type(value)
        if depth > _MAX_DEPTH:
            return None
        if not isinstance(value, dict):
            # Short ints need no look one by one: the state of a generator holds 625 of them, on each rank.
            if set(map(type, value)) == {int} and min(value) >= -(1 << 63) and max(value) < 1 << 63:
                return kind(value)
            return kind(self.value(item, f"{place}[{index}]", depth) for index, item in enumerate(value))
        copy = kind()
        for key, item in value.items():
            if type(key) not in (*_SCALARS, tuple):
                self._refuse(key, f"a key of {place}", "use text or a number as the key")
                continue
            copy[self.value(key, f"a key of {place}", depth)] = self.value(item, f"{place}[{key!r}]", depth)
        if kind is OrderedDict and vars(value):  # pickled with it: a state_dict's _metadata, for example
            vars(copy).update(self.value(vars(value), f"{place}.__dict__", depth) or {})
        return copy

    def _refuse(self, value: Any, place: str, reason: str) -> None:
        self.problems.append(f"{place} is a {_name(type(value))}: {reason}")


def dotted(place: str) -> str:
    """A key path as torch.distributed.checkpoint has it: state['optimizer']['state'][0] -> optimizer.state.0."""
    return re.sub(r"\[(['\"]?)(.*?)\1\]", r".\2", place.removeprefix("state")).removeprefix(".")


def _fits_safetensors(name: Any, value: Any) -> bool:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_meta or value.is_nested:
        return False
    named = type(name) is str and name != "__metadata__"  # that name is the format's own
    return named and value.layout == torch.strided and value.dtype in SAFETENSORS_NAMES


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of the same elements in the same order have in common; of originals, not of copies."""
    view = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), *view


def _why_not(tensor: Tensor) -> str:
    """Why a tensor cannot be saved, '' if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return "a subclass of torch.Tensor; give x.full_tensor() of a DTensor, else x.as_subclass(torch.Tensor)"
    if tensor.is_meta:
        return "it has no data (meta device); make it with real data first"
    if tensor.is_nested or tensor.layout not in _LAYOUTS or tensor.dtype not in _DTYPES:
        form = "nested" if tensor.is_nested else f"{tensor.layout}, {tensor.dtype}"
        return f"tensors of this form ({form}) cannot be stored; give a dense one of an ordinary dtype"
    return ""


def _elements(tensor: Tensor) -> Tensor:
    """The numbers of a tensor; of a sparse one those that it stores."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.itemsize == 1:
        tensor = tensor.float()  # the 8-bit formats have no minimum
    # isfinite().all() takes 30 times as long and a copy of the tensor; a nan anywhere makes both ends nan.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))
