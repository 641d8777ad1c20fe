"""Brings what is finished in a run folder to its mirror, and removes there the checkpoints that were removed here."""

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.tracking.mirror_store import MirrorError, MirrorStore
from dtrain.tracking.run_folder import RunFolder, read_line, read_run
from dtrain.tracking.start_mirror import shown
from dtrain.tracking.whole_file import read_json, write_json

MANIFEST = "manifest.json"  # the last file of a folder that is whole or absent, with the others' SHA-256
LINKS = "links.json"  # on the far side: the symbolic links of the run folder, which object stores do not have
_NOT_MIRRORED = {"predictions"}  # which are made of the checkpoints, by other commands
_PAUSE_SECONDS, _PAUSE_PER_SECOND = 5.0, 10.0  # before files that change are sent again: of what that took last time
_log = logging.getLogger(__name__)


class NotOursError(Exception):
    """The mirror holds another training, or a later start of this one has taken it over."""


class Upload:
    """The way of one run folder to its mirror.

    Args:
        accepts: When the start began that wrote the mirror last, if this training may overwrite it though its journal
            does not know that start: its own checkpoints are newer.
        say: Takes a line for a person.
    """

    def __init__(
        self,
        folder: Path,
        store: MirrorStore,
        accepts: float | None = None,
        say: Callable[[str], object] = _log.warning,
    ) -> None:
        self.folder, self._files, self._store = folder, RunFolder(folder), store
        self._accepts, self._say = accepts, say
        known = read_json(self._files.mirror)
        self._sent: dict[str, list[int]] = known.get("files") or {}  # by name: size and time of change in ns
        self._whole: dict[str, str] = {}  # checkpoints there, by name: the SHA-256 of the manifest
        self._there: dict[str, int] | None = None  # what the far side has: sizes by name
        self._was_there = False  # the mirror, to this process's own knowledge
        self._damaged: set[str] = set()  # checkpoints here that differ from their manifest
        self._files_at = 0.0  # when files that change are due again, by the clock
        self.waiting = 0  # checkpoints and files that are still to be sent
        self.progressed_at = time.monotonic()

    def step(self, is_last: bool = False) -> bool:
        """Send what is due; whether all of it is there. The last time, what changes is due at any time."""
        if self._there is None:
            self._meet()
        plain, folders = self._found()
        changed = [name for name in plain if self._has_changed(name)]
        new = {name: seal for name, seal in folders.items() if self._whole.get(name) != seal}
        gone = self._gone(folders)
        self.waiting = len(changed) + len(new)
        if not (changed or new or gone):
            return True
        if not (new or gone or is_last or time.monotonic() >= self._files_at):
            return False
        self._require_own()
        self._send_files(changed)
        for name in sorted(new, reverse=True):  # the newest first
            self._send_folder(name, new[name])
            self.waiting -= 1
        self._remove_gone(folders)
        self.remember()
        return not self.waiting

    def _meet(self) -> None:
        """Look at the far side once; afterwards what it holds is known."""
        self._require_own()
        self._store.forget_uploads()
        self._there = there = self._store.sizes()
        self._sent = {name: sent for name, sent in self._sent.items() if there.get(name) == sent[0]}
        self._whole = {}
        for name in [name for name in there if name.rpartition("/")[2] == MANIFEST and "/" in name]:
            text = self._store.read(name)
            folder = name.rpartition("/")[0]
            if all(there.get(f"{folder}/{file}") == size for file, size in _sealed(text, "bytes").items()):
                self._whole[folder] = hashlib.sha256(text).hexdigest()

    def _require_own(self) -> None:
        """Raise where the far side is another training's, or a later start's of this one on another machine.

        So too where what was there is gone, which a disk that is no longer mounted looks like: what is sent meanwhile
        would lie in the empty folder below it.
        """
        text = self._store.read("run.json")
        if self._was_there and not text:
            raise MirrorError("what was mirrored there is gone; is its disk still mounted?", is_mistake=False)
        self._was_there = self._was_there or bool(text)
        try:
            far = dict(json.loads(text or b"{}"))
        except ValueError:  # damaged: it is written anew
            return
        if not far or far.get("attempt_started") in {self._accepts, *self._own_starts()}:
            return
        if far.get("id") != read_run(self.folder).get("id"):
            raise NotOursError(f"it holds another training ({shown(far)})")
        raise NotOursError(f"a start on {far.get('host')} has continued this training there ({shown(far)})")

    def _own_starts(self) -> Iterator[float]:
        """When each start of this training began, which run.json on the far side may name."""
        yield read_run(self.folder).get("attempt_started", 0.0)
        with suppress(OSError), self._files.journal.open("rb") as lines:
            for line in lines:
                if line.startswith(b'{"kind": "start"'):
                    yield (read_line(line).get("facts") or {}).get("attempt_started", 0.0)

    def _found(self) -> tuple[list[str], dict[str, str]]:
        """What is finished here: files by name, in the order in which they are sent; checkpoints with their seal."""
        plain, folders = [], {}
        for name, path in _walk(self.folder):
            if path.is_dir():
                folders[name] = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
            elif not name.startswith("checkpoints/"):
                plain.append(name)
        # First whose training it is; then what others have of the journal, which must never be ahead of the journal.
        first = [self._name(path) for path in (self._files.run, self._files.delivery)]
        order = {name: number for number, name in enumerate(first)}
        journal = self._name(self._files.journal)
        return sorted(plain, key=lambda name: (order.get(name, 2), name == journal, name)), folders

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _has_changed(self, name: str) -> bool:
        with suppress(OSError):
            found = (self.folder / name).stat()
            return self._sent.get(name) != [found.st_size, found.st_mtime_ns]
        return False

    def _send_files(self, names: list[str]) -> None:
        began = time.monotonic()
        for name in names:
            self._send_file(name)
            self.waiting -= 1
        self._send_links()
        now = time.monotonic()
        self._files_at = now + max(_PAUSE_SECONDS, _PAUSE_PER_SECOND * (now - began))

    def _send_file(self, name: str, sealed: str | None = None) -> None:
        """Send a file as it is now, if it is still there; one that is sealed must be what its manifest says."""
        try:
            source = (self.folder / name).open("rb")
        except FileNotFoundError:
            if sealed is not None:
                raise
            return
        with source:
            found = os.fstat(source.fileno())
            size = found.st_size if name != self._name(self._files.journal) else _whole_lines(source, found.st_size)
            sent = self._store.upload(name, source, size)
        if sealed not in (None, sent):
            raise _DamagedError(f"{name} is not what its {MANIFEST} says")
        self.progressed_at = time.monotonic()
        self._there_now[name] = size
        self._was_there = self._was_there or name == self._name(self._files.run)
        if sealed is None:
            self._sent[name] = [found.st_size, found.st_mtime_ns]

    @property
    def _there_now(self) -> dict[str, int]:
        assert self._there is not None
        return self._there

    def _send_links(self) -> None:
        links = {
            self._name(path): path.readlink().as_posix()
            for path in (self._files.checkpoints / "last", self._files.checkpoints / "best")
            if path.is_symlink()
        }
        text = json.dumps(links, indent=1).encode()
        if self._sent.get(LINKS) != [len(text), _number(text)]:
            self._store.upload(LINKS, io.BytesIO(text), len(text))
            self._sent[LINKS] = [len(text), _number(text)]

    def _send_folder(self, name: str, seal: str) -> None:
        """Send a whole folder: the manifest last, and before it the journal, so that no figure before it is missing."""
        try:
            text = (self.folder / name / MANIFEST).read_bytes()
            if hashlib.sha256(text).hexdigest() != seal or name in self._damaged:
                return
            sealed = _sealed(text, "sha256")
            if name in self._whole:  # of the same name, and now another one
                self._drop(name)
            for file in _files_below(self.folder / name):
                self._send_file(f"{name}/{file}", sealed.get(file))
                if time.monotonic() >= self._files_at:
                    self._send_files([each for each in self._found()[0] if self._has_changed(each)])
        except FileNotFoundError as error:
            if (self.folder / name / MANIFEST).exists():
                raise
            _log.info("%s was removed while it was sent: %s", name, error)
            return
        except _DamagedError as error:
            self._damaged.add(name)
            self._say(f"{name} is damaged and is not mirrored: {error}")
            return
        if self._has_changed(journal := self._name(self._files.journal)):
            self._send_file(journal)
        self._store.upload(f"{name}/{MANIFEST}", io.BytesIO(text), len(text))
        self._there_now[f"{name}/{MANIFEST}"] = len(text)
        self._whole[name] = seal
        self._send_links()
        self.remember()

    def _gone(self, folders: Mapping[str, str]) -> list[str]:
        """Files of checkpoints on the far side that are no longer here; none as long as one here is not there yet.

        Where none is here at all, the run folder is not what it was, and nothing is removed.
        """
        own = [name for name in folders if name.startswith("checkpoints/") and name not in self._damaged]
        if not own or any(self._whole.get(name) != folders[name] for name in own):
            return []
        there = (name for name in self._there_now if name.startswith("checkpoints/") and "/" in name[12:])
        return [name for name in there if not any(name.startswith(f"{folder}/") for folder in folders)]

    def _remove_gone(self, folders: Mapping[str, str]) -> None:
        for folder in {name.rpartition("/")[0] for name in self._gone(folders)}:
            if not any(name.startswith(f"{folder}/") for name in folders):  # branch-1 of branch-1/step-5
                self._drop(folder)

    def _drop(self, folder: str) -> None:
        """Remove a checkpoint there, the manifest first: half of one is none."""
        names = [name for name in self._there_now if name.startswith(f"{folder}/")]
        names.sort(key=lambda name: (not name.endswith(f"/{MANIFEST}"), name))
        self._whole.pop(folder, None)
        self._store.remove(names)
        for name in names:
            del self._there_now[name]

    def remember(self, problem: str = "") -> None:
        """Leave for the next start, and for rank 0, what is there and why not all; after a problem, look again.

        A disk that takes nothing costs only that look.
        """
        self._there = None if problem else self._there
        known = {"files": self._sent, "waiting": self.waiting, "problem": problem}
        with suppress(OSError):
            write_json(self._files.mirror, known)


