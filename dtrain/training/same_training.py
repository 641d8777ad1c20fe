"""Whether a start continues the very training that its run folder holds, or one with other settings."""

import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from dtrain.checkpoint.resume import Start
from dtrain.config.difference import Change, changes, ranks_of_batch
from dtrain.config.errors import ConfigError, Mistake, dotted, shown, to_plain
from dtrain.config.load import load_config, place_of
from dtrain.tracking.journal import has_figures
from dtrain.tracking.run_folder import RunFolder, ranks_known, read_run
from dtrain.tracking.secrets import redact


def compared(config: ConfigDict, start: Start, resume: str, world_size: int) -> Start:
    """The start with what differs from the config that the run folder holds, and whose batches a step has; on rank 0.

    `world_size` is the number of ranks that a new training would be meant for.

    Raises:
        ConfigError: What is computed would change, and nobody asked for that: `resume` is auto.
    """
    found, ranks = _changes(config, start, world_size)
    computed = [change for change in found if not change.is_free]
    if computed and resume == "auto":
        raise ConfigError([*(_mistake(config, change) for change in computed), Mistake(_ways_on(start))])
    new_values = {dotted(change.path): (str(change), shown(change.after).strip("'")) for change in found}
    is_branch, has_new_scores = start.is_branch or bool(computed), any(map(_changes_scores, computed))
    start = start._replace(new_values=new_values, is_branch=is_branch, has_new_scores=has_new_scores)
    return start._replace(batch_ranks=ranks)


def other_settings(config: ConfigDict, text: str) -> list[str]:
    """In what the config of another folder, as it was resolved there, describes another training."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(text)
        try:
            found = changes(load_config(file), config, 1, 1)
        except ConfigError:
            return []
    return [redact(str(change)) for change in found if not change.is_free]


def _changes_scores(change: Change) -> bool:
    """Whether the same weights would get another score."""
    section, *rest = map(str, change.path)
    of_val = section == "loaders" and rest[:1] != ["train"] and rest[-1:] not in (["batch_size"], ["global_batch_size"])
    return section in ("metrics", "loss") or of_val or (section == "trainer" and rest in (["monitor"], ["mode"]))


def _changes(config: ConfigDict, start: Start, world_size: int) -> tuple[list[Change], int]:
    """What differs, and the ranks whose batches a step has from here on.

    Nothing where the folder holds no training that has computed something, or not this one.
    """
    folder = start.folder
    is_own = start.checkpoint is not None and _lies_in(start.checkpoint, folder)
    saved = RunFolder(folder).config
    if start.moves_aside or not saved.is_file() or not (is_own or (start.checkpoint is None and has_figures(folder))):
        return [], world_size
    known = ranks_known(read_run(folder)) or world_size
    try:
        before = load_config(saved)
        if to_plain(before) == to_plain(config):  # as after a requeue: what both describe need not be looked up
            return [], known
        ranks = ranks_of_batch(before, config, known, world_size)
        return changes(before, config, known, ranks), ranks
    except ConfigError:  # of an older dtrain, or changed by hand: nothing can be compared
        return [], known


def _lies_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().is_relative_to(folder.resolve())


def _mistake(config: ConfigDict, change: Change) -> Mistake:
    return Mistake(redact(str(change)), place_of(config, change.path))


def _ways_on(start: Start) -> str:
    return (
        f"{start.folder} holds a training with other settings (above): trainer.resume=last continues it with the new "
        "ones, trainer.resume=none begins again (moves it aside), or give this one another trainer.checkpoint_dir"
    )
