"""Metrics of instances, such as cells: adapted Rand error and average precision.

Outputs are logits (N, C, *); one channel of them is compared with a threshold, and the connected components are the
instances found. Targets hold the number of each voxel's instance: (N, *), (N, 1, *), or (N, K, *) with the instances in
one of K channels. They are compared on the CPU, sample by sample: a patch cuts instances at its rim, so whole images or
volumes give truer figures. All are the mean over the samples of each sample's value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from dtrain.components.losses.targets import main_of, other_than, outside, precise
from dtrain.components.metrics.reading import Activation, known, probabilities, probability, summed

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


class Overlaps(NamedTuple):
    """How two partitions of the same voxels overlap; only pairs with a voxel in common are listed."""

    truth: np.ndarray  # number of the true instance of each pair, an index of truth_labels
    found: np.ndarray  # the same of the instance found
    both: np.ndarray  # how many voxels the pair has in common
    truth_labels: np.ndarray
    found_labels: np.ndarray

    @property
    def truth_sizes(self) -> np.ndarray:
        """Voxels of each true instance."""
        return np.bincount(self.truth, self.both, len(self.truth_labels))

    @property
    def found_sizes(self) -> np.ndarray:
        """Voxels of each instance found."""
        return np.bincount(self.found, self.both, len(self.found_labels))


def overlaps(truth: np.ndarray, found: np.ndarray) -> Overlaps:
    """The overlaps of two arrays of labels of the same shape."""
    truth_labels, of_truth = np.unique(truth, return_inverse=True)
    found_labels, of_found = np.unique(found, return_inverse=True)
    pairs, both = np.unique(of_truth.ravel() * max(1, len(found_labels)) + of_found.ravel(), return_counts=True)
    rows, columns = np.divmod(pairs, max(1, len(found_labels)))
    return Overlaps(rows, columns, both, truth_labels, found_labels)


def adapted_rand_error(truth: np.ndarray, found: np.ndarray, background: int | None = 0) -> float:
    """1 - 2 sum p_ij^2 / (sum a_i^2 + sum b_j^2), pairs of a voxel with itself left out.

    p_ij = voxels of both the true instance i and the found one j, a and b their sums over j and i. Arganda-Carreras et
    al. 2015 (SNEMI3D), doi:10.3389/fnana.2015.00142, as skimage.metrics.adapted_rand_error computes it.

    Args:
        truth: Labels, any shape.
        found: Labels of the same shape; each label, 0 too, is a segment.
        background: Voxels with this true label do not count. None: all do.

    Returns:
        0 if they agree but for the numbers, 1 at worst; nan if no two voxels that count belong together in either.
    """
    if background is not None:
        truth, found = truth[truth != background], found[truth != background]
    table = overlaps(truth, found)
    parts = (table.both.astype(float), table.truth_sizes, table.found_sizes)
    both, of_truth, of_found = (float(part @ part - part.sum()) for part in parts)
    return 1 - 2 * both / (of_truth + of_found) if of_truth + of_found else np.nan


def average_precision(
    truth: np.ndarray,
    found: np.ndarray,
    background: int | None = 0,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    min_instance_size: int = 0,
) -> float:
    """Mean over the IoU thresholds of TP / (TP + FP + FN): the score of the Data Science Bowl 2018.

    TP = pairs whose intersection over union is greater than the threshold; from 0.5 on no instance is in two of them.
    FP = instances found, FN = true instances, that are in no pair. Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7.

    Args:
        truth: Labels, any shape.
        found: Labels of the same shape, 0 is their background.
        background: The true label that is not an instance. None: all are.
        iou_thresholds: From 0.5 to below 1.
        min_instance_size: Smaller instances, in voxels, count in neither.

    Returns:
        0 to 1; 0 if instances are there but none is found, or the reverse; nan if there are none in either.
    """
    table = overlaps(truth, found)
    truth_sizes, found_sizes = table.truth_sizes, table.found_sizes
    of_truth, of_found = truth_sizes >= max(1, min_instance_size), found_sizes >= max(1, min_instance_size)
    of_found &= table.found_labels != 0
    if background is not None:
        of_truth &= table.truth_labels != background
    total = int(of_truth.sum() + of_found.sum())
    if not total:
        return np.nan
    pairs = of_truth[table.truth] & of_found[table.found]
    both = table.both[pairs]
    ious = both / (truth_sizes[table.truth[pairs]] + found_sizes[table.found[pairs]] - both)
    matched = [int((ious > threshold).sum()) for threshold in iou_thresholds]
    return float(np.mean([number / (total - number) for number in matched]))


@dataclass(frozen=True)
class InstanceReader:
    """How instances are made of outputs and read from targets.

    Args:
        thresholds: A partition is made with each. None: the output's channel holds labels.
        input_channel: Which of the output's channels. None: its only one.
        boundary: The channel is high between the instances, not within them.
        use_last_target: Of several channels of the target the last one holds the instances, else the first one.
        ignore_index: Voxels with this target do not count.
        activation: As in the other metrics.

    Raises:
        ValueError: A threshold or the activation is impossible.
    """

    thresholds: Sequence[float] | None
    input_channel: int | None
    boundary: bool
    use_last_target: bool
    ignore_index: int | None
    activation: str

    def __post_init__(self) -> None:
        known(self.activation, "activation", Activation)
        if self.thresholds is not None and not self.thresholds:
            raise ValueError("thresholds is empty; expected one probability at least")
        for threshold in self.thresholds or ():
            probability(threshold)

    def samples(
        self, output: Any, target: Any, background: int | None
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """For each sample: the true labels of the voxels that count, and those found with each threshold.

        Raises:
            ValueError: The shapes do not fit, several channels leave open which is meant, or a label is negative or
                a fraction.
        """
        output, target = precise(main_of(output)), main_of(target)
        if self.thresholds is None and output.shape == target.shape and not output.is_floating_point():
            output = output.unsqueeze(1)
        if output.dim() < 4:
            text = "expected (N, C, H, W) or (N, C, D, H, W); for classification use torchmetrics.AveragePrecision"
            raise ValueError(f"found an output of shape {tuple(output.shape)}, which has no instances; {text}")
        values = self._values(output)
        if target.dim() == output.dim():
            target = target[:, -1 if self.use_last_target else 0]
        if target.shape != values.shape:
            expected = f"instances of shape {tuple(values.shape)}, or (N, K, *)"
            raise ValueError(f"found a target of shape {tuple(target.shape)}; expected {expected}")
        _refuse_no_instances(target, {self.ignore_index, background} - {None})
        truths = target.long().cpu().numpy()
        for truth, value in zip(truths, values.cpu().numpy(), strict=True):
            found = self._instances(value)
            if self.ignore_index is not None:
                counts = truth != self.ignore_index
                truth, found = truth[counts], [labels[counts] for labels in found]
            yield truth, found

    def _values(self, output: Tensor) -> Tensor:
        """The probabilities or labels of the channel that is meant, (N, *)."""
        channels = output.shape[1]
        if self.input_channel is None and channels > 1:
            raise ValueError(f"the output has {channels} channels; say which one is meant with input_channel")
        if not -channels <= (self.input_channel or 0) < channels:
            raise ValueError(f"input_channel is {self.input_channel}, but the output has {channels} channel(s)")
        of_all = output if self.thresholds is None else probabilities(output, self.activation)
        return of_all[:, self.input_channel or 0]

    def _instances(self, value: np.ndarray) -> list[np.ndarray]:
        if self.thresholds is None:
            return [value.astype(np.int64)]
        masks = [value > threshold for threshold in self.thresholds]
        return [components(~mask if self.boundary else mask) for mask in masks]


def _refuse_no_instances(target: Tensor, possible: set[Any]) -> None:
    """Instances are whole numbers from 0 on, and what is ignored or background."""
    wrong = (target < 0) | (target != target.round()) if target.is_floating_point() else target < 0
    for value in possible:
        wrong &= other_than(target, value)
    if bool(wrong.any()):
        raise outside(target, wrong, "label", "the numbers of instances, from 0 on, or an ignore_index")


def components(mask: np.ndarray) -> np.ndarray:
    """Numbers, from 1 on, of the parts of a mask that hang together by the faces of their voxels; 0 elsewhere.

    Raises:
        ModuleNotFoundError: scipy is missing.
    """
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("metrics of instances need scipy: pip install scipy") from error
    labels, _ = ndimage.label(mask)
    return labels


class _OfInstances(Metric):
    """The mean over samples of a value of two partitions."""

    is_differentiable = False
    full_state_update = False
    totals: Tensor

    def __init__(self, reader: InstanceReader, background: int | None) -> None:
        super().__init__()
        self.reader, self.background = reader, background
        self.add_state("totals", torch.zeros(1, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch: output (N, C, *), target (N, *), (N, 1, *) or (N, K, *)."""
        best = np.max if self.higher_is_better else np.min
        values = [
            best([self._value(truth, found) for found in partitions])
            for truth, partitions in self.reader.samples(output, target, self.background)
        ]
        self.totals = self.totals + summed(torch.tensor(values, dtype=torch.float32)[:, None].to(self.totals.device))

    def compute(self) -> Tensor:
        """The mean over the samples that have anything to compare; nan if none has."""
        return self.totals[0, 0] / self.totals[0, 1]

    def _value(self, truth: np.ndarray, found: np.ndarray) -> float:
        raise NotImplementedError