class _DamagedError(Exception):
    """A file here is not what its manifest says."""


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Folders with a manifest, and files outside of them; by name. Hidden ones are locks, or not yet whole."""
    for here, folders, files in os.walk(folder, followlinks=True):
        inner = Path(here).relative_to(folder)
        if MANIFEST in files and inner != Path():
            yield inner.as_posix(), Path(here)
            folders.clear()
            continue
        skipped = _NOT_MIRRORED if inner == Path() else set()
        folders[:] = [name for name in folders if not _is_left_out(folder, Path(here) / name) and name not in skipped]
        for file in files:
            path = Path(here) / file
            if not _is_left_out(folder, path) and (inner / file) != Path(RunFolder(folder).mirror.name):
                yield (inner / file).as_posix(), path


def _is_left_out(folder: Path, path: Path) -> bool:
    """Hidden, or a link to something in the same run folder, which is mirrored under its own name."""
    if path.name.startswith("."):
        return True
    return path.is_symlink() and path.resolve().is_relative_to(folder.resolve())


def _files_below(folder: Path) -> list[str]:
    """The files of a whole folder but its manifest, also those in folders of it."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(name for name in names if name != MANIFEST)


def _sealed(manifest: bytes, key: str) -> dict[str, Any]:
    """What a manifest says of its files; {} of one that says nothing."""
    try:
        files = dict(json.loads(manifest)["files"])
        return {str(name): facts[key] for name, facts in files.items()}
    except (ValueError, KeyError, TypeError):
        return {}


def _whole_lines(source: Any, size: int) -> int:
    """How many of the first bytes are whole lines; the file is read from its beginning afterwards."""
    back = min(size, 2**20)
    source.seek(size - back)
    tail = source.read(back)
    source.seek(0)
    return int(size - back + tail.rfind(b"\n") + 1)


def _number(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
