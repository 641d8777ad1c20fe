"""Whether a validation is the best so far, and when too many have brought no better one: early stopping."""

import math
from typing import Literal

from dtrain.training.state import TrainState


def is_new_best(state: TrainState, score: float | None, mode: Literal["min", "max"]) -> bool:
    """Note a validation's score; one that is not finite is never the best. None: it measured something else."""
    state.validated_step, state.score = state.step, score
    if score is None:
        return False
    better = state.best is None or (score > state.best if mode == "max" else score < state.best)
    if better and math.isfinite(score):
        state.best, state.bad_validations = score, 0
        return True
    state.bad_validations += 1
    return False


def judge_patience(state: TrainState, patience: int | None, monitor: str) -> None:
    """End the training where so many validations, one after another, have brought no new best."""
    if patience is not None and state.bad_validations >= patience:
        state.ended = f"no better {monitor} in {state.bad_validations} validations"
