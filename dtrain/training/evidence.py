"""Evidence: what is looked at where a training fails or hangs, and the failed step, kept to be replayed."""

import itertools
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset

from dtrain.checkpoint.checkpoint_files import LOSS
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.tracking.run_folder import RunFolder
from dtrain.training.rescue import LastStep
from dtrain.training.setup import Parts
from dtrain.training.state import Activity, TrainState


@dataclass
class Evidence:
    """What is looked at where a training fails or hangs."""

    parts: Parts
    activity: Activity  # what this rank is doing
    state: TrainState  # how far the training is
    last_step: LastStep  # the random numbers of before the step at work

    def samples(self, error: BaseException | None = None) -> list[int]:
        """The samples of this rank's batch, or of the one that it waits for; in an evaluation, of an error's batch."""
        loaders = self.parts.loaders
        if error is None or self.activity.phase not in ("validation", "test"):
            shard: Any = loaders.train.shard if loaders.train else None
            # What shows only where figures are logged, began with the step that the training now stands before.
            begin = self.state.position if self.activity.phase == "logging" else self.activity.batch_start
            try:
                return next(iter(shard.batches_from(self.state.epoch, begin, 1)), []) if shard else []
            except Exception:  # of a sampler of the user's own, whose error this may be
                return []
        loader: Any = self._evaluated()
        number = getattr(error, "batch_number", None)  # none where it was not the model, the loss or a metric
        if loader is None or number is None:
            return []
        _epoch, *samples = next(itertools.islice(iter(loader.batch_sampler or ()), number, None), [0])
        return samples

    def locate(self, error: BaseException) -> None:
        """Add to an error that knows the sample in its batch, as a note, which one it is, and where the dataset has it.

        A dataset says so with a method `where(index) -> str`.
        """
        number, samples = getattr(error, "sample_in_batch", None), self.samples(error)
        if number is None or number >= len(samples):
            return
        loaders: Any = self.parts.loaders
        loader = self._evaluated() or loaders.train
        dataset: Any = getattr(loader, "loader", loader).dataset.dataset
        index = samples[number]
        while isinstance(dataset, Subset):
            index, dataset = dataset.indices[index], dataset.dataset
        where = getattr(dataset, "where", None)
        error.add_note(f"sample {samples[number]}" + (f" is {where(index)}" if callable(where) else ""))

    def _evaluated(self) -> Any:
        """The loader of the set that is evaluated; None where none is."""
        phase = {"validation": "val", "test": "test"}.get(self.activity.phase)
        named = self.parts.loaders.of(phase) if phase else {}
        return named.get(self.activity.data_set, next(iter(named.values()), None))

    def keep_step(self, exact: bool, timeout_seconds: float) -> str:
        """Keep the step at work, to be replayed: every rank leaves its random numbers, rank 0 writes.

        `exact`: the weights are those of before the step. `timeout_seconds`: to wait for the others' random numbers.
        Returns why the step cannot be replayed; empty where it can, or where rank 0 says it.
        """
        ranks, loader = self.parts.ranks, self.parts.loaders.train
        if ranks.strategy.is_sharded:
            return "the failed step cannot be replayed: of a sharded model, no rank has the weights"
        ranks.mailbox.post("failed step", self.last_step.generators)
        if not ranks.is_main:
            return ""
        assert loader is not None
        state: dict[str, Any] = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "position": self.state.position,
            "order": self.state.order,
            **loader.shard_state(),
            "exact": exact,
            "rng": ranks.mailbox.notes("failed step", timeout_seconds),
        }
        try:
            kept = Checkpoints(RunFolder(self.parts.start.folder).failed_step, keep_last=1, keep_best=0)
            own = self.parts.trainables
            others = {LOSS: own.loss.state_dict()} if own.loss is not None else {}
            state["kept"] = {name: each.state_dict() for name, each in own.kept.items()}
            kept.save(self.state.step, own.module.state_dict(), state, others=others)
        except CheckpointError as error:
            return f"warning: the failed step cannot be replayed: {error}"
        return ""
