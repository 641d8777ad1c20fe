"""Checkpoints on disk: written whole or not at all, verified, kept, found again. Knows no ranks, config or model."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import dtrain
from dtrain.snapshot import CheckpointError, Snapshot, find_weights, take_snapshot, unwrapped_names

__all__ = ["CheckpointError", "Checkpoints", "Loaded", "load", "load_weights", "verify"]

MODEL, EMA, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
FORMAT = 1
LOCK_TIMEOUT_SECONDS = 60.0

Manifest = dict[str, Any]

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap the OSError they met
_CURES = {
    errno.ENOSPC: "The disk is full (space or number of files): free some, or choose another folder.",
    errno.EDQUOT: "The quota is used up: free some space, or choose another folder.",
    errno.EFBIG: "The file would pass the limit on file sizes (ulimit -f): raise it, or choose another folder.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.EACCES: "The folder may not be written: change its permissions, or choose another folder.",
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns; all tensors lie on the CPU.

    Attributes:
        weights: the model's state_dict as it was given to `save`, `get_extra_state` entries and tied tensors included.
        state: everything else that resuming needs, as it was given to `save`.
        ema: the averaged weights, or None where none were saved.
        manifest: step, score (None, a number, or a number's text if nan or infinite), finite, serial, time (unix
            seconds), versions, files.
    """

    weights: dict[str, Any]
    state: dict[str, Any]
    ema: dict[str, Any] | None
    manifest: Manifest


