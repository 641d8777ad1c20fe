"""Where a training starts: at its first step, from a checkpoint, or not at all because it is finished."""

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.checkpoint.checkpoint_files import MANIFEST, MODEL, MODEL_SHARDS, read_manifest, read_tensors, verify
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.shards import stored_in
from dtrain.checkpoint.spare_memory import Kept, last_step
from dtrain.config.errors import first_few
from dtrain.tracking.run_folder import RunFolder, lives, read_run
from dtrain.tracking.run_lock import writer_of
from dtrain.tracking.start_sender import find_run


class ResumeError(Exception):
    """`trainer.resume` names something that is not there."""


class Start(NamedTuple):
    """What rank 0 found."""

    folder: Path
    checkpoint: Path | None = None
    run_name: str = ""
    finished: str = ""  # why there is nothing to do, and how to continue; empty where there is something to do
    moves_aside: bool = False  # an old training in the folder is to be moved away before this one begins
    busy: str = ""  # who else writes the run folder; empty where nobody does
    is_verified: bool = False  # the checkpoint's files were just compared with its manifest
    is_branch: bool = False  # what follows the checkpoint is computed anew: other figures than those of before
    found_attempt: float | None = None  # when the last start in the folder began that has run: was there a newer one?
    kept: Kept | None = None  # the checkpoint is still to be written: what it will hold lies in the nodes' memory
    has_new_scores: bool = False  # what validations give from here on cannot be compared with what they gave before
    new_values: Mapping[str, tuple[str, str]] = {}  # keys of the config that have changed: a line for each, its value
    batch_ranks: int = 0  # the ranks whose batches an optimizer step has, on however many this start has; 0: on these


def find_start(
    folder: Path,
    resume: str,
    run_name: str,
    limits: Mapping[str, Any],
    tracking_uri: str | None,
    is_restart: bool = False,
    verify: Callable[[Path], list[str]] = verify,
) -> Start:
    """Look at the run folder and decide; nothing is touched.

    What to resume from is auto, last, none, a checkpoint, a run folder or an MLflow run id. The limits are max_epochs
    and max_steps, to see whether they were raised since a finished training. A restart by the launcher continues,
    whatever the training once began from. `verify` says what is wrong with a checkpoint folder. Raises ResumeError
    where what `resume` names is not there.
    """
    if is_restart and (resume == "none" or (RunFolder(folder).checkpoints / "last").exists()):
        resume = "auto"
    if resume == "none":
        start = Start(folder, run_name=run_name, moves_aside=True)
    elif resume in ("auto", "last"):
        start = _continued(folder, run_name, limits, verify)
    elif Path(resume).is_dir():
        start = _from_path(folder, Path(resume), run_name, limits, verify)
    elif re.fullmatch(r"[0-9a-f]{32}", resume):
        start = _continued(folder_of_run(folder, resume, tracking_uri), run_name, limits, verify)
    else:
        raise ResumeError(f"'{resume}' is neither auto, none, a checkpoint, a run folder, an MLflow run id nor last")
    return start._replace(busy=other_writer(start.folder), found_attempt=read_run(start.folder).get("attempt_started"))


def newer_in_memory(start: Start, kept: Kept, resume: str, is_restart: bool) -> Start:
    """The same start, from a step that is kept in memory where the training continues and has no newer checkpoint.

    `kept` is of the training in `start.folder`.
    """
    is_elsewhere = resume not in ("auto", "last") and Path(resume).is_dir()  # else an MLflow run id's own folder
    continues = is_restart or not is_elsewhere or Path(resume).resolve() == start.folder.resolve()
    checkpoints = Checkpoints(RunFolder(start.folder).checkpoints)
    if start.checkpoint and start.checkpoint.resolve().is_relative_to(start.folder.resolve()):
        newest = int(read_manifest(start.checkpoint)["step"])
    else:
        newest = last_step(checkpoints)
    if start.moves_aside or start.finished or not continues or kept.place[0] <= newest:
        return start
    path = checkpoints.folder / f"step-{kept.place[0]:08d}"
    return start._replace(checkpoint=path, is_verified=True, kept=kept)


def other_writer(folder: Path) -> str:
    """Which training writes a run folder; '' where none does.

    One of an older dtrain takes no lock; of this machine it is found by what it has written.
    """
    if busy := writer_of(folder):
        return busy
    facts = read_run(folder)
    is_here = facts.get("host") == socket.gethostname() and facts.get("pid") != os.getpid()
    if facts.get("state") != "RUNNING" or not is_here or not lives(facts):
        return ""
    return (
        f"{folder} is being written by another training (process {facts['pid']}); "
        "wait for its end, stop it, or give this one another trainer.checkpoint_dir"
    )


