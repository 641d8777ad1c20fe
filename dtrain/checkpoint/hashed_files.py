"""Files that are hashed while they are written or read: nothing is read a second time to know its SHA-256."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dtrain.checkpoint.contents import SAFETENSORS_NAMES

Seal = dict[str, Any]  # bytes and sha256 of a file, as a manifest has them
_PIECE_BYTES = 2**20  # so much is read while what was read before is hashed
_AHEAD_BYTES = 64 * 2**20  # so far the disk is asked to read ahead of that
_GAP_BYTES = 2**20  # what is passed over between two tensors; a larger jump is one to the end of the file, and back


class HashedWriter:
    """A new file that is written from its beginning to its end, as torch.save does."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "w")
        self._hash, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes | memoryview) -> int:
        """Write all of it; other threads run meanwhile."""
        left = memoryview(content).cast("B")
        size = len(left)
        self._hash.update(left)
        while left:
            left = left[self._file.write(left) :]
        self._bytes += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def seal(self) -> Seal:
        """What was written, once it is on the disk itself."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


class HashedReader(io.RawIOBase):
    """A file that is read into tensors' own memory by torch.load or `tensors_in`, in about the order of its bytes.

    A thread hashes what was read while the next pieces are read, and the disk reads ahead of both.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)
        self._size = os.fstat(self._file.fileno()).st_size
        self._hash, self._hashed = hashlib.sha256(), 0  # up to where
        self._asked = 0  # up to where the disk reads ahead
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hash")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As any file."""
        return self._file.tell()

    def readinto(self, memory: Any) -> int:
        """Fill memory as far as the file goes; the hash covers each byte once, whatever is read again."""
        view, at = memoryview(memory).cast("B"), self.tell()
        if self._hashed < at <= self._hashed + _GAP_BYTES:
            self._file.seek(self._hashed)
            self._fill(memoryview(bytearray(at - self._hashed)), self._hashed)
        return self._fill(view, at)

    def _fill(self, view: memoryview, at: int) -> int:
        done, pending = 0, None
        try:
            while done < len(view):
                self._read_ahead(at + done)
                if not (count := self._file.readinto(view[done : done + _PIECE_BYTES])):
                    break
                if at + done <= self._hashed < at + done + count:
                    # Not waited for at once: the disk does not wait for the hash, nor the hash for the disk.
                    pending = self._hasher.submit(self._hash.update, view[self._hashed - at : done + count])
                    self._hashed = at + done + count
                done += count
        finally:
            if pending is not None:  # the memory is not ours
                pending.result()
        return done

    def _read_ahead(self, at: int) -> None:
        if hasattr(os, "posix_fadvise") and self._asked < min(self._size, at + _AHEAD_BYTES // 2):
            start, self._asked = max(self._asked, at), at + _AHEAD_BYTES
            os.posix_fadvise(self._file.fileno(), start, self._asked - start, os.POSIX_FADV_WILLNEED)

    def seal(self) -> Seal:
        """Of the whole file: what nobody has asked for is read, too."""
        self._file.seek(self._hashed)
        rest = bytearray(_PIECE_BYTES)
        while self._fill(memoryview(rest), self._hashed):
            pass
        return {"bytes": self._hashed, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file, and end the thread."""
        self._hasher.shutdown()
        self._file.close()
        super().close()


def tensors_in(file: HashedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in memory of their own, and the metadata of its header.

    ValueError, KeyError or TypeError where it is none.
    """
    header, start = _header_of(file)
    metadata = header.pop("__metadata__", {})
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        tensor = torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]])
        if not 0 <= begin <= end <= file._size - start or end - begin != tensor.nbytes:
            raise ValueError(f"the place of {name} is not in the file")
        if tensor.nbytes:
            file.seek(start + begin)
            file.readinto(_bytes_of(tensor))
        tensors[name] = tensor
    return tensors, metadata


def _header_of(file: HashedReader) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its tensors begin."""
    size = int.from_bytes(file.read(8) or b"", "little")
    if not 2 <= size <= file._size - 8:
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(size) or b"")
    if not isinstance(header, dict):
        raise TypeError("its header is not a mapping")
    return header, 8 + size


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
    """Write one safetensors file, larger elements first, so that each tensor lies at a multiple of its elements' size.

    Nothing in it depends on the process that writes it; the tensors are written from where they lie.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with HashedWriter(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if tensor.nbytes:
                file.write(_bytes_of(tensor.contiguous()))
        return file.seal()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; of one element, its stride may be any, and `view` would refuse it."""
    begin = tensor.storage_offset() * tensor.itemsize
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), begin, (tensor.nbytes,), (1,))
    return memoryview(content.numpy())  # type: ignore[arg-type]
