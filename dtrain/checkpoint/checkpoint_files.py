"""The files of one checkpoint: write, verify, load."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dtrain.checkpoint.contents import CheckpointError, Snapshot, Weights
from dtrain.tracking.whole_file import fsync, write_bytes

MODEL, EMA, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
LOSS, LOSS_EMA = "loss", "loss-ema"  # of a loss with weights: further files like the model's, without the ending
FORMAT = 1
Manifest = dict[str, Any]
_SETTLED_SECONDS = 2.0
_seals: dict[tuple[int, ...], dict[str, Any]] = {}  # of files that this process has read, and that did not change since
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap the OSError they met
_CURES = {
    errno.ENOSPC: "The disk is full (space or number of files): free some, or choose another folder.",
    errno.EDQUOT: "The quota is used up: free some space, or choose another folder.",
    errno.EFBIG: "The file would pass the limit on file sizes (ulimit -f): raise it, or choose another folder.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.EACCES: "The folder may not be written: change its permissions, or choose another folder.",
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns, as it was given to `save`; all tensors lie on the CPU."""

    weights: dict[str, Any]  # with `get_extra_state` entries and tied tensors
    state: dict[str, Any]
    ema: dict[str, Any] | None
    others: dict[str, dict[str, Any]]  # further weights, by the name of their file
    manifest: Manifest  # step, score (a number, its text if not finite), finite, serial, versions, files


def load(path: Path, is_verified: bool = False) -> Loaded:
    """Verify a checkpoint, unless just done, and read it, running no code; CheckpointError where it is damaged."""
    manifest = require_whole(path, is_verified)
    state = read_torch_file(path / STATE)
    ema = read_tensors(path / EMA, state["ema"]) if EMA in manifest["files"] else None
    others = {name: read_tensors(path / f"{name}.safetensors", rest) for name, rest in state.get("others", {}).items()}
    return Loaded(read_tensors(path / MODEL, state["weights"]), state["state"], ema, others, manifest)


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line per file that begins with its name; [] if nothing is.

    Every file is compared with the SHA-256 in the manifest, for which a process reads it once, and the manifest with
    its own. Names that begin with a dot are passed over: NFS and file browsers leave such files, and nothing here reads
    them.
    """
    try:
        manifest = read_manifest(path)
        present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {MANIFEST}
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST}: {error}"]
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = dict.fromkeys(sorted(present - set(files)), "a foreign file, not in the manifest")
    problems |= {name: _compare(path / name, sealed) for name, sealed in files.items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def write_files(folder: Path, snapshot: Snapshot, facts: Manifest) -> None:
    """Write all files of one checkpoint and force them to the disk, the manifest last."""
    folder.mkdir()
    rests: dict[str, Any] = {}
    for file, key, weights in ((MODEL, "weights", snapshot.weights), (EMA, "ema", snapshot.ema)):
        if weights is not None:
            _write_tensors(folder / file, weights)
            rests[key] = weights.rest
    for name, weights in snapshot.others.items():
        _write_tensors(folder / f"{name}.safetensors", weights)
        rests.setdefault("others", {})[name] = weights.rest
    with open(folder / STATE, "wb") as stream:  # given a name instead, torch hides the errno of a failed write
        torch.save({"state": snapshot.state, **rests}, stream)
    files = {}
    mode = (folder / STATE).stat().st_mode
    for path in sorted(folder.iterdir()):
        if path.stat().st_mode != mode:
            path.chmod(mode)  # safetensors makes its files unreadable for others, whatever the umask says
        fsync(path)
        files[path.name] = _seal(path)
    write_bytes(folder / MANIFEST, _render({**facts, "files": files}), durable=True)
    fsync(folder)


def _put_in_order(path: Path) -> None:
    """Sort the metadata's keys in a safetensors file, whose order differs from process to process.

    The header is JSON in UTF-8, behind its length in 8 bytes; in another order it is as long.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _write_tensors(path: Path, weights: Weights) -> None:
    metadata = {"format": "pt", "aliases": json.dumps(weights.aliases)}
    save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, path, metadata)
    _put_in_order(path)


def _render(facts: Manifest) -> bytes:
    """The one way to write a manifest; it ends with the SHA-256 of itself without that line."""
    digest = hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**facts, "sha256": digest}, indent=2) + "\n").encode()


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def failure_of(target: Path, need_bytes: int, error: BaseException) -> CheckpointError:
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


def step_in(name: str) -> int | None:
    """step-00001200 -> 1200; None for another name."""
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-\d{8,}", name) else None


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and hold it against its own SHA-256: byte for byte what `_render` makes of its contents."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        del manifest["sha256"]
        is_whole = _render(manifest) == raw
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST}: missing, so {folder} is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{MANIFEST}: damaged, it differs from its own SHA-256")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST}: of format {manifest.get('format')!r}; this dtrain reads format {FORMAT}")
    if step_in(folder.name) not in (None, manifest["step"]):
        raise CheckpointError(f"{MANIFEST}: belongs to step {manifest['step']}, not to {folder.name}")
    return manifest


def _compare(path: Path, sealed: dict[str, Any]) -> str:
    """How a file differs from what the manifest says of it, '' if it does not."""
    try:
        found = path.stat()
        if found.st_size != sealed["bytes"]:
            return f"damaged, {found.st_size} bytes instead of {sealed['bytes']}"
        # Any later write changes the time of change; one of this moment might not, whose clock ticks slowly.
        is_settled = time.time() - found.st_ctime > _SETTLED_SECONDS
        who = found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns
        known = _seals.get(who) or _seal(path)
        if is_settled:
            _seals[who] = known
        return "" if known == sealed else "damaged, its SHA-256 is not the manifest's"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"


def require_whole(path: Path, is_verified: bool) -> Manifest:
    """The manifest of a checkpoint folder; CheckpointError where it is not whole, which names the files."""
    if not is_verified and (problems := verify(path)):
        raise CheckpointError(f"{path} is not a whole checkpoint: {'; '.join(problems)}")
    return read_manifest(path)


def read_tensors(path: Path, rest: dict[str, Any]) -> dict[str, Any]:
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


def read_torch_file(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU; nothing in it is executed."""
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