Verify = Callable[[Path], list[str]]


def _continued(folder: Path, run_name: str, limits: Mapping[str, Any], verify: Verify) -> Start:
    facts = read_run(folder)
    checkpoint = Checkpoints(RunFolder(folder).checkpoints, verify=verify).last()
    finished = ""
    if facts.get("state") == "FINISHED" and not any(_raised(facts, limits, key) for key in ("max_epochs", "max_steps")):
        finished = (
            f"{folder} holds a finished training; to continue it, raise trainer.max_epochs (or max_steps); "
            "to begin again, trainer.resume=none (moves it aside) or another trainer.checkpoint_dir"
        )
    return Start(folder, checkpoint, facts.get("run_name") or run_name, finished, is_verified=True)


def _raised(facts: Mapping[str, Any], limits: Mapping[str, Any], key: str) -> bool:
    """Whether a limit is higher than that of the finished training; no limit is higher than any."""
    before, now = facts.get(key), limits.get(key)
    return before is not None and (now is None or now > before) and any(limits.values())


def _from_path(folder: Path, path: Path, run_name: str, limits: Mapping[str, Any], verify: Verify) -> Start:
    if (path / MANIFEST).is_file():
        if not path.resolve().is_relative_to(folder.resolve()):
            return Start(folder, path, run_name)
        is_branch = Checkpoints(RunFolder(folder).checkpoints).has_later_than(path)
        return Start(folder, path, read_run(folder).get("run_name") or run_name, is_branch=is_branch)
    if path.resolve() == folder.resolve():
        return _continued(folder, run_name, limits, verify)
    checkpoint = Checkpoints(RunFolder(path).checkpoints, verify=verify).last()
    if checkpoint is None:
        raise ResumeError(f"{path} holds no checkpoint that can be read")
    return Start(folder, checkpoint, run_name, is_verified=True)


def folder_of_run(folder: Path, run_id: str, tracking_uri: str | None) -> Path:
    """The run folder of an MLflow run, perhaps this one; ResumeError where it is not known or not on this machine."""
    if read_run(folder).get("run_id") == run_id:
        return folder
    try:
        found = find_run(run_id, tracking_uri)["tags"].get("dtrain.checkpoint_dir", "")
    except (LookupError, ValueError) as error:
        raise ResumeError(str(error)) from error
    if not found or not Path(found).is_dir():
        raise ResumeError(f"MLflow run {run_id}: its folder {found or '(unknown)'} is not on this machine")
    return Path(found)


def damage_in(folder: Path) -> str:
    """What is wrong where a run folder has checkpoints and none of them is whole, and what is left; '' elsewhere."""
    checkpoints = Checkpoints(RunFolder(folder).checkpoints)
    damaged = checkpoints.damaged()
    if not damaged or len(damaged) < len(checkpoints.folders()):
        return ""
    weights = [found for path, problems in damaged.items() if (found := _weights_in(path, problems))]
    text = f"no checkpoint in {checkpoints.folder} is whole: "
    text += "; ".join(f"{path.name}/{problem}" for path, problems in damaged.items() for problem in problems)
    if weights:
        text += f". Weights that can be read: trainer.pre_trained={weights[0]} trainer.resume=none starts from them"
        text += f" (also {first_few([str(path) for path in weights[1:]], 5)})" if weights[1:] else ""
    return f"{text}. trainer.resume=none begins again; it moves this folder aside and removes nothing"


def _weights_in(path: Path, problems: list[str]) -> Path | None:
    """A damaged checkpoint's weights, where they are whole or, where its manifest cannot tell, can be read at all."""
    if any(problem.startswith((MODEL, f"{MODEL_SHARDS}/")) for problem in problems):
        return None
    shards = path / MODEL_SHARDS
    try:
        if not shards.is_dir():
            read_tensors(path / MODEL, {})
            return path / MODEL
        return shards if stored_in(shards) else None
    except CheckpointError:
        return None


def move_aside(folder: Path) -> Path | None:
    """Rename an old run folder; returns where it is now, None when there was nothing but a lock and a note of nodes."""
    no_training = {RunFolder(folder).lock.name, RunFolder(folder).bad_nodes.name}
    if not folder.is_dir() or not {entry.name for entry in folder.iterdir()} - no_training:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{folder.name}-{stamp}{f'-{number}' if number else ''}" for number in range(1000))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(aside)
    return aside
