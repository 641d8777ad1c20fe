"""What makes probabilities of a model's outputs, where the predictor's section does not say: what the training uses."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

Activation = Literal["softmax", "sigmoid", "none"]

# torch's and dtrain's losses by what they do to an output; those of classes need not be named: softmax is the default.
OF_LOSSES: dict[Activation, tuple[str, ...]] = {
    "sigmoid": ("BCEWithLogitsLoss", "BCEDiceLoss", "MultiLabelSoftMarginLoss", "binary_cross_entropy_with_logits"),
    "softmax": ("CrossEntropyLoss", "CrossEntropyLossSq", "WeightedCrossEntropyLoss", "cross_entropy"),
    "none": (
        *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "WeightedSmoothL1Loss"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
        *("BCELoss", "binary_cross_entropy"),  # the model gives probabilities
    ),
}


def activation_of(loss: Any, metrics: Any) -> tuple[Activation, str] | None:
    """The one activation that the metrics, else the losses, have in common, and which key says so; None: not known.

    The arguments are the config's sections as plain values. A file of predictions and a test are then about the same
    numbers: a regression's outputs are left alone, and several channels that are each yes or no get a sigmoid each.
    """
    wishes = {value for key, value in _entries(metrics) if key == "activation" and value in OF_LOSSES}
    if len(wishes) == 1:
        return cast(Activation, wishes.pop()), "metrics"
    names = {str(value).rpartition(".")[2].rpartition(":")[2] for key, value in _entries(loss) if key == "name"}
    wishes = {activation for activation, losses in OF_LOSSES.items() if names.intersection(losses)}
    wishes |= {value for key, value in _entries(loss) if key == "normalization" and value in OF_LOSSES}
    return (cast(Activation, wishes.pop()), "loss") if len(wishes) == 1 else None


def _entries(section: Any) -> Iterator[tuple[str, Any]]:
    """All keys with plain values of a section, however deep."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield from _entries(item)
            elif isinstance(item, str):
                yield key, item
