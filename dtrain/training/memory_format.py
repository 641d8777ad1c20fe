"""Weights in the memory format channels_last, and an optimizer's state in that of its weights."""

import torch
from torch.nn import Module

from dtrain.data.batch import CHANNELS_LAST


def to_channels_last(module: Module) -> None:
    """Weights of convolutions in channels_last, of 3-D ones in channels_last_3d, in place.

    torch's `Module.to(memory_format=...)` fails for a model that has both.
    """
    for parameter in module.parameters():
        if memory_format := CHANNELS_LAST.get(parameter.dim()):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def follow_weights(optimizer: torch.optim.Optimizer) -> None:
    """A loaded state in the memory format of its weights, which may have another now: mixed ones are slow to step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                is_alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                if is_alike and value.layout == torch.strided and value.stride() != parameter.stride():
                    optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
