"""Where a training starts: at its first step, from a checkpoint, or not at all because it is finished."""

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.checkpoint.checkpoint_files import MANIFEST
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.tracking.run_folder import RunFolder, lives, read_run
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


def find_start(
    folder: Path,
    resume: str,
    run_name: str,
    limits: Mapping[str, Any],
    tracking_uri: str | None,
    is_restart: bool = False,
) -> Start:
    """Look at the run folder and decide; nothing is touched.

    What to resume from is auto, none, a checkpoint, a run folder or an MLflow run id. The limits are max_epochs and
    max_steps, to see whether they were raised since a finished training. A restart by the launcher continues, whatever
    the training once began from. Raises ResumeError where what `resume` names is not there.
    """
    if is_restart and (resume == "none" or (RunFolder(folder).checkpoints / "last").exists()):
        resume = "auto"
    if resume == "none":
        start = Start(folder, run_name=run_name, moves_aside=True)
    elif resume == "auto":
        start = _continued(folder, run_name, limits)
    elif Path(resume).is_dir():
        start = _from_path(folder, Path(resume), run_name, limits)
    elif re.fullmatch(r"[0-9a-f]{32}", resume):
        start = _continued(_folder_of_run(folder, resume, tracking_uri), run_name, limits)
    else:
        raise ResumeError(f"'{resume}' is neither auto, none, a checkpoint, a run folder nor an MLflow run id")
    return start._replace(busy=_other_writer(start.folder))


def _other_writer(folder: Path) -> str:
    """Who writes a run folder, as far as can be seen from this machine; '' where nobody does."""
    facts = read_run(folder)
    is_here = facts.get("host") == socket.gethostname() and facts.get("pid") != os.getpid()
    if facts.get("state") != "RUNNING" or not is_here or not lives(facts):
        return ""
    return (
        f"{folder} is being written by another training (process {facts['pid']}); "
        "wait for its end, stop it, or give this one another trainer.checkpoint_dir"
    )


def _continued(folder: Path, run_name: str, limits: Mapping[str, Any]) -> Start:
    facts = read_run(folder)
    checkpoint = Checkpoints(RunFolder(folder).checkpoints).last()
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


def _from_path(folder: Path, path: Path, run_name: str, limits: Mapping[str, Any]) -> Start:
    if (path / MANIFEST).is_file():
        same_run = path.resolve().is_relative_to(folder.resolve())
        return Start(folder, path, read_run(folder).get("run_name") or run_name if same_run else run_name)
    if path.resolve() == folder.resolve():
        return _continued(folder, run_name, limits)
    checkpoint = Checkpoints(RunFolder(path).checkpoints).last()
    if checkpoint is None:
        raise ResumeError(f"{path} holds no checkpoint that can be read")
    return Start(folder, checkpoint, run_name, is_verified=True)


def _folder_of_run(folder: Path, run_id: str, tracking_uri: str | None) -> Path:
    if read_run(folder).get("run_id") == run_id:
        return folder
    try:
        found = find_run(run_id, tracking_uri)["tags"].get("dtrain.checkpoint_dir", "")
    except (LookupError, ValueError) as error:
        raise ResumeError(str(error)) from error
    if not found or not Path(found).is_dir():
        raise ResumeError(f"MLflow run {run_id}: its folder {found or '(unknown)'} is not on this machine")
    return Path(found)


def move_aside(folder: Path) -> Path | None:
    """Rename an old run folder; returns where it is now, None when there was nothing."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{folder.name}-{stamp}{f'-{number}' if number else ''}" for number in range(1000))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(aside)
    return aside
