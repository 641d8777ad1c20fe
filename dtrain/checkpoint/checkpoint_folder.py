"""The folder of a run's checkpoints: write, rotate, find."""

import errno
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import Timeout

import dtrain
from dtrain.checkpoint.checkpoint_files import (
    FORMAT,
    WRITE_ERRORS,
    Manifest,
    failure_of,
    read_manifest,
    reason_of,
    step_in,
    verify,
    write_files,
    write_shards,
)
from dtrain.checkpoint.contents import CheckpointError, Snapshot, take_snapshot
from dtrain.checkpoint.written_together import NOT_SHARED, NotSharedError, SharedWrite
from dtrain.tracking.run_folder import locked_file
from dtrain.tracking.whole_file import fsync

LOCK_TIMEOUT_SECONDS = 60.0


class Checkpoints:
    """The checkpoints of one run: folders like `step-00001200` beside the symbolic links `last` and `best`.

    The folders are the truth and are scanned; the links are for people, and are missing where a file system has none.
    Instances share nothing but the folder, and a lock in it lets one writer in at a time.

    Args:
        folder: `<run>/checkpoints`; made when something is first written.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: how many of the best by score to keep besides.
        mode: 'max' or 'min', what a good score is.
        verify: What is wrong with a checkpoint folder, as `checkpoint_files.verify` says it; ranks can do it together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        mode: str = "max",
        verify: Callable[[Path], list[str]] = verify,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; possible: 'max', 'min'")
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is {keep_last} (at least 1), keep_best is {keep_best} (at least 0)")
        self.folder = Path(folder)
        self._keep_last, self._keep_best, self._mode, self._verify = keep_last, keep_best, mode, verify
        self.begins_new_scores = False  # scores of what is there are not to be compared with those to come
        if _leftovers(self.folder):
            # A program that only reads may lack the right to write, or a writer may be at work: neither stops it.
            with suppress(CheckpointError), self._writing(self.folder, 0, timeout_seconds=0):
                pass

    def check(
        self,
        weights: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        ema: Mapping[str, Any] | None = None,
        others: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Raise, before the first step, what `save` would raise: types, a folder that cannot be written, a full disk.

        A checkpoint of one number is written there and removed. What an optimizer adds at its first step comes on top.
        """
        self.try_out(take_snapshot(weights, state, ema, others=others).need_bytes)

    def try_out(self, need_bytes: int, together: SharedWrite | None = None) -> None:
        """Write a checkpoint of one number, of each rank where they write together, and remove it."""
        trial = trial_snapshot("all" if together is None else "main")
        with self._begun(together), self._writing(self.folder, need_bytes, LOCK_TIMEOUT_SECONDS):
            try:  # it is also the first use of much native code, which in a thread must not meet with a fork
                write_files(self.folder / ".tmp-step-trial", trial, {}, together)
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
        others: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write one checkpoint, whole or not at all, then remove those that need not be kept.

        Tensors of a device are copied to host memory first. Those on the CPU are written from where they lie. Raises
        CheckpointError as `take_snapshot`, or for a failed write, which leaves nothing behind and older ones untouched.

        Args:
            step: optimizer steps done. A checkpoint of the same step is replaced, whole or not at all.
            weights: the model's `state_dict()`, unwrapped (no 'module.').
            state: tensors and plain types, nested: whatever `torch.load(weights_only=True)` takes.
            ema: averaged weights, as `weights`.
            score: what `best` goes by; None and nan never win.
            others: further state_dicts, each in a file of that name.
        """
        return self.write(step, take_snapshot(weights, state, ema, others=others), score)

    def write(
        self, step: int, snapshot: Snapshot, score: float | None = None, together: SharedWrite | None = None
    ) -> Path:
        """The second half of `save`, also in a thread: returns the checkpoint's folder, complete and on the disk.

        `together`: with the shards of the other ranks, which then call `write_share`.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it counts optimizer steps and is never negative")
        target = self.folder / f"step-{step:08d}"
        score = None if score is None else float(score)
        facts = {
            "format": FORMAT,
            "step": step,
            "score": score if score is None or math.isfinite(score) else str(score),  # JSON has no nan
            "versions": {"dtrain": getattr(dtrain, "__version__", "unknown"), "torch": str(torch.__version__)},
        }
        with self._begun(together), self._writing(target, snapshot.need_bytes, LOCK_TIMEOUT_SECONDS):
            self._write(target, snapshot, facts, together)
            self._rotate(target)
        return target

    @contextmanager
    def _begun(self, together: SharedWrite | None) -> Iterator[None]:
        """Tell the other ranks, where the main one fails before they can begin."""
        try:
            yield
        except BaseException as error:
            if together is not None:
                together.cancel(str(error))
            raise

    def last(self) -> Path | None:
        """The newest checkpoint that verifies, or None; one that is passed over is named in a warning."""
        readable, unreadable = self._scan()
        return _first_good([*unreadable, *(path for path, _ in readable)], self._verify)

    def best(self) -> Path | None:
        """The checkpoint with the best score that verifies, or None; one that is passed over is named in a warning.

        First the one that the training itself chose: who tests or predicts may not know which scores are good.
        """
        readable, unreadable = self._scan()
        return _first_good([*unreadable, *self._chosen_first(readable)], self._verify)

    def to_use(self) -> Path | None:
        """What is tested, predicted with or exported: `best`, else `last`; what is taken is named in the warning."""
        readable, unreadable = self._scan()
        by_score = self._chosen_first(readable)
        others = [path for path, _ in readable if path not in by_score]
        return _first_good([*unreadable, *by_score, *others], self._verify)

    def chosen(self) -> Path | None:
        """The best checkpoint, else the last one, or None; unlike `best` and `last` it reads none of their files."""
        readable, _ = self._scan()
        return next(iter([*self._chosen_first(readable), *(path for path, _ in readable)]), None)

    def folders(self) -> list[Path]:
        """Those of all checkpoints, damaged ones included, newest last by name."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if step_in(path.name) is not None and path.is_dir())

    def damaged(self) -> dict[Path, list[str]]:
        """What is wrong with each checkpoint that does not verify."""
        return {path: problems for path in self.folders() if (problems := verify(path))}

    def has_later_than(self, chosen: Path) -> bool:
        """Whether a training that resumes from a checkpoint of this run leaves behind what followed it."""
        return self._is_in_branch(chosen) or bool(self._later_than(chosen))

    def go_back_to(self, chosen: Path) -> Path | None:
        """Make a checkpoint of this run the newest: what was saved after it no longer counts, as best or last.

        It is moved into a folder of its own, `branch-N`, and can be read, tested and resumed from there. Where the
        chosen one lies in such a folder, it comes back with those before it. Returns the new folder; None: not needed.
        """
        with self._writing(chosen, 0, LOCK_TIMEOUT_SECONDS):
            later, back = self._later_than(chosen), []
            branch = next(path for n in range(1, 10**6) if not (path := self.folder / f"branch-{n}").exists())
            if self._is_in_branch(chosen):
                newest = read_manifest(chosen)["serial"]
                back = [path for path in chosen.resolve().parent.iterdir() if step_in(path.name) is not None]
                back = [path for path in back if read_manifest(path)["serial"] <= newest]
            for path in later:
                branch.mkdir(exist_ok=True)
                path.rename(branch / path.name)
            for path in back:
                path.rename(self.folder / path.name)
            readable, _ = self._scan()
            self._link("last", readable[0][0] if readable else None)
            self._link("best", next(iter(self._ranked(readable)), None))
        return branch if later else None

    def _is_in_branch(self, chosen: Path) -> bool:
        parent = chosen.resolve().parent
        return parent.parent == self.folder.resolve() and parent.name.startswith("branch-")

    def _later_than(self, chosen: Path) -> list[Path]:
        """The checkpoints here that were written after another one of this run."""
        pivot, key = read_manifest(chosen.resolve()), "serial"
        if not self._is_in_branch(chosen) and chosen.resolve().parent != self.folder.resolve():
            key = "step"  # of a failed step, which is counted by itself
        return [path for path, manifest in self._scan()[0] if manifest[key] > pivot[key]]

    @contextmanager
    def _writing(self, target: Path, need_bytes: int, timeout_seconds: float) -> Iterator[None]:
        """Be the only writer in the folder; a failed write becomes one sentence."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / ".lock", timeout_seconds):
                self._clear_leftovers()  # with the lock held, they are a dead writer's, of whatever host
                usage = shutil.disk_usage(self.folder)
                if usage.total and usage.free < need_bytes:  # some network file systems report 0 of 0
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # rather than begin what cannot end
                yield
        except WRITE_ERRORS as error:
            raise failure_of(target, need_bytes, error) from error

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

    def _write(self, target: Path, snapshot: Snapshot, facts: Manifest, together: SharedWrite | None) -> None:
        # The newest has neither always the highest step (a run may go back) nor the latest time (clocks jump). Those of
        # branches that were left count too, so that it can be told what came after what if one is taken up again.
        serial = 1 + max((manifest["serial"] for manifest in self._manifests_of_all(but=target)), default=0)
        readable, _ = self._scan()
        newest = readable[0][1] if readable else {}
        scores_after = newest.get("serial" if self.begins_new_scores else "scores_after", 0)
        facts = {**facts, "scores_after": scores_after}
        temporary = self.folder / f".tmp-{target.name}"
        try:
            write_files(temporary, snapshot, {**facts, "serial": serial}, together)
            if target.exists():
                target.rename(self.folder / f".old-{target.name}")
            temporary.rename(target)
            self.begins_new_scores = False
            fsync(self.folder)
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
        for path in self.folders():
            try:
                readable.append((path, read_manifest(path)))
            except CheckpointError:
                unreadable.append(path)
        return sorted(readable, key=lambda found: found[1]["serial"], reverse=True), unreadable

    def _manifests_of_all(self, but: Path) -> Iterator[Manifest]:
        for path in (*self.folders(), *self.folder.glob("branch-*/step-*")):
            if path == but:  # what takes its place has its number
                continue
            with suppress(CheckpointError):
                yield read_manifest(path)

    def _chosen_first(self, readable: list[tuple[Path, Manifest]]) -> list[Path]:
        """The same as `_ranked`, but first the one that the link of the training's own says."""
        chosen = (self.folder / "best").resolve().name
        return sorted(self._ranked(readable), key=lambda path: path.name != chosen)

    def _ranked(self, readable: list[tuple[Path, Manifest]]) -> list[Path]:
        """Those with a score, best first: finite weights before others, the older of two equals first."""
        after = readable[0][1].get("scores_after", 0) if readable else 0
        ranks = [
            (not manifest["finite"], distance_from_best(manifest["score"], self._mode), manifest["serial"], path)
            for path, manifest in readable
            if manifest["serial"] > after
        ]
        return [path for _, distance, _, path in sorted(ranks) if distance < math.inf]


