"""One confusion matrix of a batch for all metrics of torchmetrics that count the same: each would make its own.

Their states become what their own `update` makes of them, integer by integer. What is not known for certain to be a
valid batch of theirs is left to them, with whatever they have to say about it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MOST_BINS = 1 << 12  # of a confusion matrix that is larger than the batch


class Family(NamedTuple):
    """What metrics have in common that want the same confusion matrix."""

    classes: int  # 0: of one output, with a threshold
    ignore_index: int | None
    threshold: float


class Batch:
    """Outputs and targets of one batch, as several metrics see them: what is made of them is made once."""

    def __init__(self, output: Any, target: Any) -> None:
        self.output, self.target = output, target
        self._made: dict[Any, Any] = {}

    def labels(self) -> Any:
        """The target, as integers where it has whole numbers, such as binary cross entropy has them."""
        return self._once("labels", self._whole)

    def confusion(self, family: Family) -> Tensor | None:
        """The confusion matrix (C, C) of target and prediction, int64; None where the metrics are to see themselves."""
        return self._once(family, lambda: _binary(self, family) if not family.classes else _multiclass(self, family))

    def largest(self) -> Tensor:
        """The largest channel of each voxel, flat; `argmax` gives the same in ten times the time (torch 2.13)."""
        return self._once("largest", lambda: self.output.max(dim=1).indices.flatten())

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _whole(self) -> Any:
        if not isinstance(self.target, Tensor) or not self.target.is_floating_point():
            return self.target
        labels = self.target.long()
        return labels if torch.equal(labels.to(self.target.dtype), self.target) else self.target


def family_of(metric: Any) -> Family | None:
    """That of a metric of torchmetrics; None where it counts anything else, or in a way of its own."""
    from torchmetrics.classification import stat_scores as scores
    from torchmetrics.classification.confusion_matrix import BinaryConfusionMatrix, MulticlassConfusionMatrix

    of_scores = scores.BinaryStatScores, scores.MulticlassStatScores
    owner = next((each for each in (*of_scores, BinaryConfusionMatrix, MulticlassConfusionMatrix)
                  if type(metric).update is each.update), None)  # fmt: skip
    if owner in of_scores:
        is_own = type(metric)._update_state is not scores._AbstractStatScores._update_state
        if is_own or metric.multidim_average != "global" or getattr(metric, "top_k", 1) != 1:
            return None
    classes, ignore_index = getattr(metric, "num_classes", 0), getattr(metric, "ignore_index", None)
    if owner is None or classes is None or not isinstance(ignore_index, int | None):
        return None
    is_binary = owner in (scores.BinaryStatScores, BinaryConfusionMatrix)
    return Family(0 if is_binary else classes, ignore_index, metric.threshold if is_binary else 0.0)


def take_in(metric: Any, family: Family, confusion: Tensor) -> None:
    """Add a batch's confusion matrix to a metric's states, as its `update` would."""
    metric._computed = None
    metric._update_count += 1
    if hasattr(metric, "confmat"):
        metric.confmat += confusion
        return
    hits, seen = confusion.diag(), confusion.sum()
    if not family.classes:
        (tn, fp), (fn, tp) = confusion
    elif metric.average == "micro":
        tp = hits.sum()
        fp = fn = seen - tp
        tn = family.classes * seen - (fp + fn + tp)
    else:
        tp, fp, fn = hits, confusion.sum(0) - hits, confusion.sum(1) - hits
        tn = seen - (fp + fn + tp)
    metric._update_state(tp, fp, tn, fn)


def _multiclass(batch: Batch, family: Family) -> Tensor | None:
    output, target, classes = batch.output, batch.labels(), family.classes
    if not _is_scores(output) or not _is_labels(target) or classes**2 > max(target.numel(), MOST_BINS):
        return None
    if output.shape[1:2] != (classes,) or (*output.shape[:1], *output.shape[2:]) != tuple(target.shape):
        return None
    return _counted(target.flatten(), batch.largest, classes, family.ignore_index)


def _binary(batch: Batch, family: Family) -> Tensor | None:
    output, target = batch.output, batch.labels()
    if not _is_scores(output) or not _is_labels(target) or output.shape != target.shape:
        return None
    low, high = map(float, output.aminmax())
    if math.isnan(low):
        return None
    is_logits = low < 0 or high > 1
    if is_logits and family.ignore_index is not None:
        low, high = map(float, output.masked_fill(target == family.ignore_index, 0.5).aminmax())
        if low >= 0 and high <= 1:  # some of these metrics take what is ignored for logits, and some do not
            return None

    def found() -> Tensor:
        return ((output.sigmoid() if is_logits else output) > family.threshold).flatten()

    return _counted(target.flatten(), found, 2, family.ignore_index)


def _counted(target: Tensor, found: Any, classes: int, ignore_index: int | None) -> Tensor | None:
    """The confusion matrix, or None where a label is none of the classes."""
    ignored = None if ignore_index is None else target == ignore_index
    labels = target if ignored is None else target.masked_fill(ignored, 0)
    low, high = map(int, labels.aminmax())
    if low < 0 or high >= classes:
        return None
    pairs = labels.long() * classes + found()
    if ignored is not None:
        pairs.masked_fill_(ignored, classes**2)
    return torch.bincount(pairs, minlength=classes**2 + 1)[: classes**2].view(classes, classes)


def _is_scores(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0 and output.numel() > 0


def _is_labels(target: Any) -> bool:
    return isinstance(target, Tensor) and target.dtype in INTEGERS
