"""Whether a training can be saved, tried before its first step; which ranks write; what MLflow is given at its end."""

from pathlib import Path

from dtrain.checkpoint.checkpoint_files import EMA, MODEL, has_averaged
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.weights import write_weights
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import whole_file
from dtrain.training.setup import Parts
from dtrain.training.state import TrainState, capture


def check_saving(parts: Parts, state: TrainState) -> None:
    """Raise, on every rank, what prevents a checkpoint: types, a folder that cannot be written, a full disk.

    Ranks of a sharded model that do not see one folder, so that none could hold all their shards, gather it on the main
    rank from now on, unless the config asks for shards. All ranks call it.
    """
    ranks, saver = parts.ranks, parts.saver
    captured = capture(state, parts.trainables, ranks, parts.seed)
    if saver.writers is not None and not ranks.is_main:
        saver.check(*captured)
    if not (apart := ranks.decide(lambda: saver.check(*captured))):
        return
    if ranks.strategy.must_save_shards:
        text = f"{apart}; trainer.fsdp.state_dict_type: full has rank 0 gather and write all"
        raise CheckpointError(text)
    if ranks.is_main:
        parts.progress.note(f"checkpoints are gathered and written by rank 0: {apart}")
    ranks.strategy.saves_shards = False
    saver.gather_from_now_on()
    check_saving(parts, state)


def gathered_weights(parts: Parts, checkpoint: Path) -> list[Path]:
    """The weights in a sharded checkpoint as whole files in the run folder, averaged ones first: what MLflow is given.

    None where it is given nothing, or where they cannot be written, which is said.
    """
    if not parts.journal.tracking_uri:
        return []
    place, files = RunFolder(parts.start.folder.absolute()).weights, []
    try:
        place.mkdir(exist_ok=True)
        for name, averaged in ((EMA, True), (MODEL, False)):
            if has_averaged(checkpoint) or not averaged:
                with whole_file(place / name) as temporary:
                    write_weights(checkpoint, temporary, averaged, is_verified=True)
                files.append(place / name)
    except (CheckpointError, OSError) as error:
        parts.progress.note(f"warning: MLflow is not given the weights: {error}")
        return []
    return files
