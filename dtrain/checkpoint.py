"""Checkpoints on disk: written whole or not at all, verified, kept, found again. Knows no ranks, no config, no model."""

from __future__ import annotations

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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path, PurePath
from types import NoneType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import dtrain

MODEL, EMA, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
FORMAT = 1
LOCK_TIMEOUT_SECONDS = 60.0

Manifest = dict[str, Any]

# What torch.load(weights_only=True) builds without being told to trust anything (torch/_weights_only_unpickler.py). The
# comparison is by exact type: numpy.float64 is a float and an IntEnum an int, yet both are pickled as themselves.
_SCALARS = (NoneType, bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, dict, OrderedDict, Counter)
_ALLOWED = "tensors, None, " + ", ".join(kind.__name__ for kind in (*_SCALARS[1:], *_CONTAINERS))
_MAX_DEPTH = 100
_MAX_INT_BITS = 2039  # longer ints get a pickle opcode that weights_only does not know

_LAYOUTS = {torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_SAFETENSORS_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
}
_DTYPES = _SAFETENSORS_DTYPES | {torch.complex32, torch.complex128}

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap the OSError they met
_CURES = {
    errno.ENOSPC: "The disk is full: free space, lower keep_last or keep_best, or choose another folder.",
    errno.EDQUOT: "The quota is used up: free space, lower keep_last or keep_best, or choose another folder.",
    errno.EFBIG: "The file would pass the limit on file sizes (ulimit -f): raise the limit or choose another folder.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.EACCES: "The folder may not be written: change its permissions or choose another folder.",
}


class CheckpointError(Exception):
    """A checkpoint that cannot be written, is damaged, or is none; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns; all tensors lie on the CPU.

    Attributes:
        weights: the model's state_dict as it was given to `save`, `get_extra_state` entries and tied tensors included.
        state: everything else that resuming needs, as it was given to `save`.
        ema: the averaged weights, or None where none were saved.
        manifest: step, score (None, or a number that may be nan), finite, serial, time (unix seconds), versions, files.
    """

    weights: dict[str, Any]
    state: dict[str, Any]
    ema: dict[str, Any] | None
    manifest: Manifest