class AdaptedRandError(_OfInstances):
    """Adapted Rand error of the connected components above a threshold: 0 is best, 1 worst. See adapted_rand_error.

    A sample in which nothing is to be compared (background only) is left out of the mean; in pytorch-3dunet it counts
    as 0, as does one with a single instance, which here has its value.

    Args:
        threshold: Probability above which a voxel belongs to an instance. None: the output holds labels already, as
            (N, 1, *), or (N, *) if they are whole numbers.
        input_channel: The output's channel, if it has several.
        background: Voxels with this true label do not count. None: all do.
        use_last_target: Of several channels of the target the last one holds the instances; false: the first one.
        ignore_index: Voxels with this target do not count. Default: all do.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.

    Raises:
        ValueError: The threshold or the activation is impossible.
    """

    higher_is_better = False

    def __init__(
        self,
        threshold: float | None = 0.5,
        input_channel: int | None = None,
        background: int | None = 0,
        use_last_target: bool = True,
        ignore_index: int | None = None,
        activation: Activation = "auto",
    ) -> None:
        thresholds = None if threshold is None else [threshold]
        reader = InstanceReader(thresholds, input_channel, False, use_last_target, ignore_index, activation)
        super().__init__(reader, background)

    def _value(self, truth: np.ndarray, found: np.ndarray) -> float:
        return adapted_rand_error(truth, found, self.background)


