"""The ranks that write a checkpoint together, each its shards: who is done with what, without a collective.

A thread of each rank writes while the ranks train, so they hear of one another by notes on the launcher's store. All
ranks save equally often, and count.
"""

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.distributed.mailbox import Mailbox

BEGUN, DONE = "checkpoint begun", "checkpoint part written"  # the notes' names
PATIENCE_SECONDS = 300.0  # so long, or ten times as long as the main rank took, others may take longer than that
_HURRIED_SECONDS = 30.0  # and so long where the training has failed: some of them may be gone
_LOST_SECONDS = 5.0  # what a rank that is gone has written, it has said long since
_SEEN_SECONDS = 10.0  # a network file system may show another node's file so much later
NOT_SHARED = -1  # in place of an errno
_LEAST_POLL_SECONDS, _MOST_POLL_SECONDS = 0.01, 0.5

Seals = dict[str, dict[str, Any]]  # by a file's path in the checkpoint, its size and SHA-256


class NotSharedError(OSError):
    """What another rank has written is not seen by the main rank."""


@dataclass
class Writers:
    """The ranks, as one of them sees them.

    Args:
        token: The same on all ranks, and different at each start: notes of an earlier start may still be there.
    """

    mailbox: Mailbox
    rank: int
    world_size: int
    token: str
    patience_seconds: float = PATIENCE_SECONDS
    _count: int = field(default=0, init=False)

    def next(self) -> "SharedWrite":
        """The next checkpoint that is written together; every rank asks for it."""
        self._count += 1
        return SharedWrite(self, f"{self.token}-{self._count}")

    def hurry(self, one_is_lost: bool = False) -> None:
        """The training has failed: do not wait long for ranks that are perhaps gone, or of which one certainly is."""
        self.patience_seconds = min(self.patience_seconds, _LOST_SECONDS if one_is_lost else _HURRIED_SECONDS)


@dataclass
class SharedWrite:
    """One checkpoint that is being written by all ranks."""

    writers: Writers
    number: str
    _has_begun: bool = field(default=False, init=False)

    @property
    def is_main(self) -> bool:
        """Whether it is this rank that makes a checkpoint of what all have written."""
        return self.writers.rank == 0

    def begin(self, folder: Path) -> None:
        """The main rank has made the folder: the others may write to it."""
        self._has_begun = True
        self.writers.mailbox.post(BEGUN, (self.number, str(folder.absolute()), ""))

    def cancel(self, reason: str) -> None:
        """The main rank could not begin; nothing where it has."""
        if not self._has_begun:
            self._has_begun = True
            self.writers.mailbox.post(BEGUN, (self.number, "", reason))

    def folder(self) -> Path:
        """Where the other ranks write, once the main rank has begun; OSError where it could not, or is gone."""
        began = time.monotonic()
        for pause in _pauses():
            number, folder, reason = self.writers.mailbox.note(BEGUN, 0) or ("", "", "")
            if number == self.number and folder:
                return _seen(Path(folder), began)
            if number == self.number:
                raise OSError(0, reason)
            if time.monotonic() - began > self.writers.patience_seconds:
                break
            time.sleep(pause)
        raise OSError(0, "rank 0 did not begin it")

    def tell(self, files: Seals, is_finite: bool) -> None:
        """This rank's files are written."""
        self.writers.mailbox.post(DONE, (self.number, socket.gethostname(), files, is_finite, 0, ""))

    def fail(self, code: int, reason: str) -> None:
        """This rank's files are not written: an errno, or NOT_SHARED, and why."""
        self.writers.mailbox.post(DONE, (self.number, socket.gethostname(), {}, True, code, reason))

    def collect(self, folder: Path, own_seconds: float, own_error: BaseException | None) -> tuple[Seals, bool]:
        """The other ranks' files, and whether all numbers in them are finite, on the main rank.

        It returns when no rank writes any more, also where one has failed; that is then an OSError with its name.
        """
        found: dict[int, Any] = {}
        began = time.monotonic()
        for pause in _pauses():
            for rank in set(range(1, self.writers.world_size)) - found.keys():
                note = self.writers.mailbox.note(DONE, rank)
                if note and note[0] == self.number:
                    found[rank] = note[1:]
            missing = sorted(set(range(1, self.writers.world_size)) - found.keys())
            if not missing or time.monotonic() - began > self._patience(own_seconds):
                break
            time.sleep(pause)
        if own_error is not None:
            raise own_error
        if missing:
            named = ", ".join(map(str, missing[:10]))
            raise OSError(0, f"rank {named} did not finish its part within {time.monotonic() - began:.0f} s of rank 0")
        for rank, (host, _, _, code, reason) in sorted(found.items()):
            _require_written(code, reason, f"rank {rank} on {host}")
        files: Seals = {}
        for rank, (host, its_files, _, _, _) in sorted(found.items()):
            _require_seen(folder, its_files, f"rank {rank} on {host}")
            files |= its_files
        return files, all(is_finite for _, _, is_finite, _, _ in found.values())

    def _patience(self, own_seconds: float) -> float:
        least = self.writers.patience_seconds
        return max(least, 10 * own_seconds) if least == PATIENCE_SECONDS else least


def _seen(folder: Path, began: float) -> Path:
    while not folder.is_dir():
        if time.monotonic() - began > _SEEN_SECONDS:
            raise NotSharedError(0, f"{folder} is not seen")
        time.sleep(_MOST_POLL_SECONDS)
    return folder


def _require_written(code: int, reason: str, who: str) -> None:
    if code == NOT_SHARED:
        raise NotSharedError(0, f"{reason} by {who}: the ranks do not share this folder")
    if code or reason:
        raise OSError(code, f"{reason} ({who})")


def _require_seen(folder: Path, files: Seals, who: str) -> None:
    """NotSharedError where another rank's file is not there for this one, as with a folder on each node's own disk."""
    end = time.monotonic() + _SEEN_SECONDS
    for name, seal in files.items():
        while not (folder / name).is_file() or (folder / name).stat().st_size != seal["bytes"]:
            if time.monotonic() > end:
                text = f"{folder / name} of {who} is not seen by rank 0: the ranks do not share this folder"
                raise NotSharedError(0, text)
            sum(1 for _ in folder.iterdir())  # has a network file system look again
            time.sleep(_MOST_POLL_SECONDS)


def _pauses() -> Iterator[float]:
    """Seconds between looks at the notes, longer and longer."""
    pause = _LEAST_POLL_SECONDS
    while True:
        yield pause
        pause = min(1.2 * pause, _MOST_POLL_SECONDS)
