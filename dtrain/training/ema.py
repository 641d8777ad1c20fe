"""EMA: an exponential moving average of a model's weights."""

import torch
from torch import Tensor
from torch.nn import Module

from dtrain.distributed.fsdp import is_shard, local_part


class EMA:
    """An exponential moving average of a module's parameters and buffers; integers are copied.

    torch's AveragedModel keeps its count in a tensor, for which the host waits for the device in every step.

    Args:
        module: A copy of what is averaged; it becomes the average.
        decay: The old average's share, from 0 to 1. The first update is a copy.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.module, self.decay, self.updates = module.requires_grad_(False), decay, 0
        self._is_sharded = any(is_shard(item) for item in module.parameters())

    @torch.no_grad()
    def update(self, module: Module) -> None:
        """Take the weights of one more step in."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        weights = [*module.parameters(), *module.buffers()]
        if self._is_sharded:
            averages, weights = list(map(local_part, averages)), list(map(local_part, weights))
        moving: list[Tensor] = []
        newest: list[Tensor] = []
        for average, weight in zip(averages, weights, strict=True):
            if self.updates and (average.is_floating_point() or average.is_complex()):
                moving.append(average)
                newest.append(weight)
            else:
                average.copy_(weight)
        if moving:
            torch._foreach_lerp_(moving, newest, 1 - self.decay)
        self.updates += 1