class BoundaryAdaptedRandError(_OfInstances):
    """Adapted Rand error of the parts between predicted boundaries: 0 is best. See AdaptedRandError.

    pytorch-3dunet's metric of this name takes the best of the thresholds 0.3, 0.4, 0.5 and 0.6 for each sample, which
    nobody can who does not know the truth; so its figures are too good. Here that is done only with `thresholds`.

    Args:
        threshold: Probability above which a voxel is boundary.
        thresholds: The best of these for each sample, instead: optimistic. Default: `threshold` alone.
        input_channel: The output's channel, if it has several.
        invert_pmaps: Whether the channel is of boundaries; false: of the insides.
        background: Voxels with this true label do not count. None: all do.
        use_last_target: Of several channels of the target the last one holds the instances; false: the first one.
        ignore_index: Voxels with this target do not count. Default: all do.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.

    Raises:
        ValueError: A threshold or the activation is impossible.
    """

    higher_is_better = False

    def __init__(
        self,
        threshold: float = 0.5,
        thresholds: list[float] | None = None,
        input_channel: int | None = None,
        invert_pmaps: bool = True,
        background: int | None = 0,
        use_last_target: bool = True,
        ignore_index: int | None = None,
        activation: Activation = "auto",
    ) -> None:
        chosen = [threshold] if thresholds is None else thresholds
        reader = InstanceReader(chosen, input_channel, invert_pmaps, use_last_target, ignore_index, activation)
        super().__init__(reader, background)

    def _value(self, truth: np.ndarray, found: np.ndarray) -> float:
        return adapted_rand_error(truth, found, self.background)


