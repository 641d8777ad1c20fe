"""What predictions leave in their folder: finished files, parts of unfinished ones, and what they were made with.

All but the finished files lies in a hidden folder. Knows no model, no patches and no rank.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dtrain.config.errors import ConfigError
from dtrain.predict.formats import whole_file
from dtrain.tracking.whole_file import read_json, write_json

HIDDEN = ".dtrain"

Stamp = Mapping[str, Any]


class Folder:
    """The folder that predictions are written to.

    Args:
        path: The folder, made when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.hidden = path, path / HIDDEN

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, and be the only prediction that writes it.

        Raises:
            ConfigError: It cannot be made or written, or another prediction is at work in it.
        """
        try:
            self.hidden.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.hidden / "lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{self.path} is being written by another prediction; wait for its end") from error
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def file(self, name: str, ending: str) -> Path:
        """Where the prediction of an input of this name goes."""
        return self.path / f"{name}_predictions{ending}"

    def difference(self, file: Path, stamp: Stamp) -> str | None:
        """In what a file differs from one that would be made now: '' in nothing; None: there is no such file."""
        if not file.exists():
            return None
        record = read_json(self._record(file))
        if record.get("bytes") != file.stat().st_size:
            return "who made it is not known"
        before = record["stamp"]
        return ", ".join(key for key in {**before, **stamp} if before.get(key) != stamp.get(key))

    def note(self, file: Path, written: Path, stamp: Stamp, facts: Mapping[str, Any]) -> None:
        """Note what a file is made with that is written and about to get its name."""
        write_json(self._record(file), {"stamp": stamp, "bytes": written.stat().st_size, **facts}, durable=True)

    def clear_parts(self, file: Path) -> None:
        """Remove the parts of a finished file."""
        shutil.rmtree(self._parts(file), ignore_errors=True)

    def facts(self, file: Path) -> dict[str, Any]:
        """What was noted of a finished file."""
        return read_json(self._record(file))

    def part(self, file: Path, stamp: Stamp, begin: int, end: int) -> Path:
        """Where planes [begin, end) of an unfinished file are; parts made with anything else lie elsewhere."""
        return self._parts(file) / digest(stamp)[:16] / f"{begin:09d}-{end:09d}.npy"

    def clear_foreign_parts(self, file: Path, stamp: Stamp) -> None:
        """Remove parts that were made with something else, and what a dead writer left."""
        own = digest(stamp)[:16]
        for entry in self._parts(file).iterdir() if self._parts(file).is_dir() else ():
            if entry.name != own:
                shutil.rmtree(entry, ignore_errors=True)
        for left in (*self._parts(file).glob("*/.*"), *self.path.glob(f".*-{file.name}")):
            left.unlink(missing_ok=True)

    def scratch(self, file: Path) -> Path:
        """A place for a temporary file."""
        return self.hidden / f"{file.name}.scratch"

    def _record(self, file: Path) -> Path:
        return self.hidden / f"{file.name}.json"

    def _parts(self, file: Path) -> Path:
        return self.hidden / f"{file.name}.parts"


def digest(value: Any) -> str:
    """A short name of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_part(path: Path, chunks: Iterator[np.ndarray], planes: int) -> None:
    """Write chunks of planes to a .npy file, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(target: Path) -> None:
        with target.open("wb") as file:
            for number, chunk in enumerate(chunks):
                if not number:
                    header = {"descr": chunk.dtype.str, "fortran_order": False, "shape": (planes, *chunk.shape[1:])}
                    np.lib.format.write_array_header_2_0(file, header)
                file.write(np.ascontiguousarray(chunk).data)

    whole_file(path, fill)


def read_parts(paths: list[Path], chunk_bytes: int = 1 << 25) -> Iterator[np.ndarray]:
    """The planes of all parts, some at a time."""
    for path in paths:
        part = np.load(path, mmap_mode="r")
        step = max(1, chunk_bytes // max(part[0].nbytes, 1))
        for low in range(0, len(part), step):
            yield np.array(part[low : low + step])


def cut(chunks: Iterator[tuple[int, np.ndarray]], slabs: list[tuple[int, int]]) -> Iterator[Iterator[np.ndarray]]:
    """Divide a stream of planes, planes first, at the borders of slabs; each slab is to be used up before the next."""
    rest: tuple[int, np.ndarray] | None = None

    def of_slab(end: int) -> Iterator[np.ndarray]:
        nonlocal rest
        while True:
            low, chunk = rest if rest is not None else next(chunks)
            rest = None
            if low + len(chunk) > end:
                rest = end, chunk[end - low :]
                chunk = chunk[: end - low]
            yield chunk
            if low + len(chunk) == end:
                return

    for _, end in slabs:
        yield of_slab(end)


def facts_of(path: Path) -> dict[str, Any]:
    """What tells one version of an input file from another without reading it."""
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"bytes": found.st_size, "modified": found.st_mtime_ns}
