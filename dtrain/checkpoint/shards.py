"""A checkpoint's shards: tensors of which each rank has written its part, in the form of torch.distributed.checkpoint.

The files are what its HuggingFaceStorageWriter would write, and its HuggingFaceStorageReader reads: safetensors, with
the place of each part in the header. Its other form (FileSystemWriter) keeps the places in a pickle, which runs code
when it is read, and the writer for this one makes all bytes of a file in memory before it writes them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.checkpoint.contents import CheckpointError, dotted

SHARDING = "DCP_SHARDING_INFO"  # torch's key in the header
_PIECE_BYTES = 64 * 2**20  # so much of a tensor is in memory at a time where one is copied from file to file


def shard_name(rank: int, world_size: int) -> str:
    """The name of a rank's file; they are counted from 1, as those of torch and Hugging Face are."""
    return f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def header_of(offsets: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file's header says of where its parts begin; of a whole tensor that is at 0."""
    places = {name: {"saved_offsets": offsets.get(name, (0,) * item.dim())} for name, item in tensors.items()}
    return {"DCP_VERSION": "1.0", SHARDING: json.dumps(places)}


class Part(NamedTuple):
    """A part of a tensor, in a file."""

    path: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files, of which no more is read than is asked for."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]

    def dim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def read_part(self, offsets: Iterable[int] | None = None, sizes: Iterable[int] | None = None) -> Tensor:
        """The part that begins at these offsets and has these sizes, in host memory; all of it by default."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        begin = torch.Size([0] * self.dim() if offsets is None else offsets)
        wanted = torch.empty(self.shape if sizes is None else tuple(sizes), dtype=self.dtype)
        if not wanted.numel():
            return wanted
        there = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in self.parts]
        described = TensorStorageMetadata(TensorProperties(self.dtype), self.shape, there)
        own = ChunkStorageMetadata(begin, wanted.shape)
        for item in create_read_items_for_chunk_list(self.name, described, [own]):
            path = self.parts[item.storage_index.index or 0].path
            wanted[_slices(item.dest_offsets, item.lengths)] = self._from_file(path, item.storage_offsets, item.lengths)
        return wanted

    def _from_file(self, path: Path, offsets: Iterable[int], sizes: Iterable[int]) -> Tensor:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_slice(self.name)[_slices(offsets, sizes)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error

    def pieces(self) -> Iterator[Tensor]:
        """All of it, some rows at a time."""
        if not self.dim():
            yield self.read_part()
            return
        row_bytes = max(1, prod(self.shape[1:]) * self.dtype.itemsize)
        rows = max(1, _PIECE_BYTES // row_bytes)
        for first in range(0, self.shape[0], rows):
            sizes = min(rows, self.shape[0] - first), *self.shape[1:]
            yield self.read_part((first, *[0] * (self.dim() - 1)), sizes)


def _slices(offsets: Iterable[int], sizes: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors in a folder of shards, or in one safetensors file, by name; tied ones have several names.

    Only the files' headers are read. CheckpointError where one cannot be, or where a part of a tensor is in none.
    """
    found: dict[str, list[tuple[Part, torch.dtype]]] = {}
    aliases: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                header = opened.metadata() or {}
                places = json.loads(header.get(SHARDING, "{}"))
                aliases |= json.loads(header.get("aliases", "{}"))
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    offsets = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
                    dtype = part[(slice(0, 0),) * len(shape)].dtype
                    found.setdefault(name, []).append((Part(file, offsets, shape), dtype))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read as a safetensors file: {error}") from error
    stored = {name: _put_together(name, parts) for name, parts in found.items()}
    try:
        return stored | {name: stored[tied] for name, tied in aliases.items()}
    except KeyError as error:
        raise CheckpointError(f"{path}: nothing is there of {error}") from error


def _put_together(name: str, found: list[tuple[Part, torch.dtype]]) -> Stored:
    parts = tuple(part for part, _ in found)
    ends = [[offset + size for offset, size in zip(part.offsets, part.sizes, strict=True)] for part in parts]
    shape = torch.Size([max(column) for column in zip(*ends, strict=True)])
    if sum(prod(part.sizes) for part in parts) != shape.numel():
        raise CheckpointError(f"{parts[0].path.parent}: not all of {name} is there, in {len(parts)} files")
    return Stored(name, shape, found[0][1], parts)


def whole(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """All tensors, read into host memory; tied ones are tied."""
    read: dict[int, Tensor] = {}
    for each in stored.values():
        if id(each) not in read:
            read[id(each)] = each.read_part()
    return {name: read[id(each)] for name, each in stored.items()}


def with_shards(value: Any, stored: Mapping[str, Any], place: str = "state", done: dict[int, Any] | None = None) -> Any:
    """A state with what lies in the shards in place of the tensors of the meta device that stand for it."""
    done = {} if done is None else done
    if isinstance(value, Tensor) and value.is_meta:
        if id(value) not in done:
            name = dotted(place)
            if name not in stored or stored[name].shape != value.shape:
                raise CheckpointError(f"of {name} nothing fitting is in the shards")
            done[id(value)] = stored[name]
        return done[id(value)]
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = with_shards(item, stored, f"{place}[{key!r}]", done)
    elif type(value) in (list, tuple):
        return type(value)(with_shards(item, stored, f"{place}[{index}]", done) for index, item in enumerate(value))
    return value


def write_whole(path: Path, stored: Mapping[str, Stored]) -> int:
    """Write one safetensors file, piece by piece, so that its tensors are never all in memory; returns its bytes.

    The header, which comes first, says of each tensor where it lies: all of that is known before. Tied tensors are
    written once, with their other names in the metadata, as in a checkpoint of whole weights.
    """
    names: dict[int, str] = {}
    aliases = {name: names[id(each)] for name, each in stored.items() if names.setdefault(id(each), name) != name}
    own = sorted((each for name, each in stored.items() if name not in aliases), key=_in_file)
    header: dict[str, Any] = {"__metadata__": {"aliases": json.dumps(aliases), "format": "pt"}}
    end = 0
    for each in own:
        begin, end = end, end + each.shape.numel() * each.dtype.itemsize
        header[names[id(each)]] = {
            "dtype": _dtype_name(each), "shape": list(each.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in own:
            for piece in each.pieces():
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return path.stat().st_size


def _in_file(each: Stored) -> tuple[int, str]:
    """Larger elements first, so that each tensor lies at a multiple of its elements' size."""
    return -each.dtype.itemsize, each.name


def _dtype_name(each: Stored) -> str:
    """The format's own name of its dtype, as the file says that it is read from."""
    with safe_open(each.parts[0].path, framework="pt", device="cpu") as file:
        return file.get_slice(each.name).get_dtype()
