"""The step in which a training failed: kept with all that repeating it takes."""

from pathlib import Path
from typing import Any

from torch.nn import Module

from dtrain.checkpoint.snapshot import CheckpointError
from dtrain.checkpoint.store import Checkpoints
from dtrain.dataloader import TrainLoader
from dtrain.distributed.ranks import Ranks
from dtrain.training.rescue import LastStep
from dtrain.training.state import TrainState

FAILED_STEP = "failed-step"  # a folder of checkpoints in the run folder


class FailedStep:
    """Keeps the weights of before the step at work, the ranks' random numbers and where its samples are.

    Args:
        folder: The run folder.
        module: The bare model.
        state: How far the training is.
        last: The random numbers of before the step.
        loader: Of the training data.
        ranks: This rank among the others.
    """

    def __init__(
        self, folder: Path, module: Module, state: TrainState, last: LastStep, loader: TrainLoader | None, ranks: Ranks
    ) -> None:
        self._folder, self._module, self._state = folder, module, state
        self._last, self._loader, self._ranks = last, loader, ranks

    def keep(self, exact: bool, timeout_seconds: float) -> str:
        """Every rank leaves its random numbers, rank 0 writes.

        Args:
            exact: Whether the weights are those of before the step.
            timeout_seconds: How long to wait for the others' random numbers.

        Returns:
            Why the step cannot be replayed; empty where it can, or where rank 0 says it.
        """
        if self._ranks.strategy.is_sharded:
            return "the failed step cannot be replayed: of a sharded model, no rank has the weights"
        mailbox = self._ranks.mailbox
        mailbox.post("failed step", self._last.generators)
        if not self._ranks.is_main:
            return ""
        assert self._loader is not None
        state: dict[str, Any] = {
            "step": self._state.step,
            "epoch": self._state.epoch,
            "position": self._state.position,
            "accumulate": self._loader.accumulate,
            "batch_size": self._loader.shard.batch_size,
            "world_size": self._loader.shard.world_size,
            "exact": exact,
            "rng": mailbox.notes("failed step", timeout_seconds),
        }
        kept = Checkpoints(self._folder / FAILED_STEP, keep_last=1, keep_best=0)
        try:
            kept.save(self._state.step, self._module.state_dict(), state)
        except CheckpointError as error:
            return f"warning: the failed step cannot be replayed: {error}"
        return ""
