"""Predictor: the settings of predictions; which patches of a dataset go in, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dtrain.config.errors import ConfigError
from dtrain.predict.formats import FileSpec
from dtrain.predict.patch_grid import Grid
from dtrain.predict.segmentation import Choice
from dtrain.predict.source import Source, Volume


@dataclass(kw_only=True)
class Predictor:
    """Predicts whole volumes from patches. Its settings are the keys under `predictor` in the config.

    Args:
        name: StandardPredictor or LazyPredictor, as pytorch-3dunet's files say; both mean this one.
        checkpoint: A checkpoint folder or weight file. Default: the best of checkpoint_dir, else the last.
        output_dir: Where the files go. Default: predictions in the run folder.
        format: hdf5 | tiff | png | nifti | npy | zarr | ome-zarr, for a dataset without volumes hdf5 | npy | zarr |
            csv. Default: hdf5; nifti for NIfTI files, zarr or ome-zarr for such stores; png for images' segmentation.
        output_dataset: The dataset in an HDF5 file, the array in a Zarr store.
        compression: gzip | lzf. Default: none.
        dtype: Of the numbers in the files: float32 for probabilities, the smallest sufficient type for labels.
        output_key: Which of a model's several outputs: a key of a dict, an index of a tuple. Default: the main one.
        activation: softmax | sigmoid | none. Default: what the metrics or the loss name, else sigmoid for one channel,
            softmax for several.
        patch_shape: Voxels of a patch. Default: the dataset's, else the whole volume.
        stride_shape: From patch to patch. Default: the dataset's, else the patch's.
        halo_shape: Voxels read around a patch and cut off its prediction. Default: the dataset's.
        blend: gaussian | constant | last: how overlapping patches are averaged; last: a later patch wins, none is.
        mirror: Spatial axes, such as [0, 1, 2], along which each patch or image is mirrored: in all combinations, whose
            outputs are averaged before the activation. That takes 2, 4 or 8 times as long. Default: none.
        batch_size: Patches that the model gets at once. Default: the loader's; on a CPU 1, of 131,072 voxels or more.
        save_segmentation: Classes instead of probabilities.
        threshold: What counts as foreground where there is one channel.
        prediction_channel: Keep only this channel.
        instances: foreground | inverted: number the connected components of the foreground, or of what is not boundary.
        connectivity: 1: faces touch; 2: edges, too; 3: corners, too.
        min_size: Voxels of the smallest instance that is kept.
        slab_planes: Planes of a part: what an interruption costs. Default: those of some 4 million voxels.
        performance_metric: dice | mean_iou, of each volume that has a label.
        gt_internal_path: The label's dataset in an HDF5 input. Default: the dataset's own labels.

    Raises:
        ConfigError: Settings that exclude one another.
    """

    name: Literal["StandardPredictor", "LazyPredictor"] | None = None
    checkpoint: str | None = None
    output_dir: str | None = None
    format: Literal["hdf5", "tiff", "png", "nifti", "npy", "zarr", "ome-zarr", "csv"] | None = None
    output_dataset: str = "predictions"
    compression: Literal["gzip", "lzf"] | None = None
    dtype: Literal["float16", "float32", "uint8", "uint16", "uint32"] | None = None
    output_key: str | int | None = None
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    patch_shape: list[int] | None = None
    stride_shape: list[int] | None = None
    halo_shape: list[int] | None = None
    blend: Literal["gaussian", "constant", "last"] = "gaussian"
    mirror: list[int] | None = None
    batch_size: int | None = None
    save_segmentation: bool = False
    threshold: float = 0.5
    prediction_channel: int | None = None
    instances: Literal["foreground", "inverted"] | None = None
    connectivity: int = 1
    min_size: int = 0
    slab_planes: int | None = None
    performance_metric: Literal["dice", "mean_iou"] | None = None
    gt_internal_path: str | None = None

    def __post_init__(self) -> None:
        labels, dtype = self.choice.labels, self.dtype or ""
        has_integer_logits = not labels and "uint" in dtype and self.activation == "none"
        measures_instances = self.instances and self.performance_metric
        lacks_lzf = self.compression == "lzf" and self.format not in (None, "hdf5")
        mirror = self.mirror or []
        is_no_choice = len(set(mirror)) < len(mirror) or min(mirror, default=0) < 0
        contradictions = {
            f"mirror: must be different axes, counted from 0 on, such as [0, 1, 2], found {mirror}": is_no_choice,
            "dtype: labels need an integer type; possible: uint8, uint16, uint32": labels and "float" in dtype,
            "dtype: an integer type can hold probabilities, but not what activation: none gives": has_integer_logits,
            "performance_metric: compares classes, not numbered instances; remove one of them": measures_instances,
            "compression: lzf is for HDF5 only; possible for other formats: gzip": lacks_lzf,
        }
        for message, applies in contradictions.items():
            if applies:
                raise ConfigError(f"predictor.{message}")

    @property
    def choice(self) -> Choice:
        """What of a prediction is kept."""
        return Choice(self.save_segmentation, self.instances, self.threshold, self.prediction_channel)

    def source(self, dataset: Any) -> Source:
        """The patches of a dataset with `volumes`.

        Raises:
            ConfigError: The patch, the stride or the halo does not fit the volumes.
        """
        volumes: Sequence[Volume] = dataset.volumes
        grids, halos = [], []
        for volume in volumes:
            whole = [1 if axis == getattr(dataset, "axis", None) else side for axis, side in enumerate(volume.shape)]
            patch = self._voxels("patch_shape", dataset, volume, whole)
            stride = self._voxels("stride_shape", dataset, volume, patch)
            if any(step > length for step, length in zip(stride, patch, strict=True)):
                text = f"predictor.stride_shape: {list(stride)} is larger than the patch, {list(patch)}"
                raise ConfigError(f"{text}; the voxels between patches would have no prediction")
            axes = range(len(volume.shape) - (getattr(dataset, "axis", None) is not None))  # of what the model gets
            if max(self.mirror or [0]) >= len(axes):
                text = f"the axes of {volume.path} are {', '.join(map(str, axes))}"
                raise ConfigError(f"predictor.mirror: {self.mirror}: {text}")
            grids.append(Grid(volume.shape, patch, stride, self.blend))
            if hasattr(volume, "reads_in_order"):
                volume.reads_in_order = len(grids[-1]) > 1
            halos.append(self._voxels("halo_shape", dataset, volume, (0,) * len(volume.shape), least=0))
        return Source(dataset, grids, halos)

    def _voxels(
        self, key: str, dataset: Any, volume: Volume, default: Sequence[int], least: int = 1
    ) -> tuple[int, ...]:
        """A setting of voxels along each axis: the predictor's own, else the dataset's, else the default."""
        values = getattr(self, key)
        goes_with_patch = key == "stride_shape" and self.patch_shape is not None
        if values is None and not goes_with_patch:  # the dataset's stride goes with the dataset's patch
            values = getattr(dataset, key, None)
        voxels = tuple(default if values is None else values)
        axis = getattr(dataset, "axis", None)
        if axis is not None and len(voxels) == len(volume.shape) - 1:  # of slices
            voxels = (*voxels[:axis], 0 if key == "halo_shape" else 1, *voxels[axis:])
        if len(voxels) != len(volume.shape) or min(voxels) < least:
            text = f"predictor.{key}: {list(voxels)} does not fit {volume.path} of {volume.shape}"
            raise ConfigError(f"{text}; expected {len(volume.shape)} integers of at least {least}")
        return voxels

    def file_spec(
        self, path: Path, shape: tuple[int, ...], has_channels: bool = False, source: Path | None = None
    ) -> FileSpec:
        """What a file of predictions is to hold."""
        return FileSpec(path, shape, has_channels, self.dtype, self.output_dataset, self.compression, source)

    def activated(self, logits: Tensor) -> Tensor:
        """Predictions from logits (N, K, ...), of patches that were put together already."""
        activation = self.activation or ("sigmoid" if logits.shape[1] == 1 else "softmax")
        if activation == "softmax":
            return logits.softmax(1)
        return logits.sigmoid() if activation == "sigmoid" else logits
