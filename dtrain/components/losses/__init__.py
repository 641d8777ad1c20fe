"""Losses a config can name, beside torch.nn's."""

from dtrain.components.losses.combined import MaskedLoss, WeightedSum
from dtrain.components.losses.cross_entropy import CrossEntropyLossSq, WeightedCrossEntropyLoss
from dtrain.components.losses.deep_supervision import DeepSupervision
from dtrain.components.losses.dice import BCEDiceLoss, DiceLoss, GeneralizedDiceLoss
from dtrain.components.losses.pidnet import PIDNetLoss
from dtrain.components.losses.regression import WeightedSmoothL1Loss

__all__ = [
    "BCEDiceLoss",
    "CrossEntropyLossSq",
    "DeepSupervision",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "MaskedLoss",
    "PIDNetLoss",
    "WeightedCrossEntropyLoss",
    "WeightedSmoothL1Loss",
    "WeightedSum",
]
