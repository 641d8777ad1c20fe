"""Cross entropies that take targets of any usual shape.

Shapes: N samples, C classes, any spatial dimensions *.
p = softmax(output) over the classes; v is a voxel, y its label.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.losses.targets import TargetReader, as_label, class_weights, main_of, precise, weights_for

_NEVER = -100  # what torch ignores unless told otherwise; no label is negative


class CrossEntropyLossSq(nn.Module):
    """Cross entropy of the first of several outputs and the first of several targets.

    sum_v -w[y_v] log p_v[y_v] / sum_v w[y_v] over the voxels v whose label is not `ignore_index`: torch's
    CrossEntropyLoss, but 0 instead of NaN if nothing counts. "Sq" stands for sequence: of a list or tuple the element
    `index` counts, of a dict the entry of that name, or 'out' or 'logits'. A tensor is taken as it is, never indexed.

    Labels are (N, *) or (N, 1, *), of any type; floating point in the output's shape are probabilities, whole numbers
    in the output's shape one-hot. As soon as there are weights or ignored voxels, this is not a mean over samples: the
    mean of two batches' losses is not the loss of both.

    Args:
        weight: Weight of each class. Default: 1.
        ignore_index: The label that does not count. None: every label does.
        label_smoothing: e, 0 to 1: a voxel's target is 1 - e + e / C for its label and e / C for the other classes;
            Szegedy et al. 2016, arXiv:1512.00567.
        index: Which output and which target of several; a number for a sequence, a text for a mapping.

    Raises:
        ValueError: The weights are not a list of numbers, none negative, not all 0.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        index: int | str = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; possible: 0 to 1")
        self.register_buffer("weight", class_weights(weight))
        self.ignored = ignore_index
        self.ignore_index = _NEVER if ignore_index is None else ignore_index
        self.label_smoothing, self.index = label_smoothing, index

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        as_label(main_of(target, self.index), main_of(output, self.index), self.ignored)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: Logits (N, C, *), or a sequence or mapping of such.
            target: Labels or probabilities, or a sequence or mapping of such; see `as_label`.

        Raises:
            ValueError: The shapes do not fit, there is no such element, C is 1, or a label is none of the classes.
        """
        logits = precise(main_of(output, self.index))
        label = as_label(main_of(target, self.index), logits, self.ignored)
        return _cross_entropy(logits, label, weights_for(logits, self.weight), self.ignore_index, self.label_smoothing)


class WeightedCrossEntropyLoss(nn.Module):
    """Cross entropy in which a class weighs the more, the less of it is predicted.

    sum_v -w[y_v] log p_v[y_v] / sum_v w[y_v], w_c = sum_v (1 - p_v[c]) / sum_v p_v[c], the latter not differentiated.
    Sudre et al. 2017, arXiv:1707.03237, section 2.1. Unlike pytorch-3dunet's, the weights leave out ignored voxels too.

    No mean over samples, as the weights are the whole batch's. A class of which nothing is predicted weighs at most 1e6
    times the number of voxels. 0 if nothing counts.

    Args:
        ignore_index: The label that does not count. None: every label does.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *); labels (N, 1, *) are understood without as well.
    """

    def __init__(
        self, ignore_index: int | None = -100, skip_last_target: bool = False, squeeze_channel: bool = False
    ) -> None:
        super().__init__()
        self.ignored = ignore_index
        self.ignore_index = _NEVER if ignore_index is None else ignore_index
        self.target = TargetReader(None, skip_last_target, squeeze_channel)

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        as_label(self.target.cut(main_of(target)), main_of(output), self.ignored)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: Logits (N, C, *), C > 1.
            target: Labels (N, *) or (N, 1, *), or one-hot in the output's shape.

        Raises:
            ValueError: The shapes do not fit, the target is floating point in the output's shape, or a label is none
                of the classes.
        """
        logits = precise(main_of(output))
        label = as_label(self.target.cut(main_of(target)), logits, self.ignored)
        if label.is_floating_point():
            raise ValueError("WeightedCrossEntropyLoss needs labels; probabilities were found")
        weight = self._weights(logits.detach(), label != self.ignore_index)
        return _cross_entropy(logits, label, weight, self.ignore_index)

    @staticmethod
    def _weights(logits: Tensor, valid: Tensor) -> Tensor:
        predicted = (logits.softmax(dim=1) * valid.unsqueeze(1)).transpose(0, 1).flatten(1).sum(dim=1)
        return (valid.sum() - predicted) / predicted.clamp(min=1e-6)


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float = 0.0
) -> Tensor:
    """The mean over what counts, but 0, with gradients of 0, if nothing does."""
    if target.is_floating_point():
        return F.cross_entropy(logits, target, weight, label_smoothing=label_smoothing)
    total = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    valid = target != ignore_index
    if weight is None:
        return total / valid.sum().clamp(min=1)
    counted = (weight[target.where(valid, 0)] * valid).sum()
    return total / counted.clamp(min=torch.finfo(counted.dtype).tiny)