def distance_from_best(score: float | str | None, mode: str) -> float:
    """What is smaller for a better score; infinite for none, and for one that is not finite."""
    value = math.nan if score is None else float(score)
    return math.inf if not math.isfinite(value) else -value if mode == "max" else value


@contextmanager
def _locked(path: Path, timeout_seconds: float) -> Iterator[None]:
    """Where the disk has no locks, safety is that a run folder has one training."""
    try:
        with locked_file(path, timeout_seconds):
            yield
    except Timeout as error:
        raise OSError(errno.EBUSY, f"another process has been writing there for {timeout_seconds:.0f} s") from error


def _leftovers(folder: Path) -> list[Path]:
    return [path for name in (".old-step-*", ".tmp-step-*", ".tmp-last", ".tmp-best") for path in folder.glob(name)]


def trial_snapshot(share: Literal["all", "main", "shards"]) -> Snapshot:
    """A checkpoint of one number, or a rank's share of it."""
    trial = take_snapshot({"weight": torch.zeros(1)}, {}, share=share)
    if share == "shards":
        trial.weights.tensors["weight"] = torch.zeros(1)
    return trial


def write_share(snapshot: Snapshot, together: SharedWrite) -> None:
    """What the other ranks do while the main one writes a checkpoint: their shards; CheckpointError where they cannot.

    What they could not write, the main rank then hears of, and makes no checkpoint.
    """
    folder = Path()
    try:
        folder = together.folder()
        usage = shutil.disk_usage(folder)
        if usage.total and usage.free < snapshot.need_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        together.tell(write_shards(folder, snapshot, together), snapshot.is_finite())
    except BaseException as error:
        code, reason = reason_of(error)
        together.fail(NOT_SHARED if isinstance(error, NotSharedError) else code, reason or type(error).__name__)
        if isinstance(error, WRITE_ERRORS):
            raise failure_of(folder, snapshot.need_bytes, error) from error
        raise


def _first_good(candidates: list[Path], verify: Callable[[Path], list[str]]) -> Path | None:
    """The first that verifies; those before it, and what is used instead, are named in one warning."""
    damaged: list[str] = []
    chosen = None
    for path in candidates:
        if not (problems := verify(path)):
            chosen = path
            break
        if not path.exists():
            continue  # a training that is at work has removed it meanwhile
        damaged.append(f"{path.name}/{problems[0]}")
    if damaged:
        instead = f"{chosen.name} is used instead" if chosen else "there is no other"
        warnings.warn(f"damaged checkpoints in {candidates[0].parent}: {'; '.join(damaged)}; {instead}", stacklevel=3)
    return chosen
