"""What of a training goes into the nodes' memory, from the loop's side."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from dtrain.checkpoint.spare_memory import OWN, distrust
from dtrain.config.errors import ConfigError
from dtrain.data import rng
from dtrain.distributed.environment import environment
from dtrain.distributed.fsdp import local_part
from dtrain.tracking.run_folder import RunFolder
from dtrain.training.setup import Parts
from dtrain.training.state import DriftError, TrainState, capture, capture_own


def keep(parts: Parts, state: TrainState) -> None:
    """Copy the state of this step there; the loop waits for that alone. All ranks call it."""
    spare, trainables, ranks = parts.spare, parts.trainables, parts.ranks
    if spare is None:
        return
    spare.wait()
    for kind in spare.kinds:
        if kind == OWN:
            values, weights, ema, others = capture_own(state, trainables, ranks.is_main)
        else:
            generators = {ranks.rank: rng.get_state()}
            values, weights, ema, others = capture(state, trainables, ranks, parts.seed, generators)
        spare.take(kind, values, weights, ema, others)
    spare.seal(state.place, RunFolder(parts.start.folder).journal)


@contextlib.contextmanager
def distrusted_after_error(parts: Parts) -> Iterator[None]:
    """Where ranks turn out to have other weights than rank 0, so may those have that were kept since the last save."""
    try:
        yield
    except DriftError:
        if parts.spare and parts.ranks.is_main:
            distrust(parts.start.folder)
        raise


def require_space(parts: Parts) -> None:
    """A ConfigError where a node's memory cannot take what is known before the first step. All ranks call it.

    Where the launcher has restarted the ranks, it is a line: the training should not end for it.
    """
    spare, trainables, ranks = parts.spare, parts.trainables, parts.ranks
    if spare is None:
        return
    modules = [trainables.module, *(item.module for item in (trainables.ema, trainables.loss_ema) if item is not None)]
    trees = [module.state_dict() for module in modules] + [_state(item) for item in trainables.optimizers.values()]
    leaves = {id(leaf): leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)}
    if problem := spare.check(sum(local_part(leaf).nbytes for leaf in leaves.values())):
        cure = "possible: a larger limit (docker: --shm-size), another spare_memory_dir, or null"
        text = f"trainer.spare_memory_every_steps: {problem}; {cure}"
        if not environment().restarts:
            raise ConfigError(text)
        if ranks.is_main:
            parts.progress.note(f"warning: {text}")


def _state(optimizer: Optimizer) -> object:
    return [*optimizer.state.values()]
