"""ScheduleFree: the averaged weights of a schedule-free optimizer, which are those to validate, test and use."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Module


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer trains some weights and means others by its result: it has `train()` and `eval()`."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


class ScheduleFree:
    """What a module's weights are after `optimizer.eval()`, in a copy; its methods are those of `EMA`.

    The optimizers are in train mode all the time. Their two modes are computed from each other with rounding, so that
    a training that is validated more often would be another one: here the weights of before are put back as they were.

    Args:
        copied: A copy of the module, which becomes the average.
        module: What is trained.
        optimizers: All of the training; other ones than schedule-free ones leave the weights as they are.
    """

    def __init__(self, copied: Module, module: Module, optimizers: Iterable[Any]) -> None:
        self._average, self._module, self.updates = copied.requires_grad_(False), module, 0
        self._switched = [item for item in optimizers if is_schedule_free(item)]
        self._is_of_now = False
        for optimizer in self._switched:
            optimizer.train()

    @property
    def is_ready(self) -> bool:
        """Whether it is worth being evaluated and saved."""
        return True

    def resume(self, updates: int, averaged_epoch: int) -> None:
        """Continue after so many steps."""
        self.updates, self._is_of_now = updates, False

    def update(self, module: Module) -> None:
        """The weights of one more step are there."""
        self.updates, self._is_of_now = self.updates + 1, False

    @property
    def module(self) -> Module:
        """The average, of the weights of now."""
        if not self._is_of_now:
            self._take()
            self._is_of_now = True
        return self._average

    @torch.no_grad()
    def _take(self) -> None:
        weights = [item for optimizer in self._switched for group in optimizer.param_groups for item in group["params"]]
        trained = [item.detach().clone() for item in weights]
        for optimizer in self._switched:
            optimizer.eval()
        own, of_module = self._average, self._module
        averages = [*own.parameters(), *own.buffers()]
        for average, value in zip(averages, [*of_module.parameters(), *of_module.buffers()], strict=True):
            average.copy_(value)
        for optimizer in self._switched:
            optimizer.train()
        torch._foreach_copy_(weights, trained)
