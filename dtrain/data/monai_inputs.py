"""What the classes of monai.metrics document as their inputs, made of logits and labels.

Shapes: N samples, C channels or classes, any spatial dimensions * (none for a classification).
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Activation = Literal["softmax", "sigmoid", "none"] | None

_MASKS = (
    "DiceMetric", "MeanIoU", "GeneralizedDiceScore", "ConfusionMatrixMetric", "FBetaScore", "HausdorffDistanceMetric",
    "SurfaceDistanceMetric", "SurfaceDiceMetric", "AbsoluteVolumeDifferenceMetric", "MetricsReloadedBinary",
    "MetricsReloadedCategorical",
)  # fmt: skip
_SCORES = ("ROCAUCMetric", "AveragePrecisionMetric", "CalibrationErrorMetric")
_VALUES = ("MSEMetric", "MAEMetric", "MAPEMetric", "RMSEMetric", "PSNRMetric", "SSIMMetric", "MultiScaleSSIMMetric")
KINDS = {
    **dict.fromkeys(_MASKS, "masks"),  # both one-hot, the prediction binarized
    **dict.fromkeys(_SCORES, "scores"),  # probabilities, and one-hot labels
    **dict.fromkeys(_VALUES, "values"),  # two images of one shape
    "LossMetric": "as they are",
}


def kind_of(metric: Any) -> str | None:
    """Which inputs a metric of MONAI documents: one of KINDS; '' if that is not known, None if it is none of MONAI's.

    A class of somebody's own that is made of MONAI's base classes gets its inputs as they are.
    """
    if not (callable(metric) and hasattr(metric, "get_buffer") and hasattr(metric, "aggregate")):
        return "" if str(getattr(getattr(metric, "func", metric), "__module__", "")).startswith("monai.") else None
    known = [KINDS[cls.__name__] for cls in type(metric).__mro__ if cls.__name__ in KINDS and _is_monais(cls)]
    return known[0] if known else "" if _is_monais(type(metric)) else "as they are"


def _is_monais(cls: type) -> bool:
    return cls.__module__.startswith("monai.")


def monai_inputs(
    kind: str, output: Tensor, target: Tensor, activation: Activation = None, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Prediction and truth in the form that a kind of MONAI's metrics documents.

    Args:
        kind: One of KINDS.
        output: Logits (N, C, *), or (N,) for one value per sample.
        target: Labels (N, *) or (N, 1, *); or channels (N, C, *), one-hot unless the activation is sigmoid.
        activation: What makes probabilities of the output. Default: sigmoid for one channel, softmax for several, of
            which a voxel then has the largest; 'sigmoid': channels are independent; 'none': they are probabilities.
        ignore_index: The label that does not count, by the metric's own setting.

    Raises:
        ValueError: Output and target do not fit together, or a label is not a class.
    """
    if kind == "as they are":
        return output, target
    if output.dim() == 1:
        output, target = output[:, None], target.reshape(len(target), -1)
    if target.shape == output[:, 0].shape and output.shape[1] == 1:
        target = target[:, None]
    if kind == "values":
        if target.shape != output.shape:
            raise ValueError(f"the output has the shape {tuple(output.shape)}, the target {tuple(target.shape)}")
        return output, target
    truth, is_one_hot = _truth(output, target, ignore_index)
    independent = output.shape[1] == 1 or activation == "sigmoid"
    if not independent and not is_one_hot:
        text = "the target has voxels of several classes, or of none; if its channels are independent of one another"
        raise ValueError(f"{text}, add activation: sigmoid")
    if activation != "none":
        output = output.sigmoid() if independent else output.softmax(dim=1)
    if kind == "masks":
        output = output > 0.5 if independent else one_hot(output.argmax(dim=1), output.shape[1]).movedim(-1, 1)
    return output.float(), truth.float()


def _truth(output: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, bool]:
    """The target as channels (N, C, *), and whether each voxel that counts is of one class."""
    classes = output.shape[1]
    if classes > 1 and target.shape == output.shape:
        of_each = (target == 1).sum(dim=1)
        counts = torch.ones_like(of_each, dtype=torch.bool) if ignore_index is None else target.sum(dim=1) != 0
        return target, bool((of_each[counts] == 1).all())
    if target.shape == output[:, :1].shape:
        target = target[:, 0]
    if target.shape != output[:, 0].shape:
        found = f"the output has the shape {tuple(output.shape)}, the target {tuple(target.shape)}"
        raise ValueError(f"{found}; expected labels {tuple(output[:, 0].shape)} or channels {tuple(output.shape)}")
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    wrong = ((target < 0) | (target >= max(classes, 2)) | (target != target.round())) & ~ignored
    if bool(wrong.any()):
        raise ValueError(f"the target has the label {target[wrong][0].item():g}; expected 0 to {max(classes, 2) - 1}")
    if classes == 1:
        return target[:, None], True  # MONAI compares it with ignore_index itself
    # A voxel without any class is what MONAI leaves out where its ignore_index is not a class.
    is_class = ~ignored | (target >= 0) & (target < classes)
    channels = one_hot(torch.where(is_class, target, 0).long(), classes).movedim(-1, 1)
    return channels * is_class.unsqueeze(1), True
