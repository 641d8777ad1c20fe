"""Processes that read the same files: one finds out what is to be known of them, and the others wait for it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: set[Path] = set()  # by this process


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; without locks in its file system, or where it cannot be opened, nobody waits.

    Who holds one waits for no other, neither the same, which would be for itself, nor another folder's, since two
    processes could wait for each other; then both find out the same.
    """
    try:
        descriptor = None if _held else os.open(folder, os.O_RDONLY)
    except OSError:  # which the reader will tell
        descriptor = None
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _held.add(folder)
        yield
    finally:
        _held.discard(folder)
        os.close(descriptor)
