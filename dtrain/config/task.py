"""What a config's loss and model say of a classification, where it is certain: its task and its number of classes.

torchmetrics' classes ask for both again; so `metrics: {name: [Precision]}` is enough beside a cross entropy.
"""

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dtrain.config.signatures import Callee

COUNTS = {"multiclass": "num_classes", "multilabel": "num_labels"}  # the argument that each task needs
_METRICS = ("torchmetrics.classification.", "torchmetrics.functional.classification.")
_LOSSES = ("torch.nn.", "dtrain.components.losses.")
_MULTICLASS = {
    "CrossEntropyLoss", "NLLLoss", "MultiMarginLoss", "CrossEntropyLossSq", "WeightedCrossEntropyLoss",
    "cross_entropy", "nll_loss", "multi_margin_loss",
}  # fmt: skip
_BINARY = {"BCEWithLogitsLoss", "BCELoss", "binary_cross_entropy_with_logits", "binary_cross_entropy"}
_OUTPUTS = ("num_classes", "n_classes", "num_labels", "classes", "out_channels", "out_features")  # of a model

Written = tuple[Callee, Mapping[str, Any]]  # what a section names, and the arguments that it is given there


def task_arguments(metric: Written, loss: Written | None, model: Written | None) -> dict[str, Any]:
    """The arguments that a metric of torchmetrics lacks, where all of them are certain; none for other metrics."""
    callee, given = metric
    if not callee.module.startswith(_METRICS):
        return {}
    certain: dict[str, Any] = {}
    outputs = _outputs(loss, model)
    if takes_task(callee) and "task" not in given and (task := _task(loss, outputs)):
        certain["task"] = task
    count = count_argument(callee, {**given, **certain})
    if count and count not in given:
        return {} if outputs is None else {**certain, count: outputs}
    return certain


def takes_task(callee: Callee) -> bool:
    """Whether a metric is one of several, by its task."""
    return any(item.name == "task" and item.default is None for item in callee.parameters)


def count_argument(callee: Callee, given: Mapping[str, Any]) -> str:
    """The argument of a metric that says how many classes or labels there are; '' where its task needs none."""
    kind = str(given.get("task")) if takes_task(callee) else callee.name.lower()
    count = next((count for task, count in COUNTS.items() if kind.startswith(task)), "")
    return count if count in callee.keywords else ""


def _task(loss: Written | None, outputs: int | None) -> str:
    """The task that a loss is made for; '' where that is not certain."""
    if loss is None or not loss[0].module.startswith(_LOSSES):
        return ""
    if loss[0].name in _MULTICLASS:
        return "multiclass"
    if loss[0].name in _BINARY and outputs is not None:
        return "binary" if outputs == 1 else "multilabel"
    return ""


def _outputs(loss: Written | None, model: Written | None) -> int | None:
    """How many classes there are, by the model's arguments and the loss's weights; None where they leave a doubt."""
    written = [value for key in _OUTPUTS if _is_count(value := (model[1] if model else {}).get(key))]
    if not written and model:
        written = [
            value for item in model[0].parameters if item.name in _OUTPUTS and _is_count(value := _default(item))
        ]
    weight = loss[1].get("weight") if loss and loss[0].name in _MULTICLASS else None
    found = {*written, *([len(weight)] if isinstance(weight, list) else [])}
    return found.pop() if len(found) == 1 else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _default(parameter: Any) -> Any:
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(parameter.default or "None")
    return None
