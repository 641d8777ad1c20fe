"""What makes probabilities of a model's outputs, where the predictor's section does not say: what the training uses."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

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


INDEPENDENT = ("Multilabel", "Binary")  # how metrics begin that do not take the largest of several channels


def activation_of(loss: Any, metrics: Any) -> tuple[Activation, str] | None:
    """The one activation that the metrics, else the losses, have in common, and which key says so; None: not known.

    The arguments are the config's sections as plain values. A file of predictions and a test are then about the same
    numbers: a regression's outputs are left alone, and several channels that are each yes or no get a sigmoid each,
    unless a metric compares them with one another all the same.
    """
    if (named := _of_metrics(metrics)) in OF_LOSSES:
        return named, "metrics"
    names = {str(value).rpartition(".")[2].rpartition(":")[2] for key, value in _entries(loss) if key == "name"}
    wishes = {activation for activation, losses in OF_LOSSES.items() if names.intersection(losses)}
    wishes |= {value for key, value in _entries(loss) if key == "normalization" and value in OF_LOSSES}
    takes_largest = not all(name.startswith(INDEPENDENT) for key, name in _entries(metrics) if key == "name")
    if len(wishes) != 1 or (wishes == {"sigmoid"} and takes_largest):
        return None
    return wishes.pop(), "loss"


def _of_metrics(metrics: Any) -> Any:
    """What all metrics name as their activation, together or each for itself; None where one does not."""
    metrics = metrics if isinstance(metrics, Mapping) else {}
    names = metrics.get("name", [])
    own: dict[str, Any] = {str(name): {} for name in (names if isinstance(names, list) else [names])}
    own |= {key: value for key, value in metrics.items() if isinstance(value, Mapping)}
    wishes = {str(values.get("activation", metrics.get("activation"))) for values in own.values()}
    return wishes.pop() if len(wishes) == 1 else None


def _entries(section: Any) -> Iterator[tuple[str, Any]]:
    """All keys with plain values of a section, however deep."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield from _entries(item)
            elif isinstance(item, str):
                yield key, item
