"""Test-time mirroring: the mean of a model's outputs for an image and all its mirror images."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from dtrain.config.errors import ConfigError


def mirrored(call: Callable[[Tensor], Tensor], images: Any, axes: Sequence[int]) -> Tensor:
    """The mean output, before any activation, over all 2**n subsets of n axes along which images are mirrored.

    An output with the images' axes is mirrored back before; one without spatial axes, as of classes, needs none of it.
    It is what nnU-Net does (Isensee et al., Nature Methods 2021).

    Args:
        call: Gives the model's output for images.
        images: (N, C, *spatial).
        axes: Spatial ones, from 0 on, each once.

    Raises:
        ConfigError: There is no such axis, or it cannot be known what to mirror.
    """
    if not isinstance(images, Tensor):
        raise ConfigError(f"predictor.mirror: mirrors one tensor of images; the model's input is {_kind(images)}")
    if max(axes) + 2 >= images.dim():
        possible = ", ".join(map(str, range(images.dim() - 2))) or "none"
        raise ConfigError(f"predictor.mirror: {list(axes)}: the images have the axes {possible}")
    total: Tensor | None = None
    for count in range(len(axes) + 1):
        for subset in combinations([axis + 2 for axis in axes], count):
            output = call(images.flip(subset) if subset else images).float()
            if output.dim() not in (2, images.dim()):
                shapes = f"{tuple(output.shape)} for images {tuple(images.shape)}"
                raise ConfigError(f"predictor.mirror: the model's output {shapes} cannot be mirrored back")
            output = output.flip(subset) if subset and output.dim() > 2 else output
            total = output if total is None else total + output
    assert total is not None
    return total / 2 ** len(axes)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else f"a {type(value).__name__}"
