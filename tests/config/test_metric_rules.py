"""What a metric's source says of itself, compared with the metric itself; the figure that is monitored."""

import inspect
from typing import Any

import pytest
import torchmetrics
import torchmetrics.classification
import torchmetrics.segmentation

from dtrain.config.check import check, notes
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.config.metric_rules import monitored
from dtrain.config.schema import calls
from dtrain.config.signatures import SOURCE, Callee

OWN = """
from torchmetrics import Metric
import own_base


class Says:
    higher_is_better = False


class Heir(Says):
    pass


class Later(Says):
    higher_is_better: bool | None = None


class Declares(Says):
    higher_is_better: bool


class ByProperty:
    @property
    def higher_is_better(self):
        return True


class InConstructor:
    def __init__(self, rising):
        self.higher_is_better = rising


class Computed:
    higher_is_better = bool(1)


class Factory:
    def __new__(cls, kind):
        if kind:
            return Says()
        return Heir()


class Torn:
    def __new__(cls, kind):
        return Says() if kind else Later()


class Usual:
    higher_is_better = True

    def __new__(cls):
        return super().__new__(cls)


class OfAnother(own_base.Missing):
    pass


def function(output, target):
    return 0


function.higher_is_better = False


def silent(output, target):
    return 0
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Says", False), ("Heir", False), ("Later", None), ("Declares", False), ("ByProperty", ...), ("Usual", True),
        ("InConstructor", ...), ("Computed", ...), ("Factory", False), ("Torn", ...), ("OfAnother", ...),
        ("function", False), ("silent", None),
    ],
)  # fmt: skip
def test_what_source_text_says_of_an_attribute(tmp_path: Any, monkeypatch: Any, name: str, said: Any) -> None:
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(SOURCE._modules, "own_metric", raising=False)
    assert SOURCE.attribute("own_metric", name, "higher_is_better") is said


@pytest.mark.parametrize(
    "module", [torchmetrics, torchmetrics.classification, torchmetrics.segmentation], ids=lambda module: module.__name__
)
def test_the_source_of_every_class_of_torchmetrics_says_what_the_class_says(module: Any) -> None:
    compared = 0
    for name in module.__all__:
        cls = getattr(module, name)
        if not isinstance(SOURCE.lookup(module.__name__, name), Callee) or not inspect.isclass(cls):
            continue
        if "__new__" in vars(cls) and issubclass(cls, torchmetrics.Metric):  # made by task
            cls = getattr(torchmetrics.classification, f"Multiclass{name}")
        real = getattr(cls, "higher_is_better", None)
        said = SOURCE.attribute(module.__name__, name, "higher_is_better")
        assert said is (... if isinstance(real, property) else real), name
        compared += 1
    assert compared > 3


@pytest.mark.parametrize(
    ("wish", "labels", "expected"),
    [
        (None, [], ("val/loss", "loss", "")),
        (None, ["A", "B"], ("val/A", "A", "")),
        ("val/loss", ["A"], ("val/loss", "loss", "")),
        ("loss_ce", ["A"], ("val/loss_ce", "loss", "ce")),
        ("val/F1_macro_0", ["F1", "F1_macro"], ("val/F1_macro_0", "F1_macro", "0")),
        ("val/F1x", ["F1"], None),
    ],
)
def test_the_figure_that_is_monitored(wish: str | None, labels: list[str], expected: Any) -> None:
    assert monitored(wish, labels) == expected


def config_of(**changes: Any) -> Any:
    sections: dict[str, Any] = {
        "model": {"name": "Linear", "in_features": 4, "out_features": 3},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "loaders": {"name": "TensorDataset", "train": {}, "val": {}, "test": {}},
        "trainer": {"max_epochs": 1},
    }
    return from_mapping(sections | changes)


SPECIFICITY = {"name": "Specificity", "task": "multiclass", "num_classes": 3}  # says nothing of its direction


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"max_epochs": 1, "mode": "max"}},
        {"trainer": {"max_epochs": 1, "monitor": "val/loss"}},
        {"loaders": {"name": "TensorDataset", "train": {}}},  # nothing is validated
        {"metrics": {"name": "torch.nn.MSELoss"}},
        {"metrics": {"contrastive_loss": {"name": "cosine_similarity"}}},
        {"metrics": {"name": "MinMaxMetric", "base_metric": SPECIFICITY}},  # only the object can say
    ],
)
def test_where_no_mode_is_asked_for(changes: dict[str, Any]) -> None:
    check(config_of(**{"metrics": SPECIFICITY} | changes))


@pytest.mark.parametrize("metrics", [SPECIFICITY, {"name": "cosine_similarity"}, {"name": "mean_squared_error"}])
def test_where_the_mode_is_asked_for(metrics: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"trainer.mode: missing: \w+ does not say whether a higher or a lower"):
        check(config_of(metrics=metrics))
    check(config_of(metrics=metrics), "test")


CE, BCE, ONE = {"name": "CrossEntropyLoss"}, {"name": "BCEWithLogitsLoss"}, {"in_features": 4, "out_features": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": ["Precision"]}, {"task": "multiclass", "num_classes": 3}),
        ({"name": "Precision", "average": "none"}, {"task": "multiclass", "num_classes": 3, "average": "none"}),
        ({"name": "Precision", "num_classes": 5}, {"task": "multiclass", "num_classes": 5}),
        ({"name": "Precision", "task": "binary"}, {"task": "binary"}),
        ({"name": "MulticlassAccuracy"}, {"num_classes": 3}),
        ({"name": "BinaryAccuracy"}, {}),
        ({"name": "MeanIoU"}, {}),  # dtrain's own
        ({"name": "torchmetrics.functional.accuracy"}, {"task": "multiclass", "num_classes": 3}),
        ({"loss": BCE, "name": "Recall"}, {"task": "multilabel", "num_labels": 3}),
        ({"loss": BCE, "name": "MultilabelF1Score"}, {"num_labels": 3}),
        ({"loss": BCE, "model": {"name": "Linear", **ONE}, "name": "Recall"}, {"task": "binary"}),
        ({"loss": CE | {"weight": [1.0, 2.0]}, "model": {"name": "Identity"}, "name": "Precision"},
         {"task": "multiclass", "num_classes": 2}),
        ({"model": {"name": "UNet3D", "in_channels": 1, "out_channels": 7}, "name": "Precision"},
         {"task": "multiclass", "num_classes": 7}),
    ],
)  # fmt: skip
def test_a_metric_gets_task_and_classes_from_loss_and_model(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    sections = {key: changes[key] for key in ("loss", "model") if key in changes}
    metrics = {key: changes[key] for key in changes if key not in sections}
    config = config_of(**sections, metrics=metrics, trainer={"max_epochs": 1, "mode": "max"})
    check(config)
    (call,) = [call for key, call in calls(config).items() if key.startswith("metrics.")]
    assert call.arguments == expected
    told = [line for line in notes(config) if "as the loss and the model have it" in line]
    assert len(told) == bool(set(expected) - set(metrics))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "MSELoss"}}, "Precision is missing required argument 'task'"),
        ({"model": {"name": "Identity"}}, "Precision is missing required argument 'task'"),
        ({"loss": {"name": "CrossEntropyLoss", "weight": [1.0, 2.0]}}, "Precision is missing required argument 'task'"),
        (
            {"model": {"name": "Identity"}, "metrics": {"name": "Precision", "task": "multiclass"}},
            "Precision needs num_classes for task: multiclass; neither model nor loss says it for certain, so add it",
        ),
        ({"metrics": {"name": "Precision", "output_key": "label"}}, "Precision is missing required argument 'task'"),
    ],
)
def test_what_is_not_certain_is_asked_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config_of(**{"metrics": {"name": ["Precision"]}} | changes))
