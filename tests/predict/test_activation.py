"""The activation that the training uses is that of its predictions."""

# ruff: noqa: E501 - a case of a table is one line

from __future__ import annotations

from typing import Any

import pytest

from dtrain.predict.activation import activation_of


@pytest.mark.parametrize(
    ("loss", "metrics", "expected"),
    [
        ({"name": "MSELoss"}, {"name": "PSNR"}, ("none", "loss")),
        ({"name": "torch.nn:BCELoss"}, None, ("none", "loss")),
        ({"name": "torch.nn.functional.huber_loss"}, {}, ("none", "loss")),
        ({"name": "BCEWithLogitsLoss"}, {"name": "MeanIoU"}, None),  # which takes the largest of several channels
        ({"name": "BCEWithLogitsLoss"}, {"name": ["MultilabelF1Score", "MultilabelAUROC"]}, ("sigmoid", "loss")),
        ({"name": "BCEDiceLoss"}, None, ("sigmoid", "loss")),
        ({"name": "MaskedLoss", "loss": {"name": "L1Loss"}}, None, ("none", "loss")),
        ({"name": "WeightedSum", "losses": [{"name": "DiceLoss", "normalization": "softmax"}, {"name": "CrossEntropyLoss"}]}, None, ("softmax", "loss")),
        ({"name": "DiceLoss", "normalization": "sigmoid"}, {"name": "BinaryIoU"}, ("sigmoid", "loss")),
        ({"name": "DiceLoss"}, {"name": ["DSC", "IoU"], "IoU": {"name": "MeanIoU", "activation": "sigmoid"}}, None),
        ({"name": "DiceLoss"}, {"name": ["DSC", "MeanIoU"], "activation": "sigmoid"}, ("sigmoid", "metrics")),
        ({"name": "DiceLoss"}, {"a": {"name": "DSC", "activation": "sigmoid"}, "b": {"name": "PPV", "activation": "sigmoid"}}, ("sigmoid", "metrics")),
        ({"name": "DiceLoss"}, {"a": {"name": "DSC", "activation": "sigmoid"}, "b": {"name": "PPV", "activation": "none"}}, None),
        ({"name": "MSELoss"}, {"name": "PSNR", "activation": "sigmoid"}, ("sigmoid", "metrics")),
        ({"name": "MSELoss"}, {"name": "PSNR", "activation": "auto"}, ("none", "loss")),
        ({"name": "WeightedSum", "losses": [{"name": "MSELoss"}, {"name": "BCEDiceLoss"}]}, None, None),
        ({"name": "my.package:Loss"}, {"name": "Accuracy"}, None),
        (None, None, None),
    ],
)  # fmt: skip
def test_what_a_training_says_of_its_outputs(loss: Any, metrics: Any, expected: Any) -> None:
    assert activation_of(loss, metrics) == expected
