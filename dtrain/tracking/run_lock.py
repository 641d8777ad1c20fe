"""One training at a time in a run folder: a lock that rank 0 holds as long as it lives."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from dtrain.tracking.run_folder import NO_LOCKS, RunFolder, lives

BEAT_SECONDS = 2.0  # the lock's file is touched so often
STALE_SECONDS = 20.0  # after so long without a beat, the process on another host is gone
PATIENCE_SECONDS = 2.0  # for one that is just ending, or that only looks
SETTLE_SECONDS = 1.0  # where nothing but the file decides: two that write it at once have both written it by then
_RECORD_BYTES = 512  # always as long, so that no part of an older record is left
_held: set[int] = set()  # descriptors; a forked child, such as a loader's worker, must not keep a lock alive


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class FolderIsBusyError(Exception):
    """Another training writes the run folder; says which one, and what can be done."""


class RunLock:
    """The lock on a run folder, from `take_lock`: a file in it, locked where the disk has locks.

    The file says who holds it, and its time of change is a heartbeat. That is what decides where the disk has no locks,
    or only such as other hosts do not see.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor
        self._folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._record = _record_of_this_process()
        self._stopped = threading.Event()

    def write(self) -> None:
        """Say in the file that this process has it."""
        os.pwrite(self._descriptor, json.dumps(self._record).encode().ljust(_RECORD_BYTES), 0)

    def is_written_here(self) -> bool:
        """Whether the file that has the lock's name says so."""
        return _read(RunFolder(self.folder).lock).get("token") == self._record["token"]

    def start_beating(self) -> None:
        """Touch the file now and then, in a thread that costs nothing in between."""
        threading.Thread(target=self._beat, args=(self._descriptor,), name="run lock", daemon=True).start()

    def _beat(self, descriptor: int) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is away for a while
                os.utime(descriptor)

    @property
    def is_in_place(self) -> bool:
        """Whether the run folder's name still leads to the folder that is locked."""
        return _is_same_file(self._folder_descriptor, self.folder)

    def home(self) -> Path | None:
        """Where the folder that is locked lies now, by whatever name; None where it was removed.

        Raises:
            OSError: This system does not say.
        """
        link = Path(f"/proc/self/fd/{self._folder_descriptor}").readlink()
        return link if _is_same_file(self._folder_descriptor, link) else None

    def release(self) -> None:
        """Give it up; a second call does nothing."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if _is_same_file(self._descriptor, RunFolder(self.folder).lock):
            with contextlib.suppress(OSError):
                RunFolder(self.folder).lock.unlink()
        os.close(self._folder_descriptor)
        _close(self._descriptor)


def take_lock(folder: Path) -> RunLock:
    """Lock a run folder, which is made if need be, for this process.

    Raises:
        FolderIsBusyError: Another process holds it.
        OSError: The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, deadline = RunFolder(folder).lock, time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _held.add(descriptor)
        try:
            is_locked = _flock(descriptor)
            if is_locked is not False and _is_same_file(descriptor, path):  # else its holder has just removed it
                _refuse_living(folder, bool(is_locked))
                lock = RunLock(folder, descriptor)
                _claim(lock, bool(is_locked))
                lock.start_beating()
                return lock
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        if time.monotonic() > deadline:
            raise FolderIsBusyError(_told(folder, _read(path)))
        time.sleep(0.05)


def writer_of(folder: Path) -> str:
    """Who is certain to hold a run folder's lock, as a sentence; '' where nobody is. Nothing is changed.

    Of a process on another host a beat or two is waited for; that it is gone is for `take_lock` to find out.
    """
    path = RunFolder(folder).lock
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        is_locked = _flock(descriptor, fcntl.LOCK_SH)
        record = _read(path)
        is_busy = is_locked is False or _is_alive(path, record, is_locked, 2 * BEAT_SECONDS)
    finally:
        os.close(descriptor)
    return _told(folder, record) if is_busy else ""


def _claim(lock: RunLock, is_locked: bool) -> None:
    """Write the record; where it alone decides, of two that do so at once the later one has the folder."""
    try:
        lock.write()
    except OSError:
        if not is_locked:
            raise
        return  # a full disk: the lock itself holds, and others do not learn whose it is
    if not is_locked:
        time.sleep(SETTLE_SECONDS)
        if not lock.is_written_here():
            raise FolderIsBusyError(_told(lock.folder, _read(RunFolder(lock.folder).lock)))


def _refuse_living(folder: Path, is_locked: bool) -> None:
    """Raise where the process that the file names is alive; of one on another host, its heartbeat tells."""
    path = RunFolder(folder).lock
    record = _read(path)
    if _is_alive(path, record, is_locked, STALE_SECONDS):
        raise FolderIsBusyError(_told(folder, record))


def _is_alive(path: Path, record: dict[str, Any], is_locked: bool | None, seconds: float) -> bool:
    """Whether the process of a record is there, as far as this can be seen in some time."""
    if not record:
        return False
    if record.get("processes") == _process_table():
        return not is_locked and lives({"pid": record["pid"], "attempt_started": record["since"]})
    return _beats(path, seconds)


def _beats(path: Path, seconds: float) -> bool:
    """Whether somebody touches the file while this waits; no clock of another host is compared."""
    first, end = _changed_at(path), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.25)
        if _changed_at(path) != first:
            return True
    return False


def _changed_at(path: Path) -> int:
    """Its time of change in ns, as the disk has it: network disks answer truly for a file that was just opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether the lock was free and is now held; None where the disk has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in NO_LOCKS:
            return None
        raise


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """The record in a lock's file; {} where there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _record_of_this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": round(time.time(), 3),
        "processes": _process_table(),
        "token": uuid.uuid4().hex,
    }


def _process_table() -> str:
    """What tells whether a process number means the same process here and there: this boot, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _told(folder: Path, record: dict[str, Any]) -> str:
    who = "its lock says not which"
    if record:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["since"]))
        who = f"process {record['pid']} on {record['host']}, since {since}"
    return (
        f"{folder} is being written by another training ({who}); "
        "wait for its end, stop it, or give this one another trainer.checkpoint_dir"
    )
