"""Where a training with a mirror continues: from its run folder, or from the mirror where that is ahead."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.checkpoint.checkpoint_files import MANIFEST, Manifest, read_manifest
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.resume import other_writer
from dtrain.config.errors import first_few
from dtrain.distributed.ranks import Ranks
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.run_lock import FolderIsBusyError, take_lock
from dtrain.tracking.secrets import redact
from dtrain.tracking.start_mirror import Fetching, Mirror, look_at_mirror, resolve_mirror, shown
from dtrain.tracking.whole_file import read_json, remove

_POLL_SECONDS = 10.0  # of a fetch: the other ranks hear that rank 0 is at work


class MirrorMistakeError(Exception):
    """The mirror cannot be used as the config has it."""


def mirrored(
    folder: Path,
    options: Mapping[str, Any],
    ranks: Ranks,
    purpose: str,
    is_restart: bool,
    say: Callable[[str], object],
    other_settings: Callable[[str], list[str]],
) -> Mirror | None:
    """The mirror of a run folder, if there is one, after the folder has what is ahead there. All ranks call it.

    The options are those of the trainer. A restart by the launcher continues whatever `resume` says.
    `other_settings` tells in what the config of a mirror, as text, describes another training.

    Raises:
        MirrorMistakeError: See `Meeting.goes_on`; so RuntimeError.
    """
    if options["mirror_to"] is None:
        return None
    try:
        address = resolve_mirror(options["mirror_to"], folder)
    except ValueError as error:
        raise MirrorMistakeError(str(error)) from None
    mirror = Mirror(address, options["mirror_exit_timeout_seconds"], say)
    only_reads, resume = purpose != "train", "auto" if is_restart and options["resume"] == "none" else options["resume"]
    meeting = Meeting(folder, mirror, resume, only_reads, say)
    if resume == "auto" and not only_reads:
        meeting.other_settings = other_settings
    while ranks.decide(meeting.goes_on):
        continue
    return mirror


class Meeting:
    """Rank 0 compares a run folder with its mirror, once, and has fetched what is ahead there.

    Args:
        resume: What the trainer is told.
        only_reads: Whether the purpose is to test or predict, which takes what there is.
        say: Shows a person a line.
    """

    def __init__(
        self, folder: Path, mirror: Mirror, resume: str, only_reads: bool, say: Callable[[str], object]
    ) -> None:
        self._folder, self._mirror, self._say = folder, mirror, say
        self._begins_new, self._only_reads = resume == "none" and not only_reads, only_reads
        self.other_settings: Callable[[str], list[str]] = lambda _: []
        self._fetching: Fetching | None = None
        self._far: dict[str, Any] = {}

    def goes_on(self) -> bool:
        """The next part of it, ten seconds at most but for the first; whether there is more to do.

        Raises:
            MirrorMistakeError: A mistake of the user's: no such bucket, another training's mirror.
            RuntimeError: The mirror does not answer, and there is no training here to continue without it.
        """
        if self._fetching is None:
            return self._compare()
        try:
            answer = self._fetching.wait(_POLL_SECONDS)
        except BaseException:
            self._fetching.end()
            raise
        if answer is None:
            return True
        if "error" in answer:
            raise RuntimeError(f"{self._told} could not be fetched: {answer['error']}; start again to fetch the rest")
        self._take(answer["links"])
        return False

    @property
    def _told(self) -> str:
        return f"the mirror ({redact(self._mirror.address)})"

    @property
    def _arrivals(self) -> Path:
        return self._folder.absolute().with_name(f".{self._folder.name}.fetched")

    def _compare(self) -> bool:
        here = read_run(self._folder)
        if (self._only_reads and here) or other_writer(self._folder):
            return False
        self._far = far = look_at_mirror(self._mirror.address, probe=not self._only_reads, say=self._say)
        if "error" in far:
            self._judge(far, bool(here))
            return False
        run = far["run"]
        if not run:
            return False
        if self._begins_new or (here and here.get("id") != run.get("id")):
            which = "a training" if self._begins_new else "another training"
            raise MirrorMistakeError(
                f"{redact(self._mirror.address)} holds {which} ({shown(run)}), which is not overwritten: "
                "give this one another address, or remove what is there"
                f"{', since trainer.resume is none' if self._begins_new else ''}"
            )
        if not here and (other := self.other_settings(far["config"])):
            raise MirrorMistakeError(
                f"{redact(self._mirror.address)} holds a training with other settings ({first_few(other, 3, '; ')}): "
                "trainer.resume=last continues it with the new ones, or give this one another address"
            )
        if here and not self._is_ahead(far["checkpoints"]):
            self._mirror.accepts = run.get("attempt_started")
            return False
        self._begin_fetch(far)
        return True

    def _judge(self, far: Mapping[str, Any], has_training: bool) -> None:
        if far["is_mistake"]:
            raise MirrorMistakeError(f"{redact(self._mirror.address)}: {far['error']}")
        if not has_training:
            raise RuntimeError(
                f"trainer.mirror_to: {self._told} does not answer ({far['error']}), and whether it holds this training "
                "is not known: start again when it does, or without it (trainer.mirror_to=null)"
            )
        self._say(f"{self._told} does not answer: {far['error']}; the training continues from what is here")

    def _is_ahead(self, far: Mapping[str, Manifest]) -> bool:
        """Whether its newest checkpoint is of a later step than all those here, and none that was left in a branch."""
        newest = _newest(far)
        if newest is None:
            return False
        checkpoints = RunFolder(self._folder).checkpoints
        known = [_manifest(path.parent) for path in checkpoints.glob(f"**/step-*/{MANIFEST}")]
        seals = {read_json(path).get("sha256") for path in checkpoints.glob(f"**/step-*/{MANIFEST}")}
        steps = [manifest["step"] for manifest in known if manifest]
        return far[newest]["step"] > max(steps, default=-1) and far[newest]["sha256"] not in seals

    def _begin_fetch(self, far: Mapping[str, Any]) -> None:
        newest = _newest(far["checkpoints"])
        what = f"step {far['checkpoints'][newest]['step']}, " if newest else ""
        self._say(f"fetching the run from {self._told}: {what}{far['files']} files, {far['bytes'] / 1e6:,.1f} MB")
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder.parent).free
        if free < far["bytes"]:
            raise RuntimeError(f"{self._folder.parent} has {free / 1e6:,.1f} MB free, too little for the run")
        self._fetching = Fetching(self._mirror.address, self._arrivals)

    def _take(self, links: Mapping[str, str]) -> None:
        """Put what was fetched into the run folder, run.json last: without it, the next start fetches again."""
        try:
            lock = take_lock(self._folder)
        except FolderIsBusyError as error:
            raise MirrorMistakeError(str(error)) from None
        try:
            files, arrived = RunFolder(self._folder), RunFolder(self._arrivals)
            for stale in (files.run, files.delivery, files.trackers, files.failure):
                remove(stale)
            _take_checkpoints(files, arrived)
            for path in sorted(arrived.path.rglob("*")):
                if path.is_file() and path != arrived.run and arrived.checkpoints not in path.parents:
                    _put(path, files.path / path.relative_to(arrived.path), keeps=arrived.logs in path.parents)
            for name, target in links.items():
                link = files.path / name
                if name in ("checkpoints/last", "checkpoints/best") and (link.parent / target).is_dir():
                    link.unlink(missing_ok=True)
                    link.symlink_to(target)
            _put(arrived.run, files.run)
            shutil.rmtree(arrived.path)
        finally:
            lock.release()


def _take_checkpoints(files: RunFolder, arrived: RunFolder) -> None:
    """Move them in; what is here and was written after the ones that they share is put into a branch of its own."""
    fetched = {path.parent.relative_to(arrived.checkpoints) for path in arrived.checkpoints.glob(f"**/{MANIFEST}")}
    serials = [manifest["serial"] for name in fetched if (manifest := _manifest(arrived.checkpoints / name))]
    names = (f"branch-{number}" for number in range(1, 10**6))
    taken = {path.name for folder in (files, arrived) for path in folder.checkpoints.glob("branch-*")}
    branch = files.checkpoints / next(name for name in names if name not in taken)
    for path in Checkpoints(files.checkpoints).folders():
        own = _manifest(path)
        is_same = (arrived.checkpoints / path.name / MANIFEST).is_file() and own == _manifest(
            arrived.checkpoints / path.name
        )
        if not is_same and (path.relative_to(files.checkpoints) in fetched or not own or own["serial"] >= min(serials)):
            branch.mkdir(parents=True, exist_ok=True)
            path.rename(branch / path.name)
    for name in sorted(fetched):
        target = files.checkpoints / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (arrived.checkpoints / name).rename(target)


def _manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except CheckpointError:
        return {}


def _newest(manifests: Mapping[str, Manifest]) -> str | None:
    """Of the checkpoints that are in no branch, the one that was written last."""
    own = [name for name in manifests if name.count("/") == 1]
    return max(own, key=lambda name: manifests[name]["serial"], default=None)


def _put(source: Path, target: Path, keeps: bool = False) -> None:
    """Move a file in; where one of that name is to be kept, a launcher may be writing it, beside it."""
    numbered = (target.with_name(f"{target.name}.{number}") for number in range(1, 10**6))
    if keeps and target.exists():
        target = next(path for path in numbered if not path.exists())
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