class AveragePrecision(_OfInstances):
    """Average precision of instances (Data Science Bowl 2018): 1 is best. See average_precision.

    Not the area under a precision-recall curve, which is torchmetrics.AveragePrecision. A sample with instances in
    neither target nor prediction is left out of the mean; in pytorch-3dunet it counts as 0. Nor is the smallest label
    dropped as background, as there: which one is, is said.

    Args:
        threshold: Probability above which a voxel belongs to an instance. None: the output holds labels already, as
            (N, 1, *), or (N, *) if they are whole numbers, with 0 as background.
        input_channel: The output's channel, if it has several.
        background: The true label that is not an instance. None: all are.
        iou_thresholds: Default: 0.50, 0.55, ..., 0.95. [0.5] gives TP / (TP + FP + FN) at this IoU alone.
        min_instance_size: Smaller instances, in voxels, count in neither. Default: all count.
        use_last_target: Of several channels of the target the last one holds the instances; false: the first one.
        ignore_index: Voxels with this target do not count. Default: all do.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.

    Raises:
        ValueError: A threshold or the activation is impossible.
    """

    higher_is_better = True

    def __init__(
        self,
        threshold: float | None = 0.5,
        input_channel: int | None = None,
        background: int | None = 0,
        iou_thresholds: list[float] | None = None,
        min_instance_size: int | None = None,
        use_last_target: bool = True,
        ignore_index: int | None = None,
        activation: Activation = "auto",
    ) -> None:
        thresholds = None if threshold is None else [threshold]
        reader = InstanceReader(thresholds, input_channel, False, use_last_target, ignore_index, activation)
        super().__init__(reader, background)
        self.iou_thresholds, self.min_instance_size = _from_half(iou_thresholds), min_instance_size or 0

    def _value(self, truth: np.ndarray, found: np.ndarray) -> float:
        return average_precision(truth, found, self.background, self.iou_thresholds, self.min_instance_size)


class BoundaryAveragePrecision(_OfInstances):
    """Average precision of the instances between predicted boundaries: 1 is best. See AveragePrecision.

    pytorch-3dunet's metric of this name takes the best of the thresholds 0.3, 0.4, 0.5 and 0.6 for each sample, which
    nobody can who does not know the truth; so its figures are too good. Here that is done only with `thresholds`.

    Args:
        threshold: Probability above which a voxel is boundary.
        thresholds: The best of these for each sample, instead: optimistic. Default: `threshold` alone.
        input_channel: The output's channel, if it has several.
        invert_pmaps: Whether the channel is of boundaries; false: of the insides.
        background: The true label that is not an instance. None: all are.
        iou_thresholds: Default: 0.50, 0.55, ..., 0.95.
        min_instance_size: Smaller instances, in voxels, count in neither. Default: all count.
        use_last_target: Of several channels of the target the last one holds the instances; false: the first one.
        ignore_index: Voxels with this target do not count. Default: all do.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.

    Raises:
        ValueError: A threshold or the activation is impossible.
    """

    higher_is_better = True

    def __init__(
        self,
        threshold: float = 0.5,
        thresholds: list[float] | None = None,
        input_channel: int | None = None,
        invert_pmaps: bool = True,
        background: int | None = 0,
        iou_thresholds: list[float] | None = None,
        min_instance_size: int | None = None,
        use_last_target: bool = True,
        ignore_index: int | None = None,
        activation: Activation = "auto",
    ) -> None:
        chosen = [threshold] if thresholds is None else thresholds
        reader = InstanceReader(chosen, input_channel, invert_pmaps, use_last_target, ignore_index, activation)
        super().__init__(reader, background)
        self.iou_thresholds, self.min_instance_size = _from_half(iou_thresholds), min_instance_size or 0

    def _value(self, truth: np.ndarray, found: np.ndarray) -> float:
        return average_precision(truth, found, self.background, self.iou_thresholds, self.min_instance_size)


def _from_half(thresholds: list[float] | None) -> tuple[float, ...]:
    """The IoU thresholds, none of which lets an instance match two others."""
    chosen = IOU_THRESHOLDS if thresholds is None else tuple(thresholds)
    if not chosen or not all(0.5 <= value < 1 for value in chosen):
        raise ValueError(f"iou_thresholds are {list(chosen)}; expected numbers from 0.5 to below 1")
    return chosen
