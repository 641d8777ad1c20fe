"""Metrics of segmented classes: IoU, Dice, precision, recall, accuracy.

Outputs are logits (N, C, *), targets labels (N, *) or (N, 1, *) or channels (N, C, *), * any spatial dimensions. Class
c is channel c, and element c of a vector is class c. One channel is the foreground alone: it is the only class, unless
num_classes is 2; then class 0 is the background. With activation 'sigmoid', several channels are independent of one
another, each counted above the threshold.

Of a class: B = voxels in both prediction and target, P = in the prediction, T = in the target. They are summed over
all samples of all ranks before a score is computed (aggregation 'global'), so that batches and ranks change nothing.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from dtrain.components.losses.targets import main_of
from dtrain.components.metrics.reading import Activation, ClassReader, known, main_logits, probabilities, summed, wide

Aggregation = Literal["global", "sample"]
Absent = Literal["zero", "skip", "one"]


class _Overlap(Metric):
    """Scores of B, P and T, or of what stands in their place; 1 is best."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    totals: Tensor

    def __init__(
        self,
        reader: ClassReader,
        aggregation: str = "global",
        include_background: bool = True,
        per_class: bool = False,
        absent: str = "zero",
    ) -> None:
        super().__init__()
        self.reader, self.per_class, self.include_background = reader, per_class, include_background
        self.absent = known(absent, "absent", Absent)
        self.aggregation = known(aggregation, "aggregation", Aggregation)
        # A zero of no dimension: the number of classes is seen in the first batch, and 0 + x has x's shape and type.
        self.add_state("totals", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch: output (N, C, *), target (N, *), (N, 1, *) or (N, C, *)."""
        counts = self._counts(output, target)
        self.totals = self.totals + (counts.sum(0) if self.aggregation == "global" else summed(self._scores(counts)))

    def compute(self) -> Tensor:
        """The mean over the classes, or with per_class a vector of them; nan where nothing was to be measured."""
        if self.totals.dim() == 0:
            return torch.tensor(torch.nan)
        of_set = self.aggregation == "global"
        scores = self._scores(self.totals) if of_set else self.totals[:, 0] / self.totals[:, 1]
        return scores if self.per_class else scores[0]

    def _counts(self, output: Any, target: Any) -> Tensor:
        """(N, C, 3)."""
        return self.reader.counts(output, target)

    def _scores(self, counts: Tensor) -> Tensor:
        """Each class's score, or as one element their mean: (..., C, 3) -> (..., C) or (..., 1)."""
        scores = self._score(*wide(counts).unbind(dim=-1))
        if scores.shape[-1] > 1 and not self.include_background:
            scores[..., 0] = torch.nan
        return scores if self.per_class else scores.nanmean(dim=-1, keepdim=True)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        """The score of B, P and T; nan where a class is to be left out."""
        raise NotImplementedError

    def _with_absent(self, scores: Tensor, found: Tensor, there: Tensor) -> Tensor:
        """The scores, with what `absent` says of a class that the target lacks; its score is 0 if it is predicted."""
        if self.absent == "skip":
            return scores.where(there > 0, torch.nan)
        return scores.where(found + there > 0, 1.0 if self.absent == "one" else torch.nan)


class MeanIoU(_Overlap):
    """Mean over the classes of B / (P + T - B), the intersection over union (Jaccard index).

    aggregation 'global': B, P and T of the whole data set, one confusion matrix: the mIoU of the usual benchmarks
    (Pascal VOC, Cityscapes), equal to torchmetrics' JaccardIndex(average='macro') where all classes occur. 'sample':
    the mean over the samples of each sample's mean, as in pytorch-3dunet, MONAI and torchmetrics.segmentation.

    A class that the target lacks, of the set or of the sample, is judged in one of three ways (`absent`): 'zero': it
    counts as 0 if it is predicted, and is left out if not; 'skip': it is left out, predicted or not (MONAI, with its
    ignore_empty); 'one': it counts as 0 if it is predicted, and as 1 if not (pytorch-3dunet, and MONAI with
    ignore_empty=False). JaccardIndex counts it as 0. A sample without any class to measure is left out.

    Args:
        num_classes: The number of channels, or 2 for one channel with the background as a class. Default: as found.
        include_background: Whether class 0 counts. One channel alone always does.
        skip_background: pytorch-3dunet's word for the opposite; either may be given.
        ignore_index: The target's value that does not count. Default: everything counts.
        aggregation: global or sample.
        per_class: A vector with nan for classes left out; with 'sample', each class's mean over its samples.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which a channel that stands for itself is there.
        absent: zero, skip or one: what becomes of a class that the target lacks, see above.

    Raises:
        ValueError: An argument is none of the possible ones, or two contradict one another.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        include_background: bool | None = None,
        skip_background: bool | None = None,
        ignore_index: int | None = None,
        aggregation: Aggregation = "global",
        per_class: bool = False,
        activation: Activation = "auto",
        threshold: float = 0.5,
        absent: Absent = "zero",
    ) -> None:
        if include_background is None:
            include_background = not skip_background
        elif skip_background is include_background:
            raise ValueError(f"include_background and skip_background are both {include_background}; give one of them")
        reader = ClassReader(num_classes, activation, threshold, ignore_index)
        super().__init__(reader, aggregation, include_background, per_class, absent)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return self._with_absent(both / (found + there - both), found, there)


class BinaryIoU(_Overlap):
    """B / (P + T - B) of the foreground, over the whole data set: the boundary IoU, if boundaries are the foreground.

    Of two channels, the second one's softmax is compared with the threshold. Not to be confused with the 'Boundary IoU'
    of Cheng et al. 2021 (arXiv:2103.16562), which measures only a rim of each mask. nan if there is no foreground in
    either prediction or target.

    Args:
        threshold: Probability above which a voxel is foreground.
        ignore_index: The target's value that does not count. Default: everything counts.
        activation: auto (sigmoid for one channel, softmax for two), softmax, sigmoid or none.

    Raises:
        ValueError: The threshold or the activation is impossible.
    """

    def __init__(
        self, threshold: float = 0.5, ignore_index: int | None = None, activation: Activation = "auto"
    ) -> None:
        super().__init__(ClassReader(None, "none", threshold, ignore_index))
        self.activation = known(activation, "activation", Activation)

    def _counts(self, output: Any, target: Any) -> Tensor:
        output, target = main_logits(output), main_of(target)
        if output.shape[1] > 2:
            text = "expected 1 or 2; for more use MeanIoU with per_class: true"
            raise ValueError(f"found an output of {output.shape[1]} channels; {text}")
        foreground = probabilities(output, self.activation)[:, -1:]
        return self.reader.counts(foreground, target[:, -1:] if target.shape == output.shape else target)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return both / (found + there - both)


class DiceCoefficient(_Overlap):
    """Mean over the classes of the Dice coefficient, soft or hard.

    soft: 2 sum p t / max(sum p^2 + sum t^2, epsilon), p the probabilities, t the target (Milletari et al. 2016,
    arXiv:1606.04797): 1 - DiceLoss, and pytorch-3dunet's metric of the same name. hard (soft: false): 2 B / (P + T),
    the F1 score of voxels, as torchmetrics' DiceScore. The soft one also moves with how sure the model is.

    aggregation 'global': sums over the whole data set (pytorch-3dunet: the mean over batches of each batch's).
    'sample': the mean over the samples of each sample's mean, as in MONAI's DiceMetric.

    A class that the target lacks, in the set or in the sample, is judged as in MeanIoU (`absent`). For 'zero' and 'one'
    the soft one counts it as 0, since p is never 0, so its default is 'skip'; that of the hard one is 'zero'. In MONAI
    it is 'skip', or 'one' with ignore_empty=False; pytorch-3dunet counts such a class as 0, which is 'zero'.

    Args:
        soft: Whether of probabilities, or of classes.
        epsilon: Least denominator of the soft one.
        num_classes: The number of channels, or (hard) 2 for one channel with the background as a class.
        include_background: Whether class 0 counts. One channel alone always does.
        ignore_index: The target's value that does not count. Default: everything counts.
        aggregation: global or sample.
        per_class: A vector with nan for classes left out.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which (hard) a channel that stands for itself is there.
        absent: zero, skip or one: what becomes of a class that the target lacks. Default: skip if soft, zero if hard.

    Raises:
        ValueError: An argument is none of the possible ones.
    """

    def __init__(
        self,
        soft: bool = True,
        epsilon: float = 1e-6,
        num_classes: int | None = None,
        include_background: bool = True,
        ignore_index: int | None = None,
        aggregation: Aggregation = "global",
        per_class: bool = False,
        activation: Activation = "auto",
        threshold: float = 0.5,
        absent: Absent | None = None,
    ) -> None:
        reader = ClassReader(num_classes, activation, threshold, ignore_index)
        super().__init__(reader, aggregation, include_background, per_class, absent or ("skip" if soft else "zero"))
        self.soft, self.epsilon = soft, epsilon

    def _counts(self, output: Any, target: Any) -> Tensor:
        return (self.reader.soft_sums if self.soft else self.reader.counts)(output, target)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        whole = (found + there).clamp(min=self.epsilon) if self.soft else found + there
        return self._with_absent(2 * both / whole, found, there)


class _Foreground(_Overlap):
    """A score of classes 1 to C - 1 with something added to numerator and denominator."""

    def __init__(
        self,
        smooth: float,
        num_classes: int | None,
        ignore_index: int | None,
        activation: str,
        threshold: float,
        per_class: bool,
    ) -> None:
        reader = ClassReader(num_classes, activation, threshold, ignore_index)
        super().__init__(reader, include_background=False, per_class=per_class)
        self.smooth = smooth


class DSC(_Foreground):
    """Mean over the foreground classes that the target has of (2 B + smooth) / (P + T + smooth).

    Hard Dice over the whole data set, the classes 1 to C - 1. Classes that the target does not have are left out, also
    if they are predicted; nan if there is none.

    Args:
        smooth: Added to numerator and denominator.
        num_classes: The number of channels. Default: as found.
        ignore_index: The target's value that does not count. Default: everything counts.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which a channel that stands for itself is there.
        per_class: A vector with nan for classes left out, class 0 too.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        activation: Activation = "auto",
        threshold: float = 0.5,
        per_class: bool = False,
    ) -> None:
        super().__init__(smooth, num_classes, ignore_index, activation, threshold, per_class)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return ((2 * both + self.smooth) / (found + there + self.smooth)).where(there > 0, torch.nan)


class SEN(_Foreground):
    """Mean over the foreground classes that the target has of (B + smooth) / (T + smooth): sensitivity, recall.

    Over the whole data set, the classes 1 to C - 1; nan if the target has none of them.

    Args:
        smooth: Added to numerator and denominator; 1 hardly matters in a volume, but flatters tiny objects.
        num_classes: The number of channels. Default: as found.
        ignore_index: The target's value that does not count. Default: everything counts.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which a channel that stands for itself is there.
        per_class: A vector with nan for classes left out, class 0 too.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    def __init__(
        self,
        smooth: float = 1.0,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        activation: Activation = "auto",
        threshold: float = 0.5,
        per_class: bool = False,
    ) -> None:
        super().__init__(smooth, num_classes, ignore_index, activation, threshold, per_class)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return ((both + self.smooth) / (there + self.smooth)).where(there > 0, torch.nan)


class PPV(_Foreground):
    """Mean over the foreground classes that are predicted of (B + smooth) / (P + smooth): precision.

    Over the whole data set, the classes 1 to C - 1; nan if none of them is predicted. A class that is there but never
    predicted does not lower it; in MacroPrecision it does.

    Args:
        smooth: Added to numerator and denominator; 1 hardly matters in a volume, but flatters tiny objects.
        num_classes: The number of channels. Default: as found.
        ignore_index: The target's value that does not count. Default: everything counts.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which a channel that stands for itself is there.
        per_class: A vector with nan for classes left out, class 0 too.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    def __init__(
        self,
        smooth: float = 1.0,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        activation: Activation = "auto",
        threshold: float = 0.5,
        per_class: bool = False,
    ) -> None:
        super().__init__(smooth, num_classes, ignore_index, activation, threshold, per_class)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return ((both + self.smooth) / (found + self.smooth)).where(found > 0, torch.nan)


class MacroPrecision(_Overlap):
    """Mean over the classes of B / P, over the whole data set: true precision, each class counting alike.

    Equal to torchmetrics' Precision(task='multiclass', average='macro'), for targets of every shape. A class that is
    there but never predicted counts as 0; one that is in neither prediction nor target is left out. What older configs
    of this trainer's ancestor call Precision was the share of right voxels: PixelAccuracy.

    Args:
        num_classes: The number of channels, or 2 for one channel with the background as a class. Default: as found.
        include_background: Whether class 0 counts. One channel alone always does.
        ignore_index: The target's value that does not count. Default: everything counts.
        per_class: A vector with nan for classes left out.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.
        threshold: Probability above which a channel that stands for itself is there.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        include_background: bool = True,
        ignore_index: int | None = None,
        per_class: bool = False,
        activation: Activation = "auto",
        threshold: float = 0.5,
    ) -> None:
        reader = ClassReader(num_classes, activation, threshold, ignore_index)
        super().__init__(reader, include_background=include_background, per_class=per_class)

    def _score(self, both: Tensor, found: Tensor, there: Tensor) -> Tensor:
        return (both / found.clamp(min=1)).where(found + there > 0, torch.nan)


class PixelAccuracy(_Overlap):
    """Share of right elements among all that count, over the whole data set; no class of its own counts more.

    What this trainer's ancestor calls Precision: argmax over `dim` compared with the target. Equal to torchmetrics'
    Accuracy(task='multiclass', average='micro'). Of one channel, voxels above the threshold are class 1, others are
    class 0. nan if nothing counts.

    Args:
        dim: The output's dimension of classes. The target has the others, or 1 there, or all (one-hot).
        ignore_index: The target's value that does not count. Default: everything counts.
        activation: For one channel: auto (sigmoid), sigmoid or none; of several, the largest is the class.
        threshold: For one channel.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    def __init__(
        self,
        dim: int = 1,
        ignore_index: int | None = None,
        activation: Activation = "auto",
        threshold: float = 0.5,
    ) -> None:
        super().__init__(ClassReader(None, "none", threshold, ignore_index))
        self.reader_of_one = ClassReader(2, activation, threshold, ignore_index)
        self.dim = dim

    def _counts(self, output: Any, target: Any) -> Tensor:
        output, target = main_logits(output), main_of(target)
        if target.dim() == output.dim():
            target = target.movedim(self.dim, 1)
        output = output.movedim(self.dim, 1)
        return (self.reader_of_one if output.shape[1] == 1 else self.reader).counts(output, target)

    def _scores(self, counts: Tensor) -> Tensor:
        right, _, counted = wide(counts).sum(dim=-2, keepdim=True).unbind(dim=-1)
        return right / counted
