"""Optimizers that evaluate the loss themselves, several times per step (LBFGS, SAM), and the closure for them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dtrain.data import rng
from dtrain.dataloader import MicroBatch
from dtrain.distributed.ranks import Ranks
from dtrain.training.state import TrainState


def asks_for_closure(optimizer: Any) -> bool:
    """Whether an optimizer's `step` cannot be called without a closure; some that need one do not say so."""
    step = getattr(type(optimizer), "step", None)  # of the class: a scheduler wraps the object's
    if step is None:  # nothing is trained
        return False
    _, *rest = inspect.signature(step).parameters.values()
    return any(item.default is item.empty and item.kind is item.POSITIONAL_OR_KEYWORD for item in rest)


def closure_mistake(options: Mapping[str, Any], optimizers: Iterable[Any], is_sharded: bool) -> str:
    """What optimizers that are given a closure cannot be combined with; '' where there is nothing of the kind.

    `options` are the trainer's.
    """
    wish = options["closure"]
    named = [type(each).__name__ for each in optimizers if (asks_for_closure(each) if wish is None else wish)]
    if named and options["precision"] == "fp16":
        cure = "which torch's scaler of fp16 does not support; possible: trainer.precision=bf16 or fp32"
        return f"{named[0]} evaluates the loss itself, {cure}"
    if named and is_sharded:
        cure = "which has not been tried with a sharded model; possible: trainer.strategy=ddp"
        return f"{named[0]} evaluates the loss itself, {cure}"
    return ""


class Closure:
    """Evaluates the loss of the step at work again, on all of its batches, with the weights of now.

    It is the same function each time: dropout and whatever else draws random numbers draw the same ones, and afterwards
    they continue as after the first evaluation. Nothing of it is logged.

    Args:
        learn: Forward and backward of a batch.
        norm: Clips the gradients; their norm before.
    """

    def __init__(
        self, state: TrainState, ranks: Ranks, learn: Callable[[MicroBatch], None], norm: Callable[[], Tensor]
    ) -> None:
        self._state, self._ranks, self._learn, self._norm = state, ranks, learn, norm
        self._batches: list[MicroBatch] = []
        self._generators: dict[str, Any] = {}  # as they were before the first of them
        self._step = -1  # that they are of
        self._is_at_work = False

    def note(self, micro: MicroBatch) -> None:
        """A batch of a step begins."""
        if self._is_at_work:
            return
        if self._step != self._state.step:
            self._batches, self._generators, self._step = [], rng.get_state(), self._state.step
        self._batches.append(micro)

    def __call__(self, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """The loss, the mean over all ranks' samples of the step, and the gradients' norm. All ranks call it."""
        state, sums, generators = self._state, self._state.sums, rng.get_state()
        step_samples = self._batches[-1].step_samples
        kept = step_samples - state.step_left_out
        self._is_at_work, state.sums = True, {}
        try:
            rng.set_state(self._generators)
            optimizer.zero_grad()
            for micro in self._batches:
                self._learn(micro)
            if state.step_left_out:
                gradients = [item.grad for group in optimizer.param_groups for item in group["params"]]
                torch._foreach_mul_([item for item in gradients if item is not None], step_samples / kept)
            norm = self._norm()
            loss = self._ranks.sum_(state.stacked_sums)[0] / kept
        finally:
            self._is_at_work, state.sums = False, sums
            rng.set_state(generators)
        return loss, norm
