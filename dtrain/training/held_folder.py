"""The run folder of a training at work: held by it alone, and kept in one place."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.resume import move_aside
from dtrain.checkpoint.spare_memory import save
from dtrain.config.errors import ConfigError
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.run_lock import FolderIsBusyError, take_lock
from dtrain.tracking.whole_file import write_text
from dtrain.training.setup import Parts


@contextlib.contextmanager
def only_training(parts: Parts) -> Iterator[None]:
    """Be the only training that writes the run folder, before anything is changed in it; a ConfigError: another is.

    All ranks call it. An old training in the folder is moved aside here, with its lock, so that nobody is in between.
    """
    try:
        parts.ranks.decide(lambda: _begin_in_folder(parts))
        yield
    finally:
        if parts.lock is not None:
            parts.lock.release()


def _begin_in_folder(parts: Parts) -> None:
    folder, start = parts.start.folder, parts.start
    try:
        parts.lock = take_lock(folder)
        if start.moves_aside and (aside := move_aside(folder)):
            (aside / RunFolder(folder).lock.name).unlink()
            parts.lock.release()
            parts.lock = take_lock(folder)
            parts.progress.note(f"the old training was moved to {aside}")
            parts.journal.deliver_later(aside)
    except FolderIsBusyError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        text = f"trainer.checkpoint_dir: {folder} cannot be written: {error.strerror}: {error.filename}"
        raise ConfigError(text) from error
    facts = read_run(folder)
    is_known = facts.get("attempt_started") == start.found_attempt or facts.get("pid") == os.getpid()
    if not is_known and not start.moves_aside:
        raise ConfigError(f"{folder} was written by another training while this one started; start it again")
    if start.kept:
        _save_what_was_kept(parts)
    if start.is_branch and start.checkpoint and (branch := _gone_back(parts)):
        chosen = start.checkpoint.resolve().name
        parts.progress.note(f"what followed {chosen} no longer counts as last or best: it was moved to {branch}")


def _save_what_was_kept(parts: Parts) -> None:
    """Make a checkpoint of the step that the training resumes from, which lay in memory alone."""
    assert parts.loaded is not None
    checkpoints, step = parts.saver.checkpoints, parts.loaded.state["step"]
    before = max((int(path.name.removeprefix("step-")) for path in checkpoints.folders()), default=None)
    newest = "there is no checkpoint" if before is None else f"the newest checkpoint is of step {before}"
    try:
        save(checkpoints, parts.loaded)
        parts.progress.note(f"resumes from step {step}, which was kept in memory; on the disk, {newest}")
    except CheckpointError as error:
        parts.progress.note(f"warning: resumes from step {step}, which was kept in memory, without a copy: {error}")


def _gone_back(parts: Parts) -> Path | None:
    checkpoints, chosen = parts.saver.checkpoints, parts.start.checkpoint
    if chosen is None or not chosen.resolve().is_relative_to(checkpoints.folder.parent.resolve()):
        return None
    return checkpoints.go_back_to(chosen)


def lay_out_config(parts: Parts) -> None:
    """Write the config, as resolved and as written."""
    folder = parts.start.folder
    for name, text in parts.texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def keep_whole(parts: Parts) -> None:
    """Where the run folder was renamed or removed in mid-run: say so, and keep the run in one place. For the main rank.

    A renamed one stays where it is, and its old name becomes a link to it, by which all that writes there continues. A
    removed one is made again, with what this process holds: config, journal, run.json, and what is saved from now on.

    Raises:
        RuntimeError: That cannot be; the run ends in the folder where it lies now.
    """
    lock, folder = parts.lock, parts.start.folder
    if lock is None or lock.is_in_place:
        return
    home = None
    try:
        home = lock.home()
        if home is None:
            lock.release()
            if folder.is_symlink():  # which leads nowhere
                folder.unlink()
            parts.lock = take_lock(folder)
            lay_out_config(parts)
            parts.journal.write_again()
            told = "made again, with the journal and what is saved from now on; checkpoints, logs and pictures are gone"
            parts.progress.note(f"warning: the run folder {folder} was removed in mid-run: {told}")
        elif RunFolder(folder).lock.exists():
            raise FolderIsBusyError("another training has begun there")
        else:
            _link_to(home, folder)
            told = f"the run folder was renamed to {home} in mid-run: it continues there, and {folder} is a link to it"
            parts.progress.note(f"warning: {told}")
    except (OSError, FolderIsBusyError) as error:
        if home is not None:
            _move_to(parts, home)
        where = f"renamed to {home}" if home else "removed"
        text = f"the run folder {folder} was {where} in mid-run, and cannot be kept whole: {error}"
        cure = f"; continue it with trainer.checkpoint_dir={home}" if home else ""
        raise RuntimeError(text + cure) from error


def _link_to(home: Path, name: Path) -> None:
    """Have a name lead to a folder; what was written under that name meanwhile is moved there, where it is missing."""
    if name.is_symlink():
        name.unlink()
    for path in sorted(name.rglob("*")) if name.exists() else ():
        target = home / path.relative_to(name)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    if name.exists():
        shutil.rmtree(name)
    name.symlink_to(home)


def _move_to(parts: Parts, home: Path) -> None:
    """Let the ending be written where the run lies."""
    parts.start = parts.start._replace(folder=home)
    parts.saver.checkpoints.folder = RunFolder(home).checkpoints
    parts.journal.move_to(home)
    if parts.lock is not None:
        parts.lock.folder = home
