"""Patches of volumes in HDF5 files, from memory or read as they are needed."""

from typing import Any, ClassVar

from dtrain.components.datasets.files import found_files, unique_names
from dtrain.components.datasets.flat import Axis
from dtrain.components.datasets.kept_facts import kept_facts
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder, settings_of
from dtrain.components.datasets.volumes import Checks, HDF5Volume, Volume
from dtrain.components.transforms.pipeline import Pipeline

SUFFIXES = (".h5", ".hdf", ".hdf5", ".hd5")


class LazyHDF5Dataset(PatchDataset):
    """Patches of HDF5 files, each read from the file when it is asked for: the memory needed is that of the patches.

    Each worker process opens the files itself, read-only, and keeps them open. What is compressed in chunks is read
    fastest where the patch is a few chunks. Whether labels are given decides what an item is; see PatchDataset.

    Args:
        file_paths: Files, folders (all *.h5, *.hdf, *.hdf5 and *.hd5 in them, sorted) or patterns; one or a list.
        raw_internal_path: The image's dataset, (D, H, W), (C, D, H, W) or (H, W); several are stacked as channels.
        label_internal_path: The label's, of the image's extent, with or without channels; several are stacked; null: an
            item is the image alone.
        weight_internal_path: The dataset of each voxel's weight, of the image's extent.
        slice_builder: A SliceBuilder, FilterSliceBuilder or ForegroundSlices. Default: each file is one item.
        transforms: What is done to each patch, in this order.
        global_normalization: Read each file once when the dataset is built and give its statistics to Standardize,
            Normalize and PercentileNormalizer, which else take the patch's.
        random_scale: For training: voxels by which a patch may be larger or smaller along each axis, one number or one
            per axis, before it is resampled to the patch's shape.
        random_scale_probability: How often that is done.
        num_classes: Refuse labels other than 0 to num_classes - 1, and read them as integers.
        ignore_index: One label more that is possible.
        check_finite: Refuse NaN and infinity in the image and the weight.
        axis: z | y | x: items are slices across this axis, (C, H, W), for a 2-D network. A slice_builder then has two
            numbers per shape; without one, an item is a whole slice.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file or dataset is not as it must be. Of values that is known only when they are read.
        ModuleNotFoundError: h5py is not installed.
    """

    in_memory: ClassVar[bool] = False

    def __init__(
        self,
        file_paths: str | list[str],
        raw_internal_path: str | list[str] = "raw",
        label_internal_path: str | list[str] | None = "label",
        weight_internal_path: str | None = None,
        slice_builder: SliceBuilder | None = None,
        transforms: list[Any] | None = None,
        global_normalization: bool = False,
        random_scale: int | list[int] | None = None,
        random_scale_probability: float = 0.5,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        check_finite: bool = True,
        axis: Axis | None = None,
    ) -> None:
        files = found_files(file_paths, SUFFIXES, "file_paths", "HDF5 file")
        checks = Checks(check_finite, num_classes, ignore_index)
        raw, label = _names(raw_internal_path), _names(label_internal_path)
        if not raw:
            raise ValueError("raw_internal_path is empty; expected the name of a dataset, or several")
        if weight_internal_path is not None and not label:
            raise ValueError("weight_internal_path needs a label_internal_path: a weight weighs labels")
        percents = Pipeline(transforms).percents if global_normalization else None
        about = [raw, label, weight_internal_path, vars(checks), percents, axis, settings_of(slice_builder)]
        with kept_facts(files, about) as facts:
            volumes: list[Volume] = []
            names = unique_names(files, [file.stem for file in files])
            for file, name, known in zip(files, names, facts, strict=True):
                volume = HDF5Volume(file, raw, label, weight_internal_path, name, checks, known)
                volumes.append(volume.load() if self.in_memory else volume)
            super().__init__(
                volumes,
                files,
                slice_builder,
                transforms,
                global_normalization,
                random_scale,
                random_scale_probability,
                axis,
            )  # fmt: skip
        read: Any
        for read in volumes:
            read.facts = {}


class StandardHDF5Dataset(LazyHDF5Dataset):
    """The same from memory: each file is read whole when the dataset is built, in the type that is stored.

    Forked workers share that memory. Everything that can be wrong with a file is found when the dataset is built.
    The arguments are LazyHDF5Dataset's.
    """

    in_memory: ClassVar[bool] = True


def _names(wish: str | list[str] | None) -> tuple[str, ...]:
    return () if wish is None else (wish,) if isinstance(wish, str) else tuple(wish)
