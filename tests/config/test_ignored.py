"""The label that the data mark as void and the one that losses and metrics leave out: a difference is told."""

from typing import Any

import pytest

from dtrain.config.check import notes
from dtrain.config.load import from_mapping

DATA = {"name": "ImageMaskFolder", "images": "a", "masks": "b", "train": {}}


def lines(loss: Any, metrics: Any = None, **loaders: Any) -> list[str]:
    config = {"model": {"name": "Identity"}, "optimizer": {"name": "SGD", "lr": 0.1}, "trainer": {"max_steps": 1}}
    config |= {"loss": loss, "loaders": DATA | loaders} | ({"metrics": metrics} if metrics else {})
    return [line for line in notes(from_mapping(config)) if "ignore_index" in line]


def test_a_default_that_is_not_the_datas_is_told() -> None:
    (line,) = lines({"name": "CrossEntropyLoss"}, ignore_index=255)
    assert line.startswith("loss: CrossEntropyLoss has the ignore_index -100 (its default), the data 255")
    assert line.endswith("ignore_index: 255 belongs there, unless the transforms change these labels")
    (line,) = lines({"name": "DiceLoss", "ignore_index": -1}, train={"ignore_index": 255})
    assert line.startswith("loss: DiceLoss has the ignore_index -1 (as given), the data 255")


@pytest.mark.parametrize(
    ("loss", "loaders"),
    [
        ({"name": "CrossEntropyLoss"}, {}),
        ({"name": "CrossEntropyLoss", "ignore_index": 255}, {"ignore_index": 255}),
        ({"name": "MSELoss"}, {"ignore_index": 255}),  # it could not leave anything out
        ({"name": "MaskedLoss", "loss": {"name": "MSELoss"}, "ignore_index": 255}, {"ignore_index": 255}),
        ({"name": "MaskedLoss", "loss": {"name": "DiceLoss", "ignore_index": 255}}, {"ignore_index": 255}),
    ],
)
def test_the_same_label_or_none_at_all_needs_no_word(loss: Any, loaders: Any) -> None:
    assert lines(loss, **loaders) == []


def test_each_loss_of_a_sum_and_each_metric_is_looked_at() -> None:
    loss = {
        "name": "WeightedSum",
        "losses": [{"name": "CrossEntropyLossSq", "ignore_index": 255}, {"name": "DiceLoss"}],
    }
    metrics = {"name": ["MeanIoU", "Accuracy"], "task": "multiclass", "num_classes": 3}
    found = lines(loss, metrics, ignore_index=255)
    assert [line.split(" has ")[0] for line in found] == [
        "loss.losses.1: DiceLoss",
        "metrics.name.0: MeanIoU",
        "metrics.name.1: Accuracy",
    ]
    assert lines(loss, metrics | {"ignore_index": 255}, ignore_index=255) == found[:1]
    outer = {"name": "MaskedLoss", "loss": {"name": "MSELoss"}}
    assert len(lines(outer, ignore_index=255)) == 1
