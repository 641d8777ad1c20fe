"""Overlap losses, Dice and its relatives.

Shapes: N samples, C channels, any spatial dimensions *. p = what `normalization` makes of the output, t = the target,
both (N, C, *). Sums are over samples and voxels, so these are losses of a batch: the mean of two batches' losses is not
the loss of both, and several ranks do not compute what one rank with all samples would.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.losses.targets import Read, TargetReader, class_weights, mean, weights_for

Normalization = Literal["sigmoid", "softmax", "none"]


class DiceLoss(nn.Module):
    """1 - mean_c w_c d_c / mean_c w_c with d_c = 2 sum p_c t_c / max(sum p_c^2 + sum t_c^2, 1e-6).

    Milletari et al. 2016 (V-Net), arXiv:1606.04797: squares in the denominator. Equal to pytorch-3dunet's DiceLoss
    without weights, and to MONAI's with sigmoid=True, squared_pred=True, batch=True, smooth_nr=0, smooth_dr=1e-6.

    Edge cases: a channel that the targets of the batch do not have counts with d_c = 0, which is the limit for ever
    smaller predictions, and gives no gradient; so a batch without any target has a loss of 1. What is ignored is in no
    sum. The weights are divided by their mean, so that the loss stays within 0 and 1 (pytorch-3dunet's does not).

    Args:
        weight: Weight of each channel. Default: 1.
        normalization: sigmoid (of each channel), softmax (over the channels) or none (the output is p).
        ignore_index: The value of the target that does not count. Default: everything counts.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *).

    Raises:
        ValueError: The normalization is unknown, or the weights are not a list of numbers, none negative, not all 0.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        normalization: Normalization = "sigmoid",
        ignore_index: int | None = None,
        skip_last_target: bool = False,
        squeeze_channel: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights(weight))
        self.normalization = _known(normalization)
        self.target = TargetReader(ignore_index, skip_last_target, squeeze_channel)

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        self.target.check(output, target, "classes")

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: (N, C, *).
            target: (N, C, *); or labels (N, *) or (N, 1, *) if C > 1; or (N, *) if C is 1.

        Raises:
            ValueError: The shapes do not fit, or the target has a value outside its classes.
        """
        read = self.target.read(output, target, "classes")
        scores = _dice(_normalized(read, self.normalization), read)
        weight = weights_for(read.output, self.weight)
        return 1 - (scores.mean() if weight is None else (scores * weight).sum() / weight.sum())


class BCEDiceLoss(nn.Module):
    """Binary cross entropy plus `alpha` times DiceLoss, both of the sigmoid of the output.

    mean(-t log p - (1 - t) log(1 - p)) + alpha (1 - mean_c d_c), p = sigmoid(output), d_c as in DiceLoss; the first
    mean is over all values that count. As in pytorch-3dunet; a factor of the first term is to be had with WeightedSum.

    Edge cases: DiceLoss's; if nothing counts, the first term is 0.

    Args:
        alpha: Factor of the Dice term.
        ignore_index: The value of the target that does not count. Default: everything counts.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *).
    """

    def __init__(
        self,
        alpha: float = 1.0,
        ignore_index: int | None = None,
        skip_last_target: bool = False,
        squeeze_channel: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.target = TargetReader(ignore_index, skip_last_target, squeeze_channel)

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        self.target.check(output, target, "classes")

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: Logits (N, C, *).
            target: (N, C, *); or labels (N, *) or (N, 1, *) if C > 1; or (N, *) if C is 1.

        Raises:
            ValueError: The shapes do not fit, or the target has a value outside its classes.
        """
        read = self.target.read(output, target, "classes")
        entropy = F.binary_cross_entropy_with_logits(read.output, read.target, reduction="none")
        return mean(entropy, read.valid) + self.alpha * (1 - _dice(_normalized(read, "sigmoid"), read).mean())


class GeneralizedDiceLoss(nn.Module):
    """1 - 2 sum_c w_c sum p_c t_c / sum_c w_c sum (p_c + t_c) with w_c = 1 / (sum t_c)^2.

    Sudre et al. 2017, arXiv:1707.03237, section 2.1; small classes weigh as much as large ones. One channel counts as
    two classes, p and 1 - p. All w are divided by the largest, which changes nothing but that large volumes count in
    full: pytorch-3dunet's lower bound of 1e-6 for the denominator acts from about 2e6 voxels of a class on.

    Edge cases: a class that the targets of the batch do not have weighs as much as the smallest that they do have, as
    in MONAI (batch=True): predicting it costs something, and the other classes still count. In pytorch-3dunet it weighs
    1e6, so that the loss is 1 and the gradients vanish. If nothing counts, the loss is 1, with gradients of 0.

    Args:
        normalization: sigmoid (of each channel), softmax (over the channels) or none (the output is p).
        ignore_index: The value of the target that does not count. Default: everything counts.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *).

    Raises:
        ValueError: The normalization is unknown.
    """

    def __init__(
        self,
        normalization: Normalization = "sigmoid",
        ignore_index: int | None = None,
        skip_last_target: bool = False,
        squeeze_channel: bool = False,
    ) -> None:
        super().__init__()
        self.normalization = _known(normalization)
        self.target = TargetReader(ignore_index, skip_last_target, squeeze_channel)

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        self.target.check(output, target, "classes")

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: (N, C, *).
            target: (N, C, *); or labels (N, *) or (N, 1, *) if C > 1; or (N, *) if C is 1.

        Raises:
            ValueError: The shapes do not fit, or the target has a value outside its classes.
        """
        read = self.target.read(output, target, "classes")
        p, t = _normalized(read, self.normalization), read.target
        if p.shape[1] == 1:
            counted = torch.ones_like(p) if read.valid is None else read.valid
            p, t = torch.cat((p, counted - p), dim=1), torch.cat((t, counted - t), dim=1)
        sizes = _sums(t)
        weight = _inverse_squares(sizes)
        overlap, union = (weight * _sums(p * t)).sum(), (weight * (_sums(p) + sizes)).sum()
        return 1 - 2 * overlap / union.clamp(min=1e-6)


def _known(normalization: str) -> str:
    if normalization not in ("sigmoid", "softmax", "none"):
        raise ValueError(f"normalization is {normalization!r}; possible: sigmoid, softmax, none")
    return normalization


def _normalized(read: Read, normalization: str) -> Tensor:
    """p, and 0 where nothing counts."""
    if normalization == "softmax" and read.output.shape[1] == 1:
        raise ValueError("the softmax of one channel is always 1; use normalization: sigmoid")
    p = read.output
    if normalization != "none":
        p = p.sigmoid() if normalization == "sigmoid" else p.softmax(dim=1)
    return p if read.valid is None else p * read.valid


def _sums(values: Tensor) -> Tensor:
    """(N, C, *) -> (C,)."""
    return values.sum(dim=[0, *range(2, values.dim())])


def _dice(p: Tensor, read: Read) -> Tensor:
    """d_c, (C,)."""
    return 2 * _sums(p * read.target) / (_sums(p * p) + _sums(read.target * read.target)).clamp(min=1e-6)


def _inverse_squares(sizes: Tensor) -> Tensor:
    """1 / sizes^2, divided by the largest of them; 1 where the size is 0."""
    smallest = sizes.where(sizes > 0, torch.inf).min()
    smallest = smallest.where(smallest.isfinite(), 1.0)
    return (smallest / sizes.maximum(smallest)) ** 2
