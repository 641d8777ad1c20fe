"""Predictor: the settings of predictions; which patches of a dataset go in, and what comes out."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from dtrain.config.errors import ConfigError
from dtrain.predict.patches import Grid, Region
from dtrain.predict.segmentation import Choice
from dtrain.predict.stitching import Source, Volume


class Predictor:
    """Predicts whole volumes from patches. Its settings are the keys under `predictor` in the config.

    Args:
        name: StandardPredictor or LazyPredictor, as pytorch-3dunet's files say; both mean this one.
        checkpoint: A checkpoint folder or weight file. Default: the best of checkpoint_dir, else the last.
        output_dir: Where the files go. Default: predictions in the run folder.
        format: hdf5 | tiff | png | nifti | npy, for a dataset without volumes hdf5 | npy | csv. Default: hdf5; nifti
            for NIfTI files; png for the segmentation of images.
        output_dataset: The dataset in an HDF5 file.
        compression: gzip | lzf. Default: none.
        dtype: Of the numbers in the files: float32 for probabilities, the smallest that will do for labels.
        activation: softmax | sigmoid | none. Default: sigmoid for one channel, softmax for several.
        patch_shape: Voxels of a patch. Default: the dataset's, else the whole volume.
        stride_shape: From patch to patch. Default: the dataset's, else the patch's.
        halo_shape: Voxels read around a patch and cut off its prediction. Default: the dataset's.
        blend: gaussian | constant: how overlapping patches are averaged.
        batch_size: Patches that the model gets at once. Default: the loader's.
        save_segmentation: Classes instead of probabilities.
        threshold: What counts as foreground where there is one channel.
        prediction_channel: Keep this channel alone.
        instances: foreground | inverted: number the connected components of the foreground, or of what is no boundary.
        connectivity: 1: faces touch; 2: edges, too; 3: corners, too.
        min_size: Voxels of the smallest instance that is kept.
        slab_planes: Planes of a part, the least that an interruption can cost. Default: those of some 4 million voxels.
        performance_metric: dice | mean_iou, of each volume that has a label.
        gt_internal_path: The label's dataset in an HDF5 input. Default: the dataset's own labels.

    Raises:
        ConfigError: Settings that exclude one another.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        name: Literal["StandardPredictor", "LazyPredictor"] | None = None,
        checkpoint: str | None = None,
        output_dir: str | None = None,
        format: Literal["hdf5", "tiff", "png", "nifti", "npy", "csv"] | None = None,
        output_dataset: str = "predictions",
        compression: Literal["gzip", "lzf"] | None = None,
        dtype: Literal["float16", "float32", "uint8", "uint16", "uint32"] | None = None,
        activation: Literal["softmax", "sigmoid", "none"] | None = None,
        patch_shape: list[int] | None = None,
        stride_shape: list[int] | None = None,
        halo_shape: list[int] | None = None,
        blend: Literal["gaussian", "constant"] = "gaussian",
        batch_size: int | None = None,
        save_segmentation: bool = False,
        threshold: float = 0.5,
        prediction_channel: int | None = None,
        instances: Literal["foreground", "inverted"] | None = None,
        connectivity: int = 1,
        min_size: int = 0,
        slab_planes: int | None = None,
        performance_metric: Literal["dice", "mean_iou"] | None = None,
        gt_internal_path: str | None = None,
    ) -> None:
        self.checkpoint, self.output_dir, self.format = checkpoint, output_dir, format
        self.output_dataset, self.compression, self.dtype = output_dataset, compression, dtype
        self.activation, self.blend, self.batch_size = activation, blend, batch_size
        self.patch_shape, self.stride_shape, self.halo_shape = patch_shape, stride_shape, halo_shape
        self.connectivity, self.min_size, self.slab_planes = connectivity, min_size, slab_planes
        self.performance_metric, self.gt_internal_path = performance_metric, gt_internal_path
        self.choice = Choice(save_segmentation, instances, threshold, prediction_channel)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        labels, dtype = self.choice.labels, self.dtype or ""
        wrong = {
            "predictor.dtype: labels need whole numbers; possible: uint8, uint16, uint32": labels and "float" in dtype,
            "predictor.dtype: whole numbers hold probabilities, not what activation: none gives": (
                not labels and "uint" in dtype and self.activation == "none"
            ),
            "predictor.performance_metric: compares classes, not numbered instances; remove one of them": (
                self.choice.instances and self.performance_metric
            ),
            "predictor.compression: lzf is HDF5's own; other formats know gzip alone": (
                self.compression == "lzf" and self.format not in (None, "hdf5")
            ),
        }
        for text, true in wrong.items():
            if true:
                raise ConfigError(text)

    def source(self, dataset: Any) -> Source:
        """The patches of a dataset with `volumes`.

        Raises:
            ConfigError: The patch, the stride or the halo does not fit the volumes.
        """
        volumes: Sequence[Volume] = dataset.volumes
        grids, halos = [], []
        for volume in volumes:
            patch = self._extent("patch_shape", dataset, volume, volume.shape)
            stride = self._extent("stride_shape", dataset, volume, patch)
            if any(step > length for step, length in zip(stride, patch, strict=True)):
                text = f"predictor.stride_shape: {list(stride)} is larger than the patch, {list(patch)}"
                raise ConfigError(f"{text}; what lies between would have no prediction")
            grids.append(Grid(volume.shape, patch, stride, self.blend))
            halos.append(self._extent("halo_shape", dataset, volume, (0,) * len(volume.shape), least=0))

        def sample(number: int, region: Region) -> dict[str, Any]:
            if hasattr(dataset, "sample"):  # which adds, say, the volume's statistics for its transforms
                return dataset.sample(number, region, only_image=True)
            return {"image": volumes[number].read(region)}

        return Source(volumes, grids, halos, sample, getattr(dataset, "prepared", lambda sample: sample))

    def _extent(
        self, name: str, dataset: Any, volume: Volume, default: Sequence[int], least: int = 1
    ) -> tuple[int, ...]:
        own = getattr(self, name)
        given = own if own is not None else getattr(dataset, name, None)
        if own is None and name == "stride_shape" and self.patch_shape is not None:
            given = None  # the dataset's stride goes with the dataset's patch
        values = tuple(default if given is None else given)
        if len(values) != len(volume.shape) or min(values) < least:
            text = f"predictor.{name}: {list(values)} does not fit {volume.path} of {volume.shape}"
            raise ConfigError(f"{text}; expected {len(volume.shape)} whole numbers from {least} on")
        return values

    def activated(self, logits: Tensor) -> Tensor:
        """Predictions from logits (N, K, ...)."""
        kind = self.activation or ("sigmoid" if logits.shape[1] == 1 else "softmax")
        if kind == "softmax":
            return logits.softmax(1)
        return logits.sigmoid() if kind == "sigmoid" else logits