class Checkpoints:
    """The checkpoints of one run: `step-00001200` folders beside the symbolic links `last` and `best`.

    The folders are the truth and are scanned; the links are for people, and may be missing where a file system has none.
    Nothing here is shared between instances but the folder, and a lock in it lets one writer in at a time.

    Args:
        folder: `<run>/checkpoints`; made by the first `save`.
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
            # A reader without the right to write, or a writer at work, must not stop this program from starting.
            with suppress(OSError), self._alone(timeout_seconds=0):
                pass

    def check(
        self, weights: Mapping[str, Any], state: Mapping[str, Any], *, ema: Mapping[str, Any] | None = None
    ) -> None:
        """Raise what `save` would raise, before the first step: types, a folder that cannot be written, a full disk.

        Raises:
            CheckpointError: as `save`. An optimizer that makes its state at its first step needs more space than is seen.
        """
        contents = _pack(weights, state, ema)
        try:
            with self._alone(LOCK_TIMEOUT_SECONDS):
                _require_space(self.folder, contents.need_bytes)
        except _WRITE_ERRORS as error:
            raise _failure(self.folder, contents.need_bytes, error) from error

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

        Device tensors are copied to host memory first; tensors on the CPU are written from where they lie, so a caller
        that saves from a thread hands over copies that nobody changes.

        Args:
            step: optimizer steps done. A checkpoint of the same step is replaced, whole or not at all.
            weights: the model's `state_dict()`, unwrapped (no 'module.').
            state: tensors and plain types, nested in dicts and lists: whatever `torch.load(weights_only=True)` takes.
            ema: averaged weights, as `weights`.
            score: what `best` goes by; None and nan never win.

        Returns:
            The checkpoint's folder, complete and on the disk.

        Raises:
            CheckpointError: a value of a type that could not be loaded again (nothing is written), or a failed write
                (nothing is left of it). Older checkpoints are untouched in both cases.
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it counts optimizer steps and is never negative")
        target = self.folder / f"step-{step:08d}"
        contents = _pack(weights, state, ema)
        try:
            with self._alone(LOCK_TIMEOUT_SECONDS):
                self._write(target, contents, step, score)
                self._rotate(target)
        except _WRITE_ERRORS as error:
            raise _failure(target, contents.need_bytes, error) from error
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
    def _alone(self, timeout_seconds: float) -> Iterator[None]:
        """Hold the folder's lock. Temporary folders found then belong to dead writers, on whatever host, and are cleared."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=timeout_seconds)
        except Timeout as error:
            raise OSError(errno.EBUSY, f"another process is writing there (waited {timeout_seconds:.0f} s)") from error
        except OSError as error:
            # Some network file systems know no locks: then it is the run's one rank 0 that makes this safe.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        try:
            self._clear_leftovers()
            yield
        finally:
            lock.release()

    def _clear_leftovers(self) -> None:
        """Remove what an interrupted writer left, and put a checkpoint back that it had only moved aside."""
        for left in _leftovers(self.folder):
            target = self.folder / left.name.removeprefix(".old-")
            if left.name.startswith(".old-") and not target.exists():
                os.rename(left, target)
            elif left.is_symlink():
                left.unlink()
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _write(self, target: Path, contents: _Contents, step: int, score: float | None) -> None:
        temporary, old = (self.folder / f"{prefix}{target.name}" for prefix in (".tmp-", ".old-"))
        _require_space(self.folder, contents.need_bytes)
        readable, _ = self._scan()
        facts = {
            "format": FORMAT,
            "step": step,
            "score": None if score is None else _json_number(float(score)),
            "finite": contents.finite,
            # Which is the newest is neither the highest step (a run may have gone back) nor the latest time (clocks
            # jump): it is counted.
            "serial": 1 + max((manifest["serial"] for _, manifest in readable), default=0),
            "time": time.time(),
            "versions": {"dtrain": getattr(dtrain, "__version__", "unknown"), "torch": str(torch.__version__)},
        }
        try:
            _write_files(temporary, contents, facts)
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
            _fsync(self.folder)
        finally:
            self._clear_leftovers()

    def _rotate(self, newest: Path) -> None:
        readable, _ = self._scan()
        ranked = self._ranked(readable)
        keep = {path for path, _ in readable[: self._keep_last]} | set(ranked[: self._keep_best])
        if healthy := _newest_healthy(readable, trusted=newest):
            keep.add(healthy)
        self._link("last", newest)
        self._link("best", next((path for path in ranked if path in keep), None))
        for path, _ in readable:
            if path not in keep:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a half-removed folder must not look like a damaged checkpoint.
        trash = self.folder / f".tmp-{path.name}"
        try:
            os.rename(path, trash)
            shutil.rmtree(trash)
        except OSError as error:
            warnings.warn(f"{path} is no longer needed but could not be removed: {error}", stacklevel=4)

    def _link(self, name: str, target: Path | None) -> None:
        link, temporary = self.folder / name, self.folder / f".tmp-{name}"
        with suppress(OSError):  # no symbolic links here, or a folder of that name: nothing depends on the link
            if target is None:
                if link.is_symlink():
                    link.unlink()
                return
            try:
                os.symlink(target.name, temporary)
                os.replace(temporary, link)
            finally:
                temporary.unlink(missing_ok=True)

    def _scan(self) -> tuple[list[tuple[Path, Manifest]], list[Path]]:
        """All checkpoints with their manifests, newest first, and the folders whose manifest cannot be read."""
        readable, unreadable = [], []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir():
                try:
                    readable.append((path, _read_manifest(path)))
                except CheckpointError:
                    unreadable.append(path)
        return sorted(readable, key=lambda found: found[1]["serial"], reverse=True), unreadable

    def _ranked(self, readable: list[tuple[Path, Manifest]]) -> list[Path]:
        """Those with a score, best first: finite weights before others, the older of two equals first."""

        def rank(found: tuple[Path, Manifest]) -> tuple[bool, float, int]:
            score = float(found[1]["score"])
            return not found[1]["finite"], -score if self._mode == "max" else score, found[1]["serial"]

        scored = [
            found for found in readable if found[1]["score"] is not None and math.isfinite(float(found[1]["score"]))
        ]
        return [path for path, _ in sorted(scored, key=rank)]


def load(path: Path) -> Loaded:
    """Verify a checkpoint folder and read it into host memory; nothing in it is executed.

    Raises:
        CheckpointError: the folder is no checkpoint or is damaged; the message names the files.
    """
    path = Path(path)
    manifest = _require_whole(path)
    state = _read_torch_file(path / STATE)
    ema = _read_tensors(path / EMA, state["ema"]) if EMA in manifest["files"] else None
    return Loaded(_read_tensors(path / MODEL, state["weights"]), state["state"], ema, manifest)


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line per file that begins with its name; [] if nothing is.

    Every file is read once and compared with the SHA-256 in the manifest, and the manifest with its own. Names that begin
    with a dot are passed over: NFS and file browsers leave such files, and nothing here reads them.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        files: dict[str, dict[str, Any]] = manifest["files"]
        present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {MANIFEST}
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST}: {error}"]
    problems = [f"{name}: not in the manifest, a foreign file" for name in sorted(present - set(files))]
    name = re.fullmatch(r"step-(\d{8,})", path.name)
    if name and int(name[1]) != manifest["step"]:
        problems.append(f"{MANIFEST}: is that of step {manifest['step']}, not of {path.name}")
    for name, sealed in files.items():
        if problem := _compare(path / name, sealed):
            problems.append(f"{name}: {problem}")
    return problems


