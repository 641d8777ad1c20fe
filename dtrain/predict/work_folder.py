"""The folder that predictions are written to: finished files, parts of unfinished ones, and what they were made with.

All but the finished files lies in a hidden folder.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import Timeout

from dtrain.config.errors import ConfigError, first_few
from dtrain.distributed.ranks import Ranks
from dtrain.predict.formats import FileSpec, write
from dtrain.tracking.run_folder import locked_file
from dtrain.tracking.whole_file import read_json, remove, size_of, whole_file, write_json

HIDDEN = ".dtrain"

T = TypeVar("T")


class PredictionError(RuntimeError):
    """A file of predictions cannot be written; the message is for a person."""


class PredictionFile:
    """One file of predictions, and in the hidden folder its record and, until it is finished, its parts.

    The stamp is what it is made with; two alike give the same file.
    """

    def __init__(self, path: Path, stamp: Mapping[str, Any]) -> None:
        self.path, self.stamp = path, stamp
        self.scratch = path.parent / HIDDEN / f"{path.name}.scratch"  # for a temporary file
        self._record = path.parent / HIDDEN / f"{path.name}.json"
        self._all_parts = path.parent / HIDDEN / f"{path.name}.parts"
        self._parts = self._all_parts / digest(stamp)[:16]  # parts made with anything else lie elsewhere

    def part(self, begin: int, end: int) -> Path:
        """Where planes [begin, end) are until the file is finished."""
        return self._parts / f"{begin:09d}-{end:09d}.npy"

    def difference(self) -> str | None:
        """In what the file differs from one that would be made now: '' in nothing; None: there is no such file."""
        if not self.path.exists():
            return None
        record = self.record()
        if record.get("bytes") != size_of(self.path):
            return "of unknown origin"
        before = record["stamp"]
        return ", ".join(key for key in {**before, **self.stamp} if before.get(key) != self.stamp.get(key))

    def record(self) -> dict[str, Any]:
        """What was noted of the finished file."""
        return read_json(self._record)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield a temporary path to write the file to; at the end it is there under its own name, its parts are not.

        Raises:
            PredictionError: It cannot be written.
        """
        with explained(self.path), whole_file(self.path, durable=True) as temporary:
            yield temporary
        shutil.rmtree(self._all_parts, ignore_errors=True)

    def note(self, temporary: Path, facts: Mapping[str, Any]) -> None:
        """Note what the file was made with, and facts about it, just before it gets its own name."""
        record = {"stamp": self.stamp, "bytes": size_of(temporary), **facts}
        write_json(self._record, record, durable=True)

    def clean_up(self, is_finished: bool) -> None:
        """Remove parts that are no longer needed or made with something else, and what a killed start left."""
        if is_finished:
            shutil.rmtree(self._all_parts, ignore_errors=True)
        for entry in self._all_parts.iterdir() if self._all_parts.is_dir() else ():
            if entry != self._parts:
                shutil.rmtree(entry, ignore_errors=True)
        for left in (*self._all_parts.glob("*/.*"), *self.path.parent.glob(f".*-{self.path.name}*")):
            remove(left)


@contextlib.contextmanager
def opened(folder: Path, ranks: Ranks, plan: Callable[[], T]) -> Iterator[T]:
    """Make the folder, and be the only prediction that writes to it. All ranks call it.

    Yields:
        What `plan` returned, on every rank; the main rank alone calls it, to see what there is to do.

    Raises:
        ConfigError: The folder cannot be made or written, another prediction is writing it, or `plan` refuses.
    """
    stack = contextlib.ExitStack()

    def lock_and_plan() -> T:
        try:
            (folder / HIDDEN).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_file(folder / HIDDEN / "lock", 0))
        except Timeout as error:
            raise ConfigError(f"{folder} is being written by another prediction; wait for its end") from error
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
        return plan()

    with stack:
        yield ranks.decide(lock_and_plan)


def are_finished(files: Sequence[PredictionFile], overwrite: bool) -> list[bool]:
    """Which files of a folder are there as they would be made now; what is left of earlier starts is cleaned up.

    Raises:
        ConfigError: Some were made with something else, and are not to be overwritten; nothing was removed.
    """
    differences = [file.difference() for file in files]
    foreign = [f"{file.path.name} ({text})" for file, text in zip(files, differences, strict=True) if text]
    if foreign and not overwrite:
        text = f"{files[0].path.parent} holds predictions made differently: {first_few(foreign, 3)}"
        raise ConfigError(f"{text}; --overwrite makes them anew, --output-dir writes elsewhere")
    finished = [difference == "" for difference in differences]
    for file, is_finished in zip(files, finished, strict=True):
        file.clean_up(is_finished)
    return finished


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """A failed write as one sentence, that of a PredictionError."""
    try:
        yield
    except OSError as error:
        text = f"{file} was not written: {error.strerror or error}; nothing of it is left"
        raise PredictionError(f"{text}. What is finished stays, and the next start continues from there.") from error


def digest(value: Any) -> str:
    """A short name of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_part(path: Path, chunks: Iterator[np.ndarray], planes: int) -> None:
    """Write chunks of planes to a .npy file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(chunks)
    spec = FileSpec(path, (planes, *first.shape[1:]), has_channels=False, dtype=first.dtype.str)
    with whole_file(path, durable=True) as temporary:
        write(temporary, "npy", chain([first], chunks), spec)


def read_parts(paths: Sequence[Path], chunk_bytes: int = 1 << 25) -> Iterator[np.ndarray]:
    """The planes of all parts, some at a time."""
    for path in paths:
        part = np.load(path, mmap_mode="r")
        step = max(1, chunk_bytes // max(part[0].nbytes, 1))
        for low in range(0, len(part), step):
            yield np.array(part[low : low + step])
