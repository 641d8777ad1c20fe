"""Losses of continuous values.

Shapes: N samples, C channels, any spatial dimensions *.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.losses.targets import TargetReader, mean


class WeightedSmoothL1Loss(nn.Module):
    """Smooth L1 in which small (or large) targets weigh more or less.

    mean(w s), s = d^2 / 2 where |d| < 1, else |d| - 1/2, d = output - target; w = `initial_weight` where the target is
    below `threshold` (or, if not `apply_below_threshold`, not below it), else 1. The mean is over the number of values
    that count, not over the sum of w. Smooth L1: Girshick 2015, arXiv:1504.08083; the weights: pytorch-3dunet.

    Edge cases: 0 if nothing counts.

    Args:
        threshold: In units of the target.
        initial_weight: Weight of the values on that side of the threshold.
        apply_below_threshold: Which side: below it, or from it on.
        ignore_index: The value of the target that does not count. Default: everything counts.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *).
    """

    def __init__(
        self,
        threshold: float,
        initial_weight: float,
        apply_below_threshold: bool = True,
        ignore_index: int | None = None,
        skip_last_target: bool = False,
        squeeze_channel: bool = False,
    ) -> None:
        super().__init__()
        self.threshold, self.initial_weight = threshold, initial_weight
        self.apply_below_threshold = apply_below_threshold
        self.target = TargetReader(ignore_index, skip_last_target, squeeze_channel)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: (N, C, *).
            target: (N, C, *), or (N, *) if C is 1.

        Raises:
            ValueError: The shapes do not fit.
        """
        read = self.target.read(output, target, "values")
        values = F.smooth_l1_loss(read.output, read.target, reduction="none")
        chosen = (read.target < self.threshold) == self.apply_below_threshold
        return mean((values * self.initial_weight).where(chosen, values), read.valid)