def load_weights(path: Path) -> dict[str, Any]:
    """Weights from a checkpoint folder, a .safetensors file or a torch file, on the CPU; nothing in it is executed.

    In a torch file the weights may lie under 'model_state_dict', 'state_dict' or 'model'. 'module.' (DDP) before all names
    and '_orig_mod.' (torch.compile) anywhere are taken out of a file's names; those in a checkpoint folder are kept.

    Returns:
        A state_dict: name -> tensor, and what `get_extra_state` gave for the modules that have it.

    Raises:
        CheckpointError: there is no such file, it is damaged, holds no weights, or could only be read by running its code.
    """
    path = Path(path)
    if path.is_dir():
        _require_whole(path)
        return _read_tensors(path / MODEL, _read_torch_file(path / STATE, mmap=True)["weights"])
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _strip_wrappers(_read_tensors(path, {}))
    return _strip_wrappers(_pick_weights(_read_torch_file(path), path))


# --- what is to be saved -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Host tensors by file name, each with its aliases (name -> name under which the tensor is stored), and state.pt."""

    tensors: dict[str, tuple[dict[str, Tensor], dict[str, str]]]
    state: dict[str, Any]
    need_bytes: int
    finite: bool


class _HostCopy:
    """One walk over what is to be saved: tensors to host memory, all else held against what weights_only can load.

    A tensor or container that is met twice is copied once, and so stored once. The originals are held until the walk is
    over: an address says who is who only as long as its owner lives.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.need_bytes = 0
        self._done: dict[int, tuple[Any, Any]] = {}

    def value(self, value: Any, place: str, depth: int = 0) -> Any:
        """The host copy of one value; `place` is its key path, for messages."""
        if isinstance(value, Tensor):
            return self.tensor(value, place)
        kind = type(value)
        if kind in _SCALARS:
            if (kind is bytes and not value) or (kind is int and value.bit_length() > _MAX_INT_BITS):
                self._refuse(value, place, "empty bytes and ints of over 2039 bits cannot be loaded with weights_only")
            return value
        if kind not in _CONTAINERS:
            self._refuse(value, place, _plain_form(value))
            return None
        if depth == _MAX_DEPTH or self._done.get(id(value), (None, None))[1] is self:  # met again while still open
            self._refuse(value, place, f"it contains itself or is nested deeper than {_MAX_DEPTH} levels")
            return None
        if id(value) not in self._done:
            self._done[id(value)] = value, self
            self._done[id(value)] = value, self._container(value, place, depth + 1)
        return self._done[id(value)][1]

    def tensor(self, tensor: Tensor, place: str) -> Tensor:
        """The tensor itself, detached, if it lies on the CPU, else a copy there; never with more memory behind it than it shows."""
        if id(tensor) in self._done:
            return self._done[id(tensor)][1]
        if reason := _unsaveable(tensor):
            self._refuse(tensor, place, reason)
            return torch.empty(0)
        host = tensor.detach().to("cpu").resolve_conj().resolve_neg()
        if host.layout == torch.strided and host.untyped_storage().nbytes() > host.nbytes:
            host = host.clone()  # torch.save would write all the memory behind a view
        self.need_bytes += _elements(host).nbytes
        self._done[id(tensor)] = tensor, host
        return host

    def weights(
        self, weights: Mapping[str, Any], place: str
    ) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
        """Split a state_dict into tensors for safetensors, aliases among them, and the rest for state.pt."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        rest: OrderedDict[str, Any] = OrderedDict()
        if metadata := getattr(weights, "_metadata", None):
            rest._metadata = metadata  # type: ignore[attr-defined]  # versions by which modules load their old forms
        stored: dict[tuple[Any, ...], str] = {}
        memory: set[int] = set()
        for name, value in weights.items():
            if not _fits_safetensors(name, value):
                rest[name] = value
                continue
            # The originals tell what is tied: the same elements in the same order. A copy on the host would not.
            elements = (
                value.device,
                value.data_ptr(),
                value.dtype,
                value.shape,
                value.stride(),
                value.is_conj(),
                value.is_neg(),
            )
            if value.numel() and elements in stored:
                aliases[name] = stored[elements]
                continue
            stored[elements] = name
            host = self.tensor(value, f"{place}[{name!r}]").contiguous()
            if host.data_ptr() in memory:  # another shape over the same memory, which safetensors refuses to write
                host = host.clone()
            memory.add(host.data_ptr())
            tensors[name] = host
        return tensors, aliases, self.value(rest, place)

    def _container(self, value: Any, place: str, depth: int) -> Any:
        kind = type(value)
        if not isinstance(value, dict):
            return kind(self.value(item, f"{place}[{index}]", depth) for index, item in enumerate(value))
        copy = kind()
        for key, item in value.items():
            if isinstance(key, Tensor) or type(key) not in (*_SCALARS, tuple):
                self._refuse(key, f"a key of {place}", "use text or a number as the key")
                continue
            self.value(key, f"a key of {place}", depth)
            copy[key] = self.value(item, f"{place}[{key!r}]", depth)
        if kind is OrderedDict and vars(value):  # pickled with it, for example a state_dict's _metadata
            vars(copy).update(self.value(vars(value), f"{place}.__dict__", depth))
        return copy

    def _refuse(self, value: Any, place: str, reason: str) -> None:
        kind = type(value)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        self.problems.append(f"{place} is a {module}{kind.__qualname__}: {reason}")


