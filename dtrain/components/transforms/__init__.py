"""Transforms a dataset section can name."""

from dtrain.components.transforms.geometry import CropToFixed, RandomCrop, RandomFlip, RandomRotate90
from dtrain.components.transforms.intensity import (
    AdditiveGaussianNoise,
    AdditivePoissonNoise,
    GaussianBlur,
    RandomContrast,
    RandomGammaCorrection,
)
from dtrain.components.transforms.normalize import Normalize, PercentileNormalizer, Standardize
from dtrain.components.transforms.pipeline import Pipeline
from dtrain.components.transforms.targets import (
    BlobsToMask,
    LabelToAffinities,
    LabelToBoundary,
    LabelToBoundaryAndAffinities,
    LabelToMaskAndAffinities,
    LabelToZAffinities,
    RandomLabelToAffinities,
    Relabel,
    RgbToLabel,
)
from dtrain.components.transforms.warp import ElasticDeformation, RandomRotate, RandomScale

__all__ = [
    "AdditiveGaussianNoise",
    "AdditivePoissonNoise",
    "BlobsToMask",
    "CropToFixed",
    "ElasticDeformation",
    "GaussianBlur",
    "LabelToAffinities",
    "LabelToBoundary",
    "LabelToBoundaryAndAffinities",
    "LabelToMaskAndAffinities",
    "LabelToZAffinities",
    "Normalize",
    "PercentileNormalizer",
    "Pipeline",
    "RandomContrast",
    "RandomCrop",
    "RandomFlip",
    "RandomGammaCorrection",
    "RandomLabelToAffinities",
    "RandomRotate",
    "RandomRotate90",
    "RandomScale",
    "Relabel",
    "RgbToLabel",
    "Standardize",
]
