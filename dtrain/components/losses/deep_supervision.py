"""The loss of networks that return an output for each of several resolutions."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.losses.combined import Loss
from dtrain.components.losses.targets import main_of

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class DeepSupervision(nn.Module):
    """sum_i weights[i] * loss(output_i, target in the size of output_i), over a network's outputs, the main one first.

    Lee et al. 2015, "Deeply-Supervised Nets", arXiv:1409.5185; with the weights of Isensee et al. 2021, "nnU-Net",
    doi:10.1038/s41592-020-01008-z. In a config: loss: {name: DeepSupervision, loss: {name: CrossEntropyLoss}}.

    What a network gives in train mode may be a list or tuple, as of the U-Nets here with `deep_supervision: true` and
    of MONAI's SegResNetDS, or one tensor in which they are stacked, (N, heads, K, *), as of MONAI's DynUNet. A single
    output, as in eval mode, has the inner loss alone, so losses of training and validation are not the same sum.

    Args:
        loss: A loss of one output and one target, which returns one number, or a dict of such.
        weights: One for each output, used as they are. Default: 1, 1/2, 1/4, ..., divided by their sum.
        resample: target: each target is resampled to its output's size by nearest neighbours, so that labels stay
            labels; output: outputs are resampled linearly to the target's size.
        stacked: Whether one tensor in train mode holds stacked outputs. Default: as its shape beside the target's says.

    Raises:
        ValueError: There are no weights, or one is negative.
    """

    def __init__(
        self,
        loss: Loss,
        weights: Sequence[float] | None = None,
        resample: Literal["target", "output"] = "target",
        stacked: bool | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and (not weights or min(weights) < 0):
            raise ValueError(f"DeepSupervision: weights are {list(weights)}; expected one per output, none below 0")
        self.loss, self.resample, self.stacked = loss, resample, stacked
        self.weights = None if weights is None else [float(weight) for weight in weights]

    def check_target(self, output: Any, target: Any) -> None:
        """What the inner loss would refuse of a target that has not been moved to the output's device yet."""
        if check := getattr(self.loss, "check_target", None):
            check(self._outputs(output, main_of(target))[0], main_of(target))

    def forward(self, output: Any, target: Any) -> Tensor | dict[str, Tensor]:
        """The loss, one number; of a loss that returns terms, each of them summed over the outputs.

        Args:
            output: (N, K, *); several of these, of any sizes, main one first; or stacked, (N, heads, K, *).
            target: (N, *), (N, 1, *) or (N, K, *), in the main output's size.

        Raises:
            ValueError: There are not as many weights as outputs, or only `stacked` can tell what a tensor holds.
        """
        target = main_of(target)
        outputs = self._outputs(output, target)
        if len(outputs) == 1:
            return self.loss(outputs[0], target)
        values = [self.loss(*self._fitted(one, target)) for one in outputs]
        weighted = list(zip(self._weights(len(outputs)), values, strict=True))
        if isinstance(values[0], Mapping):
            return {name: sum(weight * value[name] for weight, value in weighted) for name in values[0]}
        return sum(weight * value for weight, value in weighted)

    def _weights(self, count: int) -> list[float]:
        if self.weights is None:
            halves = [0.5**level for level in range(count)]
            return [weight / sum(halves) for weight in halves]
        if len(self.weights) != count:
            raise ValueError(f"DeepSupervision: {len(self.weights)} weights for the model's {count} outputs")
        return self.weights

    def _outputs(self, output: Any, target: Tensor) -> list[Tensor]:
        if isinstance(output, list | tuple):
            return list(output)
        if isinstance(output, Tensor):
            return list(output.unbind(1)) if self.training and self._is_stacked(output, target) else [output]
        return [main_of(output)]

    def _is_stacked(self, output: Tensor, target: Tensor) -> bool:
        if self.stacked is not None:
            return self.stacked
        if output.dim() != 5:  # of volumes stacked ones have 6 axes; of images single ones have 4
            return output.dim() == 6
        if target.shape[1:] == output.shape[2:]:
            found = f"{tuple(output.shape)} with a target {tuple(target.shape)}"
            text = f"DeepSupervision: an output {found} may be one of volumes or several of images"
            raise ValueError(f"{text}; say stacked: false for the first, stacked: true for the second")
        return target.dim() < 5 and target.shape[-2:] == output.shape[-2:]

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """An output and the target in one size."""
        dims = output.dim() - 2
        own, wanted = output.shape[2:], target.shape[-dims:]
        if own == wanted:
            return output, target
        if self.resample == "output":
            return F.interpolate(output, size=wanted, mode=LINEAR[dims], align_corners=False), target
        return output, nearest(target, own)


def nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """A target of any type with its last axes resampled to a size: each voxel is the one around its centre.

    Args:
        target: (..., *).
        size: Of the last axes.
    """
    for axis, count in zip(range(-len(size), 0), size, strict=True):
        there = target.shape[axis]
        if there != count:
            index = (2 * torch.arange(count, device=target.device) + 1) * there // (2 * count)
            target = target.index_select(axis, index)
    return target