def _pack(weights: Mapping[str, Any], state: Mapping[str, Any], ema: Mapping[str, Any] | None) -> _Contents:
    copy = _HostCopy()
    files, rests = {}, {}
    for file, key, given in ((MODEL, "weights", weights), (EMA, "ema", ema)):
        if given is not None:
            tensors, aliases, rests[key] = copy.weights(given, key)
            files[file] = tensors, aliases
    plain = {"state": copy.value(dict(state), "state"), **rests}
    if copy.problems:
        shown = copy.problems[:10] + ([f"and {len(copy.problems) - 10} more"] if len(copy.problems) > 10 else [])
        raise CheckpointError(
            "a checkpoint holds only what loads without running code, so nothing was saved:\n  "
            + "\n  ".join(shown)
            + f"\nPossible: {_ALLOWED}."
        )
    finite = all(_is_finite(tensor) for tensors, _ in files.values() for tensor in tensors.values())
    return _Contents(files, plain, copy.need_bytes, finite)


def _fits_safetensors(name: Any, value: Any) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta and not value.is_nested
    return (
        plain
        and value.layout == torch.strided
        and value.dtype in _SAFETENSORS_DTYPES
        and type(name) is str
        and name != "__metadata__"
    )


def _unsaveable(tensor: Tensor) -> str:
    """Why a tensor cannot be saved, '' if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return "a subclass of torch.Tensor; give x.full_tensor() of a DTensor, else x.as_subclass(torch.Tensor)"
    if tensor.is_meta:
        return "it has no data (meta device)"
    if tensor.is_nested or tensor.layout not in _LAYOUTS or tensor.dtype not in _DTYPES:
        return f"{'nested' if tensor.is_nested else tensor.layout} with {tensor.dtype} cannot be stored; give a dense float or int tensor"
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
        tensor = tensor.float()  # no minimum for the 8-bit formats
    # isfinite().all() takes 30 times as long and a copy; a nan anywhere makes both ends nan.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


_PLAIN_FORMS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda x: hasattr(x, "tolist"), "give x.item() of a scalar, torch.from_numpy(x) or x.tolist() of an array"),
    (lambda x: isinstance(x, PurePath), "give str(x)"),
    (lambda x: isinstance(x, Enum), "give x.value or x.name"),
    (lambda x: dataclasses.is_dataclass(x), "give dataclasses.asdict(x)"),
    (lambda x: hasattr(x, "to_dict"), "give x.to_dict()"),
    (lambda x: hasattr(x, "state_dict"), "give x.state_dict()"),
    (lambda x: isinstance(x, torch.Generator), "give x.get_state()"),
    (lambda x: isinstance(x, Mapping), "give dict(x)"),
    (lambda x: isinstance(x, tuple), "give tuple(x)"),
    (lambda x: hasattr(x, "isoformat"), "give x.isoformat()"),
    (lambda x: hasattr(x, "__iter__"), "give list(x)"),
)


def _plain_form(value: Any) -> str:
    """What to save instead of a value whose type is refused."""
    return next((cure for fits, cure in _PLAIN_FORMS if fits(value)), "save the plain values in it")


# --- writing ---------------------------------------------------------------------------------------------------------------


def _write_files(folder: Path, contents: _Contents, facts: Manifest) -> None:
    """Write all files of one checkpoint and force them to the disk, the manifest last."""
    folder.mkdir()
    for name, (tensors, aliases) in contents.tensors.items():
        save_file(tensors, folder / name, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    with open(folder / STATE, "wb") as file:  # not by name: torch then hides the errno of a failed write
        torch.save(contents.state, file)
    files = {}
    for path in sorted(folder.iterdir()):
        _fsync(path)
        files[path.name] = _seal(path)
    (folder / MANIFEST).write_bytes(_render({**facts, "files": files}))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _render(facts: Manifest) -> bytes:
    """The one way to write a manifest; it carries the SHA-256 of itself without that line."""
    text = json.dumps(facts, indent=2, allow_nan=False)
    return (json.dumps({**facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=2) + "\n").encode()


def _json_number(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # JSON has no nan; float() reads the text


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _leftovers(folder: Path) -> list[Path]:
    return [path for pattern in (".old-step-*", ".tmp-*") for path in folder.glob(pattern)]


def _require_space(folder: Path, need_bytes: int) -> None:
    """Refuse to begin what cannot end. The system's own error, if it comes later, is handled as well."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < need_bytes:  # some network file systems report 0 of 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failure(target: Path, need_bytes: int, error: BaseException) -> CheckpointError:
    """A failed write in one sentence: the path, the reason, the space needed and free, and what to do."""
    code, reason = _reason(error)
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(next(p for p in target.parents if p.exists())).free / 1e6:.1f} MB"
    return CheckpointError(
        f"checkpoint {target} was not written: {reason} (it needs {need_bytes / 1e6:.1f} MB, free: {free}). "
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


# --- reading ---------------------------------------------------------------------------------------------------------------


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
    return manifest


def _compare(path: Path, sealed: dict[str, Any]) -> str:
    """How a file differs from what the manifest says of it, '' if it does not."""
    try:
        size = path.stat().st_size
        if size != sealed["bytes"]:
            return f"{size} bytes, the manifest says {sealed['bytes']}"
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
    damaged = []
    chosen = None
    for path in candidates:
        problems = verify(path)
        if not problems:
            chosen = path
            break
        damaged.append(f"{path.name}/{problems[0]}")
    if damaged:
        instead = f"using {chosen.name} instead" if chosen else "and there is no whole one"
        warnings.warn(f"damaged checkpoint in {candidates[0].parent}: {'; '.join(damaged)}; {instead}", stacklevel=3)
    return chosen


def _newest_healthy(readable: list[tuple[Path, Manifest]], trusted: Path) -> Path | None:
    """The newest with finite weights that verifies; the one just written needs no second reading."""
    finite = (path for path, manifest in readable if manifest["finite"])
    return next((path for path in finite if path == trusted or not verify(path)), None)


def _read_tensors(path: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """A safetensors file, with its tied tensors tied again, added to the entries that safetensors could not hold."""
    try:
        # pread, not the default mmap: mapped tensors would change, or end the process, with the file behind them.
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            rest.update(file.get_tensors())
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        for name, stored in aliases.items():
            rest[name] = rest[stored]
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    return rest


def _read_torch_file(path: Path, mmap: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file that is none of torch's fails in any way that parsing can fail
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}, which is code and not weights" if refused else str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read safely: {reason}. Possible: a checkpoint folder, a .safetensors file, or a file made by "
            "torch.save(model.state_dict(), path). If you trust this one, load it with weights_only=False and save it so."
        ) from error


def _pick_weights(content: Any, path: Path) -> dict[str, Any]:
    """The state_dict within what people save: itself, or under one of the usual keys."""
    wrappers = ("model_state_dict", "state_dict", "model")
    picked = content
    while isinstance(picked, Mapping) and (
        key := next((k for k in wrappers if isinstance(picked.get(k), Mapping)), None)
    ):
        picked = picked[key]
    if not isinstance(picked, dict) or not any(isinstance(value, Tensor) for value in picked.values()):
        found = f"the keys {list(picked)[:10]}" if isinstance(picked, Mapping) else f"a {type(picked).__name__}"
        raise CheckpointError(
            f"{path} holds no weights but {found}. Possible: a state_dict, or one under {', '.join(wrappers)}."
        )
    return picked


def _strip_wrappers(weights: dict[str, Any]) -> dict[str, Any]:
    """Take out the prefixes that DDP and torch.compile add, in whatever order they were applied."""
    weights = {str(name).replace("_orig_mod.", ""): value for name, value in weights.items()}
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights
