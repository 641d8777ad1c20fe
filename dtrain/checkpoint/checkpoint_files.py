"""The files of one checkpoint: write, verify, load."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dtrain.checkpoint.contents import CheckpointError, Snapshot, Weights
from dtrain.checkpoint.hashed_files import HashedReader, HashedWriter, tensors_in, write_tensor_file
from dtrain.checkpoint.shards import header_of, shard_name, stored_in, whole, with_shards
from dtrain.checkpoint.written_together import Seals, SharedWrite
from dtrain.tracking.whole_file import fsync, write_bytes

MODEL, EMA, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
LOSS, LOSS_EMA = "loss", "loss-ema"  # of a loss with weights: further files like the model's, without the ending
MODEL_SHARDS, EMA_SHARDS, STATE_SHARDS = "model", "ema", "state"  # folders in place of files, or beside state.pt
FORMAT = 1
Manifest = dict[str, Any]
Contents = dict[Path, Any]  # of files, as they were read when they were verified: a start need not read them again
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
    """What `load` returns, as it was given to `save`; all tensors lie on the CPU, or in shards as `Stored`."""

    weights: dict[str, Any]  # with `get_extra_state` entries and tied tensors
    state: dict[str, Any]
    ema: dict[str, Any] | None
    others: dict[str, dict[str, Any]]  # further weights, by the name of their file
    manifest: Manifest  # step, score (a number, its text if not finite), finite, serial, versions, files


def load(path: Path, is_verified: bool = False, as_stored: bool = False, contents: Contents | None = None) -> Loaded:
    """Verify a checkpoint, unless just done, and read it, running no code; CheckpointError where it is damaged.

    `as_stored`: what lies in shards is not read, but described (`Stored`): for ranks that read a part of it each.
    `contents`: of files that `verify` has read, which are taken out of it.
    """
    contents = {} if contents is None else contents
    manifest = require_whole(path, is_verified)
    state = contents.pop(path / STATE, None) or read_torch_file(path / STATE)
    ema = read_weights(path, EMA, state["ema"], as_stored, contents) if has_averaged(path) else None
    others = {
        name: read_tensors(path / f"{name}.safetensors", rest, contents)
        for name, rest in state.get("others", {}).items()
    }
    weights = read_weights(path, MODEL, state["weights"], as_stored, contents)
    values = state["state"]
    if (path / STATE_SHARDS).is_dir():
        stored: Any = stored_in(path / STATE_SHARDS)
        values = with_shards(values, stored if as_stored else _Whole(stored))
    return Loaded(weights, values, ema, others, manifest)


class _Whole(dict[str, Any]):
    """What is stored, read at the first look at it, one tensor after another."""

    def __init__(self, stored: dict[str, Any]) -> None:
        super().__init__(stored)

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if not isinstance(found, torch.Tensor):
            self[name] = found = found.read_part()
        return found


def read_weights(
    path: Path, file: str, rest: dict[str, Any], as_stored: bool = False, contents: Contents | None = None
) -> dict[str, Any]:
    """Weights of a checkpoint, added to the entries that tensors' files cannot hold: of one file, or of its shards."""
    folder = path / file.removesuffix(".safetensors")
    if not folder.is_dir():
        return read_tensors(path / file, rest, contents)
    rest.update(stored_in(folder) if as_stored else whole(stored_in(folder)))
    return rest


def has_averaged(path: Path) -> bool:
    """Whether a checkpoint folder has averaged weights beside the others."""
    return (path / EMA).is_file() or (path / EMA_SHARDS).is_dir()


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint folder holds shards."""
    return (path / MODEL_SHARDS).is_dir()


def verify(path: Path, contents: Contents | None = None) -> list[str]:
    """What is wrong with a checkpoint folder, one line per file that begins with its name; [] if nothing is.

    Every file is compared with the SHA-256 in the manifest, for which a process reads it once, and the manifest with
    its own. Names that begin with a dot are passed over: NFS and file browsers leave such files, and nothing here reads
    them. `contents` is given what is in the files of a checkpoint that is whole, for `load`, and holds nothing else.
    """
    try:
        manifest = read_manifest(path)
        present = _files_in(path) - {MANIFEST}
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST}: {error}"]
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = dict.fromkeys(sorted(present - set(files)), "a foreign file, not in the manifest")
    if contents is not None:
        contents.clear()
    problems |= {name: _compare(path / name, sealed, contents) for name, sealed in files.items()}
    found = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    if contents and found:
        contents.clear()
    return found


def require_sealed(path: Path) -> None:
    """CheckpointError where a file, or a folder of shards, is not what the manifest of its checkpoint says.

    Where there is no manifest beside it that can be read, nothing is known of it, and nothing is said.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(path.parent)["files"]
    except CheckpointError:
        return
    for name, sealed in files.items():
        if path.name in (name, name.partition("/")[0]) and (problem := _compare(path.parent / name, sealed)):
            raise CheckpointError(f"{path.parent / name}: {problem}")


def _files_in(path: Path) -> set[str]:
    """The paths of all files in a checkpoint folder, as its manifest has them."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    nested = [each for entry in entries if entry.is_dir() for each in entry.iterdir() if not each.name.startswith(".")]
    files = [entry for entry in entries if not entry.is_dir()]
    return {entry.relative_to(path).as_posix() for entry in (*files, *nested)}


def verify_share(path: Path, rank: int, world_size: int) -> dict[str, str] | None:
    """A rank's share of `verify`: of the manifest's files it compares some; None where it does not see the checkpoint.

    What is wrong with which of them.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(path)["files"]
    except (CheckpointError, OSError):
        return None
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    return {name: problem for name in by_size[rank::world_size] if (problem := _compare(path / name, files[name]))}


def verify_together(
    ask: Callable[[Path], list[dict[str, str] | None]], path: Path, contents: Contents | None = None
) -> list[str]:
    """`verify` for a checkpoint of shards, by all ranks: `ask` gives what `verify_share` found on each of them.

    One that not all ranks see, or that holds no shards, is verified here alone.
    """
    if not is_sharded(path) or not (path / MANIFEST).is_file():
        return verify(path, contents)
    shares = ask(path)
    problems: dict[str, str] = {}
    for share in shares:
        if share is None:
            return verify(path)
        problems |= share
    try:
        foreign = _files_in(path) - {MANIFEST, *read_manifest(path)["files"]}
    except CheckpointError as error:
        return [str(error)]
    problems |= dict.fromkeys(sorted(foreign), "a foreign file, not in the manifest")
    return [f"{name}: {problem}" for name, problem in problems.items()]


def write_files(folder: Path, snapshot: Snapshot, facts: Manifest, together: SharedWrite | None = None) -> None:
    """Write all files of one checkpoint and force them to the disk, the manifest last; with the other ranks' shards."""
    folder.mkdir()
    is_finite = snapshot.is_finite()
    if together is None:
        files = _write_parts(folder, snapshot)
    else:
        files, others_are_finite = _write_with_others(folder, snapshot, together)
        is_finite = is_finite and others_are_finite
    files = dict(sorted(files.items()))
    write_bytes(folder / MANIFEST, _render({**facts, "finite": is_finite, "files": files}), durable=True)
    fsync(folder)


def _write_with_others(folder: Path, snapshot: Snapshot, together: SharedWrite) -> tuple[Seals, bool]:
    """The main rank's part; it waits for the others, also where its own has failed: nobody may write any more then."""
    began, error, files = time.monotonic(), None, {}
    together.begin(folder)
    try:
        shards = write_shards(folder, snapshot, together)
        files = shards | _write_parts(folder, snapshot)
    except Exception as raised:
        error = raised
    others, are_finite = together.collect(folder, time.monotonic() - began, error)
    return files | others, are_finite


def write_shards(folder: Path, snapshot: Snapshot, together: SharedWrite) -> Seals:
    """Write what this rank has of the tensors that are sharded, and on the main rank the model's others; seal them."""
    name = shard_name(together.writers.rank, together.writers.world_size)
    files = {}
    parts = {MODEL_SHARDS: snapshot.weights, EMA_SHARDS: snapshot.ema, STATE_SHARDS: snapshot.shards}
    for part, weights in parts.items():
        if weights is None or not (weights.tensors or together.is_main):
            continue
        (folder / part).mkdir(exist_ok=True)  # not its parents: the folder is gone where the main rank gave up
        files[f"{part}/{name}"] = write_tensors(folder / part / name, weights)
        fsync(folder / part)
    return files


def _write_parts(folder: Path, snapshot: Snapshot) -> Seals:
    """Write and seal the files in the folder itself: of a checkpoint without shards all, of others the rest."""
    rests: dict[str, Any] = {}
    files = {}
    for file, key, weights in ((MODEL, "weights", snapshot.weights), (EMA, "ema", snapshot.ema)):
        if weights is not None:
            if snapshot.shards is None:
                files[file] = write_tensors(folder / file, weights)
            rests[key] = weights.rest
    for name, weights in snapshot.others.items():
        files[f"{name}.safetensors"] = write_tensors(folder / f"{name}.safetensors", weights)
        rests.setdefault("others", {})[name] = weights.rest
    with HashedWriter(folder / STATE) as stream:
        torch.save({"state": snapshot.state, **rests}, stream)  # type: ignore[arg-type]
        files[STATE] = stream.seal()
    return files


def write_tensors(path: Path, weights: Weights) -> dict[str, Any]:
    """Write one safetensors file and force it to the disk; returns its seal."""
    metadata = {"format": "pt", "aliases": json.dumps(weights.aliases)}
    if weights.offsets is not None:
        metadata |= header_of(weights.offsets, weights.tensors)
    return write_tensor_file(path, weights.tensors, metadata)


def _render(facts: Manifest) -> bytes:
    """The one way to write a manifest; it ends with the SHA-256 of itself without that line."""
    digest = hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**facts, "sha256": digest}, indent=2) + "\n").encode()


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_and_seal(path: Path, contents: Contents) -> dict[str, Any]:
    """The seal of a file, and, where it can be read, what is in it: of which nothing is executed."""
    with HashedReader(path) as file:
        with suppress(Exception):  # a damaged file fails in any way, and its seal says so
            if path.suffix == ".safetensors":
                contents[path] = tensors_in(file)
            elif path.name == STATE:
                contents[path] = torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        return file.seal()


def failure_of(target: Path, need_bytes: int, error: BaseException) -> CheckpointError:
    """A failed write in one message: the path, the reason, the space needed and free, and what to do."""
    code, reason = reason_of(error)
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(next(at for at in (target, *target.parents) if at.exists())).free / 1e6:.1f} MB"
    return CheckpointError(
        f"{target} was not written: {reason} (need: {need_bytes / 1e6:.1f} MB, free: {free}). "
        f"{_CURES.get(code, 'Look at that folder and its disk.')} Older checkpoints are untouched."
    )


def reason_of(error: BaseException) -> tuple[int, str]:
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


def _compare(path: Path, sealed: dict[str, Any], contents: Contents | None = None) -> str:
    """How a file differs from what the manifest says of it, '' if it does not; `contents` is given what is in it."""
    try:
        found = path.stat()
        if found.st_size != sealed["bytes"]:
            return f"damaged, {found.st_size} bytes instead of {sealed['bytes']}"
        # Any later write changes the time of change; one of this moment might not, whose clock ticks slowly.
        is_settled = time.time() - found.st_ctime > _SETTLED_SECONDS
        who = found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns
        known = _seals.get(who) or (_seal(path) if contents is None else _read_and_seal(path, contents))
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


def read_tensors(path: Path, rest: dict[str, Any], contents: Contents | None = None) -> dict[str, Any]:
    """A safetensors file with its tied tensors tied again, added to the entries that it could not hold."""
    try:
        found = (contents or {}).pop(path, None)
        if found is None:
            with HashedReader(path) as file:
                found = tensors_in(file)
        tensors, metadata = found
        rest.update(tensors)
        rest.update({name: rest[tied] for name, tied in json.loads(metadata.get("aliases", "{}")).items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
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
