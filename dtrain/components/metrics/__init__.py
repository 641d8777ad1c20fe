"""Metrics a config can name, beside torchmetrics'."""

# torchmetrics' Precision is the true one already (with average: macro each class counts alike), so the name stays its.
from torchmetrics import Precision

from dtrain.components.metrics.instances import (
    AdaptedRandError,
    AveragePrecision,
    BoundaryAdaptedRandError,
    BoundaryAveragePrecision,
)
from dtrain.components.metrics.overlap import (
    DSC,
    PPV,
    SEN,
    BinaryIoU,
    DiceCoefficient,
    MacroPrecision,
    MeanIoU,
    PixelAccuracy,
)
from dtrain.components.metrics.regression import MSE, PSNR

__all__ = [
    "DSC",
    "MSE",
    "PPV",
    "PSNR",
    "SEN",
    "AdaptedRandError",
    "AveragePrecision",
    "BinaryIoU",
    "BoundaryAdaptedRandError",
    "BoundaryAveragePrecision",
    "DiceCoefficient",
    "MacroPrecision",
    "MeanIoU",
    "PixelAccuracy",
    "Precision",
]