class Checkpoints:
    """The checkpoints of one run: folders like `step-00001200` beside the symbolic links `last` and `best`.

    The folders are the truth and are scanned; the links are for people, and are missing where a file system has none.
    Instances share nothing but the folder, and a lock in it lets one writer in at a time.

    Args:
        folder: `<run>/checkpoints`; made when something is first written.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: how many of the best by score to keep besides.
        mode: 'max' or 'min', what a good score is.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1, mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; possible: 'max', 'min'")
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is {keep_last} (at least 1), keep_best is {keep_best} (at least 0)")
        self.folder = Path(folder)
        self._keep_last, self._keep_best, self._mode = keep_last, keep_best, mode
        if _leftovers(self.folder):
            # A program that only reads may lack the right to write, or a writer may be at work: neither stops it.
            with suppress(CheckpointError), self._writing(self.folder, 0, timeout_seconds=0):
                pass

    def check(
        self, weights: Mapping[str, Any], state: Mapping[str, Any], *, ema: Mapping[str, Any] | None = None
    ) -> None:
        """Raise, before the first step, what `save` would raise: types, a folder that cannot be written, a full disk.

        A checkpoint of one number is written there and removed.

        Raises:
            CheckpointError: as `save`. The space for what an optimizer adds at its first step cannot be foreseen here.
        """
        snapshot = take_snapshot(weights, state, ema)
        trial = take_snapshot({"weight": torch.zeros(1)}, {})
        with self._writing(self.folder, snapshot.need_bytes, LOCK_TIMEOUT_SECONDS):
            _require_space(self.folder, snapshot.need_bytes)
            try:  # it is also the first use of much C++, which in a thread must not meet with a fork: see calm.py
                _write_files(self.folder / ".tmp-step-trial", trial, {"finite": trial.is_finite()})
            finally:
                self._clear_leftovers()

    def save(
        self,
        step: int,
        weights: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        ema: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> Path:
        """Write one checkpoint, whole or not at all, then remove those that need not be kept.

        Tensors of a device are copied to host memory first. Those on the CPU are written from where they lie.

        Args:
            step: optimizer steps done. A checkpoint of the same step is replaced, whole or not at all.
            weights: the model's `state_dict()`, unwrapped (no 'module.').
            state: tensors and plain types, nested: whatever `torch.load(weights_only=True)` takes.
            ema: averaged weights, as `weights`.
            score: what `best` goes by; None and nan never win.

        Returns:
            The checkpoint's folder, complete and on the disk.

        Raises:
            CheckpointError: a value of a type that could not be loaded again, or a failed write, of which nothing is
                left. Older checkpoints are untouched in both cases.
            ValueError: the step is negative.
        """
        return self.write(step, take_snapshot(weights, state, ema), score)

    def write(self, step: int, snapshot: Snapshot, score: float | None = None) -> Path:
        """The second half of `save`; a thread's, where the snapshot holds copies."""
        if step < 0:
            raise ValueError(f"step is {step}; it counts optimizer steps and is never negative")
        target = self.folder / f"step-{step:08d}"
        score = None if score is None else float(score)
        facts = {
            "format": FORMAT,
            "step": step,
            "score": score if score is None or math.isfinite(score) else str(score),  # JSON has no nan
            "finite": snapshot.is_finite(),
            "time": time.time(),
            "versions": {"dtrain": getattr(dtrain, "__version__", "unknown"), "torch": str(torch.__version__)},
        }
        with self._writing(target, snapshot.need_bytes, LOCK_TIMEOUT_SECONDS):
            self._write(target, snapshot, facts)
            self._rotate(target)
        return target

    def last(self) -> Path | None:
        """The newest checkpoint that verifies, or None; one that is passed over is named in a warning."""
        readable, unreadable = self._scan()
        return _first_good([*unreadable, *(path for path, _ in readable)])

    def best(self) -> Path | None:
        """The checkpoint with the best score that verifies, or None; one that is passed over is named in a warning."""
        readable, unreadable = self._scan()
        return _first_good([*unreadable, *self._ranked(readable)])

    @contextmanager
    def _writing(self, target: Path, need_bytes: int, timeout_seconds: float) -> Iterator[None]:
        """Be the only writer in the folder; a failed write becomes one sentence.

        What is temporary while the lock is held is a dead writer's, of whatever host, and is cleared.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, timeout_seconds)
            self._clear_leftovers()
            yield
        except _WRITE_ERRORS as error:
            raise _failure(target, need_bytes, error) from error
        finally:
            lock.release()

    def _clear_leftovers(self) -> None:
        """Remove what an interrupted writer left, and put back a checkpoint that it had moved aside to replace it."""
        for left in _leftovers(self.folder):
            target = self.folder / left.name.removeprefix(".old-")
            if left.name.startswith(".old-") and not target.exists():
                left.rename(target)
            elif left.is_symlink():
                left.unlink()
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _write(self, target: Path, snapshot: Snapshot, facts: Manifest) -> None:
        _require_space(self.folder, snapshot.need_bytes)
        readable, _ = self._scan()
        # The newest has neither always the highest step (a run may go back) nor the latest time (clocks jump).
        serial = 1 + max((manifest["serial"] for _, manifest in readable), default=0)
        temporary = self.folder / f".tmp-{target.name}"
        try:
            _write_files(temporary, snapshot, {**facts, "serial": serial})
            if target.exists():
                target.rename(self.folder / f".old-{target.name}")
            temporary.rename(target)
            _fsync(self.folder)
        finally:
            self._clear_leftovers()

    def _rotate(self, newest: Path) -> None:
        readable, _ = self._scan()
        ranked = self._ranked(readable)
        keep = {path for path, _ in readable[: self._keep_last]} | set(ranked[: self._keep_best])
        # Broken weights never push the last healthy ones out. What was just written needs no second reading.
        healthy = (path for path, manifest in readable if manifest["finite"] and (path == newest or not verify(path)))
        keep.add(next(healthy, newest))
        self._link("last", newest)
        self._link("best", next((path for path in ranked if path in keep), None))
        for path, _ in readable:
            if path not in keep:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        try:
            # Renamed first: a half-removed folder must not look like a damaged checkpoint.
            shutil.rmtree(path.rename(self.folder / f".tmp-{path.name}"))
        except OSError as error:
            warnings.warn(f"{path} is no longer needed but could not be removed: {error}", stacklevel=4)

    def _link(self, name: str, target: Path | None) -> None:
        link, temporary = self.folder / name, self.folder / f".tmp-{name}"
        with suppress(OSError):  # no links on this file system, or a folder of that name: nothing depends on the link
            if target is not None:
                temporary.symlink_to(target.name)
                temporary.replace(link)
            elif link.is_symlink():
                link.unlink()
        with suppress(OSError):
            temporary.unlink()

    def _scan(self) -> tuple[list[tuple[Path, Manifest]], list[Path]]:
        """All checkpoints with their manifests, newest first, and the folders whose manifest cannot be read."""
        readable, unreadable = [], []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if _step_in(path.name) is not None and path.is_dir():
                try:
                    readable.append((path, _read_manifest(path)))
                except CheckpointError:
                    unreadable.append(path)
        return sorted(readable, key=lambda found: found[1]["serial"], reverse=True), unreadable

    def _ranked(self, readable: list[tuple[Path, Manifest]]) -> list[Path]:
        """Those with a score, best first: finite weights before others, the older of two equals first."""
        sign = -1 if self._mode == "max" else 1
        ranks = []
        for path, manifest in readable:
            score = math.nan if manifest["score"] is None else float(manifest["score"])
            if math.isfinite(score):
                ranks.append((not manifest["finite"], sign * score, manifest["serial"], path))
        return [path for *_, path in sorted(ranks)]


def load(path: Path) -> Loaded:
    """Verify a checkpoint folder and read it into host memory; nothing in it is executed.

    Raises:
        CheckpointError: the folder is no checkpoint or is damaged; the message names the files.
    """
    manifest = _require_whole(path := Path(path))
    state = _read_torch_file(path / STATE)
    ema = _read_tensors(path / EMA, state["ema"]) if EMA in manifest["files"] else None
    return Loaded(_read_tensors(path / MODEL, state["weights"]), state["state"], ema, manifest)


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line per file that begins with its name; [] if nothing is.

    Every file is read once and compared with the SHA-256 in the manifest, and the manifest with its own. Names that
    begin with a dot are passed over: NFS and file browsers leave such files, and nothing here reads them.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {MANIFEST}
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST}: {error}"]
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = [f"{name}: a foreign file, not in the manifest" for name in sorted(present - set(files))]
    for name, sealed in files.items():
        if problem := _compare(path / name, sealed):
            problems.append(f"{name}: {problem}")
    return problems


def load_weights(path: Path) -> dict[str, Any]:
    """Weights from a checkpoint folder, a .safetensors file or a torch file, on the CPU; nothing in it is executed.

    In a torch file the weights may lie under 'model_state_dict', 'state_dict' or 'model'. 'module.' (DDP) before all
    names and '_orig_mod.' (torch.compile) anywhere are taken out of a file's names; a checkpoint folder's are kept.

    Returns:
        A state_dict, with what `get_extra_state` gave for modules that have it.

    Raises:
        CheckpointError: no such file, damaged, without weights, or one that could only be read by running code in it.
    """
    path = Path(path)
    if path.is_dir():
        _require_whole(path)
        state = _read_torch_file(path / STATE, mmap=True)  # of which the optimizer's part is then never read
        return _read_tensors(path / MODEL, copy.deepcopy(state["weights"]))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return unwrapped_names(_read_tensors(path, {}))
    try:
        return unwrapped_names(find_weights(_read_torch_file(path)))
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def _acquire(lock: FileLock, timeout_seconds: float) -> None:
    try:
        lock.acquire(timeout=timeout_seconds)
    except Timeout as error:
        raise OSError(errno.EBUSY, f"another process has been writing there for {timeout_seconds:.0f} s") from error
    except OSError as error:
        # Some network file systems know no locks: there, safety is that a run has one rank 0.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def _write_files(folder: Path, snapshot: Snapshot, facts: Manifest) -> None:
    """Write all files of one checkpoint and force them to the disk, the manifest last."""
    folder.mkdir()
    rests = {}
    for file, key, weights in ((MODEL, "weights", snapshot.weights), (EMA, "ema", snapshot.ema)):
        if weights is not None:
            metadata = {"format": "pt", "aliases": json.dumps(weights.aliases)}
            save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, folder / file, metadata)
            rests[key] = weights.rest
    with open(folder / STATE, "wb") as stream:  # given a name instead, torch hides the errno of a failed write
        torch.save({"state": snapshot.state, **rests}, stream)
    files = {}
    mode = (folder / STATE).stat().st_mode
    for path in sorted(folder.iterdir()):
        if path.stat().st_mode != mode:
            path.chmod(mode)  # safetensors makes its files unreadable for others, whatever the umask says
        _fsync(path)
        files[path.name] = _seal(path)
    (folder / MANIFEST).write_bytes(_render({**facts, "files": files}))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _render(facts: Manifest) -> bytes:
    """The one way to write a manifest; it ends with the SHA-256 of itself without that line."""
    digest = hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**facts, "sha256": digest}, indent=2) + "\n").encode()


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, and say so.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _leftovers(folder: Path) -> list[Path]:
    return [path for name in (".old-step-*", ".tmp-step-*", ".tmp-last", ".tmp-best") for path in folder.glob(name)]


def _require_space(folder: Path, need_bytes: int) -> None:
    """Refuse to begin what cannot end; the system's own error, should it come later, is handled as well."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < need_bytes:  # some network file systems report 0 of 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failure(target: Path, need_bytes: int, error: BaseException) -> CheckpointError:
    """A failed write in one message: the path, the reason, the space needed and free, and what to do."""
    code, reason = _reason(error)
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(next(at for at in (target, *target.parents) if at.exists())).free / 1e6:.1f} MB"
    return CheckpointError(
        f"{target} was not written: {reason} (need: {need_bytes / 1e6:.1f} MB, free: {free}). "
        f"{_CURES.get(code, 'Look at that folder and its disk.')} Older checkpoints are untouched."
    )


