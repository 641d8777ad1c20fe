"""A step that is abandoned halfway: the last whole one is saved, without the other ranks' help."""

import copy
from collections.abc import Callable
from typing import Any

from torch.distributed import DistError

from dtrain.data import rng
from dtrain.data.draws import torch_edges
from dtrain.distributed.launched_rank import is_closed_for_another
from dtrain.distributed.ranks import is_lost_rank
from dtrain.distributed.stop_request import StopWaiting
from dtrain.training.setup import Parts
from dtrain.training.state import TrainState, capture

NOTES_SECONDS = 5.0  # so long a rank waits for the others' last notes


class LastStep:
    """Random numbers and sums as they were after the last whole step: one that is abandoned may have changed them.

    With one batch per step no sums need be kept: the loss is added up after the last moment at which it can get stuck.
    """

    def __init__(self, state: TrainState, keeps_sums: bool) -> None:
        self._state, self._keeps_sums = state, keeps_sums
        self._generators: dict[str, Any] = {}
        # By which it is seen that torch's generators were drawn from; a GPU's has no such place.
        self._edges = torch_edges() if state.is_on_cpu else None
        self._drawn: bytes | None = None
        self.sums: dict[str, Any] = {}

    def mark(self) -> None:
        """This step is whole."""
        edges = self._edges
        drawn = edges[0].raw + edges[1].raw if edges else None
        if drawn is None or drawn != self._drawn:
            self._generators, self._drawn = rng.torch_state(), drawn
        self.sums = copy.deepcopy(self._state.sums) if self._keeps_sums else self._state.sums

    @property
    def generators(self) -> dict[str, Any]:
        """The state of all generators: a step draws from torch's alone."""
        return rng.get_state() | self._generators


def rescue(error: BaseException, parts: Parts, last: LastStep, state: TrainState, judge: Callable[[], None]) -> bool:
    """Save the last whole step, where an error is how a wait ends after a request to stop; False for any other error.

    The other ranks, or this one, are stuck in the next step. Each rank leaves what only it knows in the mailbox; rank 0
    writes. Where a note is missing, what follows is the same training, but with other random numbers. Of a sharded
    model, no rank has the weights: there, the next start resumes from the last checkpoint. True says that this rank has
    done what it could. `judge` counts the steps that the device has skipped meanwhile.

    Raises:
        Exception: Another rank has failed, and the launcher ends this one for it.
        NonFiniteError: From `judge`: the last whole step is none that may be saved.
    """
    if is_closed_for_another():
        raise error if isinstance(error, Exception) else DistError("another rank has failed") from None
    if not isinstance(error, StopWaiting) and not (parts.stop and is_lost_rank(error)):
        return False
    ranks, saver = parts.ranks, parts.saver
    if ranks.strategy.is_sharded:
        parts.progress.note(f"warning: step {state.step} is not saved: ranks that wait cannot give their shards of it")
        return saver.wait()
    sums = {name: float(value) for name, value in last.sums.items()}
    ranks.mailbox.post("abandoned", (last.generators, sums))
    if not ranks.is_main:
        return True
    notes = ranks.mailbox.notes("abandoned", NOTES_SECONDS)
    if not saver.is_saved(state.place):
        judge()
        generators = {rank: its_generators for rank, (its_generators, _) in notes.items()}
        captured = capture(state, parts.trainables, ranks, parts.seed, generators)
        captured[0]["sums"] = {name: sum(each.get(name, 0.0) for _, each in notes.values()) for name in sums}
        saver.save(state.place, *captured, state.newest_score)
    return saver.wait()
