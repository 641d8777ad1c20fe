"""EMA: an exponential moving average of a model's weights."""

import torch
from torch import Tensor
from torch.nn import Module

from dtrain.distributed.fsdp import is_shard, local_part

# Buffers that are averages themselves, as torch's norms call them. An average of any other (a counter, a table, a
# vector that is iterated) would mean nothing: those are copied.
_AVERAGES = ("running_mean", "running_var")


class EMA:
    """An exponential moving average of a module's parameters and running statistics; other buffers are copied.

    Update n (from 0) keeps min(decay, (1 + n) / (10 + n)) of the old average, so that an average over many steps does
    not stay near the initial weights in a short training (the ramp of TensorFlow's ExponentialMovingAverage).
    torch's AveragedModel keeps its count in a tensor, for which the host waits for the device in every step.

    Args:
        module: A copy of what is averaged; it becomes the average.
        decay: The old average's share in the long run, from 0 to 1.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.module, self.decay, self.updates = module.requires_grad_(False), decay, 0
        buffers = [(name.rpartition(".")[2] in _AVERAGES, item) for name, item in module.named_buffers()]
        averaged = [*((True, item) for item in module.parameters()), *buffers]
        self._moves = [moves and (item.is_floating_point() or item.is_complex()) for moves, item in averaged]
        self._is_sharded = any(is_shard(item) for item in module.parameters())

    @property
    def is_ready(self) -> bool:
        """Whether it is worth being evaluated and saved."""
        return True

    def resume(self, updates: int, averaged_epoch: int) -> None:
        """Continue an average of so many updates; `averaged_epoch` is -1 where it was not of epochs' ends."""
        self.updates = updates

    def kept_share(self) -> float:
        """The old average's share in the next one."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: Module) -> None:
        """Take the weights of one more step in."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        weights = [*module.parameters(), *module.buffers()]
        if self._is_sharded:
            averages, weights = list(map(local_part, averages)), list(map(local_part, weights))
        moving: list[Tensor] = []
        newest: list[Tensor] = []
        for average, weight, moves in zip(averages, weights, self._moves, strict=True):
            if moves:
                moving.append(average)
                newest.append(weight)
            else:
                average.copy_(weight)
        if moving:
            torch._foreach_lerp_(moving, newest, 1 - self.kept_share())
        self.updates += 1