def _reason(error: BaseException) -> tuple[int, str]:
    """The errno and text of the OSError behind an error of torch ('unexpected pos') or safetensors ('os error 28')."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    if link is not None and link.errno is not None:
        return link.errno, link.strerror or str(link)
    if number := re.search(r"os error (\d+)", str(error)):
        return int(number[1]), os.strerror(int(number[1]))
    return 0, str(error)


def _step_in(name: str) -> int | None:
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-\d{8,}", name) else None


def _read_manifest(folder: Path) -> Manifest:
    """Read a manifest and hold it against its own SHA-256: byte for byte what `_render` makes of its contents."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        del manifest["sha256"]
        whole = _render(manifest) == raw
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST}: missing, so {folder} is no complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{MANIFEST}: damaged, it differs from its own SHA-256")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST}: of format {manifest.get('format')!r}; this dtrain reads format {FORMAT}")
    if _step_in(folder.name) not in (None, manifest["step"]):
        raise CheckpointError(f"{MANIFEST}: belongs to step {manifest['step']}, not to {folder.name}")
    return manifest


def _compare(path: Path, sealed: dict[str, Any]) -> str:
    """How a file differs from what the manifest says of it, '' if it does not."""
    try:
        if (size := path.stat().st_size) != sealed["bytes"]:
            return f"damaged, {size} bytes instead of {sealed['bytes']}"
        return "" if _seal(path) == sealed else "damaged, its SHA-256 is not the manifest's"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"


