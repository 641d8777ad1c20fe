"""Datasets a config can name."""

from dtrain.components.datasets.cell_volume import CellVolume
from dtrain.components.datasets.collate import detection_collate
from dtrain.components.datasets.digits import Digits, DigitsClassification
from dtrain.components.datasets.digits_scene import DigitsScene
from dtrain.components.datasets.foreground import ForegroundSlices
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset, StandardHDF5Dataset
from dtrain.components.datasets.images import ImageMaskFolder
from dtrain.components.datasets.nifti import NiftiDataset
from dtrain.components.datasets.nuclei import DSB2018Dataset
from dtrain.components.datasets.pidnet import PIDNetDatasetWrapper
from dtrain.components.datasets.slices import FilterSliceBuilder, SliceBuilder
from dtrain.components.datasets.tiff_stack import TiffStackDataset
from dtrain.components.datasets.tooth_arch import ToothArch
from dtrain.components.datasets.zarr_store import ZarrDataset

__all__ = [
    "CellVolume",
    "DSB2018Dataset",
    "Digits",
    "DigitsClassification",
    "DigitsScene",
    "FilterSliceBuilder",
    "ForegroundSlices",
    "ImageMaskFolder",
    "LazyHDF5Dataset",
    "NiftiDataset",
    "PIDNetDatasetWrapper",
    "SliceBuilder",
    "StandardHDF5Dataset",
    "TiffStackDataset",
    "ToothArch",
    "ZarrDataset",
    "detection_collate",
]
