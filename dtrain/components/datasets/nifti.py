"""Patches of NIfTI images, with their place in space kept for the output."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.components.datasets.files import found_files, one_line, paired, stem_of, unique_names
from dtrain.components.datasets.flat import Axis
from dtrain.components.datasets.kept_facts import facts_of
from dtrain.components.datasets.patches import PatchDataset, whole
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume, Checks, Region, Volume, read_region
from dtrain.components.transforms.pipeline import NEAR, Pipeline

SUFFIXES = (".nii", ".nii.gz")


class NiftiDataset(PatchDataset):
    """Patches of NIfTI images, and of labels with the same stems.

    The axes are the file's: (x, y, z) as spatial shape, so that patch_shape counts along x, y and z; a fourth axis
    becomes the channels. Values are scaled as the header says. Nothing is resampled and no axis is flipped, whatever
    the orientation, unless MONAI's Spacingd or Orientationd are among the transforms: these are given the affine. Each
    volume keeps the file's `affine` (4, 4) and `header`, with which a prediction is written.

    Args:
        images: Files (*.nii, *.nii.gz), folders or patterns; one or a list.
        labels: Likewise, as whole numbers, also where the file stores floats. Default: an item is the image alone.
        label_suffix: What a label's stem has behind its image's, as _seg in a_seg.nii.gz.
        slice_builder: A SliceBuilder, FilterSliceBuilder or ForegroundSlices. Default: each file is one item.
        transforms: What is done to each patch, in this order.
        in_memory: Read all when the dataset is built. false: read each patch from the file, which is slow for .nii.gz,
            as these have to be unpacked from their beginning.
        global_normalization: See LazyHDF5Dataset.
        random_scale: See LazyHDF5Dataset.
        random_scale_probability: See LazyHDF5Dataset.
        num_classes: Refuse labels other than 0 to num_classes - 1.
        ignore_index: One label more that is possible.
        check_finite: Refuse NaN and infinity in the images.
        axis: z | y | x of the file: items are slices across this axis, (C, H, W), for a 2-D network. A slice_builder
            then has two numbers per shape; without one, an item is a whole slice.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file has no partner or cannot be read, or image and label differ in shape or place.
        ModuleNotFoundError: nibabel is not installed.
    """

    def __init__(
        self,
        images: str | list[str],
        labels: str | list[str] | None = None,
        label_suffix: str = "",
        slice_builder: SliceBuilder | None = None,
        transforms: list[Any] | None = None,
        in_memory: bool = True,
        global_normalization: bool = False,
        random_scale: int | list[int] | None = None,
        random_scale_probability: float = 0.5,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        check_finite: bool = True,
        axis: Axis | None = None,
    ) -> None:
        found = found_files(images, SUFFIXES, "images", "NIfTI file")
        pairs: Sequence[tuple[Path, Path | None]] = [(path, None) for path in found]
        if labels is not None:
            pairs = [*paired(found, found_files(labels, SUFFIXES, "labels", "NIfTI file"), label_suffix, SUFFIXES)]
        names = unique_names([image for image, _ in pairs], [stem_of(image, SUFFIXES) for image, _ in pairs])
        checks = Checks(check_finite, num_classes, ignore_index)
        volumes: list[Volume] = []
        for (image, label), name in zip(pairs, names, strict=True):
            volume = NiftiVolume(image, label, name, checks)
            volumes.append(volume.load() if in_memory else volume)
        files = [file for pair in pairs for file in pair if file]
        percents = Pipeline(transforms).percents if global_normalization else None
        with facts_of(volumes, pairs, [vars(checks), percents, axis], slice_builder, global_normalization):
            super().__init__(
                volumes, files, slice_builder, transforms, global_normalization, random_scale, random_scale_probability,
                axis,
            )  # fmt: skip


class NiftiVolume:
    """A NIfTI image and perhaps a label, of which only the regions asked for are read. See Volume.

    Args:
        path: The image, (X, Y), (X, Y, Z) or (X, Y, Z, C).
        label: The label, likewise, or None.
        name: Default: the file's stem.
        checks: What each value must be. Default: finite.

    Attributes:
        affine: From voxels to millimetres, float64 (4, 4).
        header: The image's header, nibabel's object.

    Raises:
        ValueError: A file cannot be read, or the label is of another shape or place.
    """

    has_weight = False
    axis_names = "xyz"

    def __init__(self, path: Path, label: Path | None = None, name: str = "", checks: Checks | None = None) -> None:
        self.path, self.label, self.name = path, label, name or stem_of(path, SUFFIXES)
        self.checks, self.has_label = checks or Checks(), label is not None
        self.label_file = (label, "") if label else None
        _values.cache_clear()  # another file may lie in a known one's place
        image = opened(path)
        self.affine, self.header = image.affine, image.header
        shape = _shape(path, image)
        self.shape, self.channels = shape[:3], shape[3] if len(shape) == 4 else 1
        if label is None:
            return
        other = opened(label)
        if _shape(label, other)[:3] != self.shape:
            raise ValueError(f"{path} has the extent {self.shape}, its label {label} {_shape(label, other)[:3]}")
        if not np.allclose(other.affine, self.affine, atol=NEAR):
            raise ValueError(
                f"{label} lies elsewhere than {path}: their affines differ by up to "
                f"{np.abs(other.affine - self.affine).max():.3g}; resample one to the other"
            )

    def read(self, region: Region) -> np.ndarray:
        """See Volume."""
        block = _read(self.path, region, self.shape).astype(np.float32)
        self.checks.values(block if self.channels > 1 else block[0], str(self.path), region, self.shape)
        return block

    def read_label(self, region: Region) -> np.ndarray:
        """See Volume; int64, (*region), or (K, *region) if there is a fourth axis."""
        assert self.label is not None, f"{self.path} has no label"
        block = _read(self.label, region, self.shape)
        labels: np.ndarray = Checks().labels(block, str(self.label), region, self.shape).astype(np.int64)
        if (labels != block).any():
            raise ValueError(
                f"{self.label} holds fractions such as {block[labels != block][0]}; a label is a whole number"
            )
        labels = labels if len(_shape(self.label, opened(self.label))) == 4 else labels[0]
        return self.checks.labels(labels, str(self.label), region, self.shape)

    def read_weight(self, region: Region) -> np.ndarray:
        """See Volume; there is none."""
        raise ValueError(f"{self.path} has no weight")

    def load(self) -> "PlacedArray":
        """All of it in memory, with the affine and the header.

        Raises:
            ValueError: A file cannot be read, or a value is not as it must be.
        """
        label = _smallest(self.read_label(whole(self))) if self.has_label else None
        result = PlacedArray(self.path, self.read(whole(self)), label, name=self.name)
        result.affine, result.header = self.affine, self.header
        result.checks, result.label_file = self.checks, self.label_file
        return result


class PlacedArray(ArrayVolume):
    """A NIfTI image in memory.

    Attributes:
        affine: From voxels to millimetres, float64 (4, 4).
        header: The image's header, nibabel's object.
    """

    axis_names = "xyz"
    affine: np.ndarray
    header: Any


def opened(path: Path) -> Any:
    """A NIfTI image; its values are not read.

    Raises:
        ValueError: It cannot be read.
        ModuleNotFoundError: nibabel is not installed.
    """
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("NIfTI files need nibabel: pip install nibabel") from error
    try:
        return nibabel.load(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {one_line(error)}") from error


@functools.lru_cache(maxsize=64)
def _values(path: Path) -> Any:
    """What can be sliced without opening the file anew; nibabel opens and closes it for each slice."""
    return opened(path).dataobj


def _read(path: Path, region: Region, shape: tuple[int, ...]) -> np.ndarray:
    """(C, *region), as stored or as the header scales it."""
    values = _values(path)

    def channels_first(wanted: Region) -> np.ndarray:
        block = np.asanyarray(values[wanted])
        return np.moveaxis(block, -1, 0) if block.ndim > len(shape) else block[np.newaxis]

    try:
        block = read_region(lambda wanted: channels_first(wanted[1:]), shape, region, 1)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    return np.ascontiguousarray(block)


def _shape(path: Path, image: Any) -> tuple[int, ...]:
    """The image's shape, known to be one of numbers."""
    shape = tuple(int(extent) for extent in image.shape)
    if len(shape) not in (2, 3, 4) or not all(shape):
        raise ValueError(f"{path} has the shape {shape}; expected (X, Y), (X, Y, Z) or (X, Y, Z, C)")
    if image.get_data_dtype().kind not in "biuf":
        raise ValueError(f"{path} has the type {image.get_data_dtype()}; expected numbers")
    return shape


def _smallest(labels: np.ndarray) -> np.ndarray:
    """Labels in a type that holds them, for memory."""
    low, high = int(labels.min()), int(labels.max())
    small = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    return labels.astype(small) if small.kind in "iu" else labels