def _require_whole(path: Path) -> Manifest:
    if problems := verify(path):
        raise CheckpointError(f"{path} is not a whole checkpoint: {'; '.join(problems)}")
    return _read_manifest(path)


def _first_good(candidates: list[Path]) -> Path | None:
    """The first that verifies; those before it, and what is used instead, are named in one warning."""
    damaged: list[str] = []
    chosen = None
    for path in candidates:
        if not (problems := verify(path)):
            chosen = path
            break
        damaged.append(f"{path.name}/{problems[0]}")
    if damaged:
        instead = f"{chosen.name} is used instead" if chosen else "there is no other"
        warnings.warn(f"damaged checkpoints in {candidates[0].parent}: {'; '.join(damaged)}; {instead}", stacklevel=3)
    return chosen


def _read_tensors(path: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """A safetensors file with its tied tensors tied again, added to the entries that it could not hold."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                # A copy: the tensor itself is the mapped file, and would end the process if that went away.
                rest[name] = file.get_tensor(name).clone()
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        rest.update({name: rest[tied] for name, tied in aliases.items()})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    return rest


def _read_torch_file(path: Path, mmap: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file that is none of torch's fails in any way that parsing can fail
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}, which is code" if refused else str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read without running code in it: {reason}. Possible: a checkpoint folder, a "
            ".safetensors file, or what torch.save(model.state_dict(), path) makes. If you trust this file, load it "
            "with weights_only=False and save it like that."
        ) from error
