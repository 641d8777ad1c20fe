"""The dataset of all patches of some volumes: read, augment, hand over as tensors."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dtrain.components.datasets.flat import Axis, across, axis_number, flattened, slices_of, with_axis
from dtrain.components.datasets.slices import Draws, Places, SliceBuilder
from dtrain.components.datasets.statistics import Statistics
from dtrain.components.datasets.volumes import Pad, Region, Volume, padded
from dtrain.components.transforms.pipeline import NEAR, Pipeline

Sample = dict[str, Any]


class PatchDataset(Dataset[Any]):
    """Patches of volumes, in the volumes' order.

    An item is the image, float32 (C, *patch); with labels (image, label), the label (*patch) or (K, *patch), int64, or
    float32 where floats are stored; with weights (image, (label, weight)), the weight float32 (*patch).

    Args:
        volumes: What to take patches of.
        files: Every file that is read.
        slice_builder: Where the patches lie. Default: each volume is one item.
        transforms: What is done to each patch, in this order.
        global_normalization: Read each file once, whole, and give its statistics to the transforms: the sample's
            `stats`, see Statistics.
        random_scale: Voxels by which a patch may be larger or smaller along each axis, one number or one per axis; it
            is resampled to the patch's shape, the image and the weight linearly, the label to the nearest.
        random_scale_probability: How often that is done.
        axis: z | y | x: an item is a slice across this axis, or a patch of one, without the axis: (C, H, W). A
            slice_builder then has two numbers per shape.

    Attributes:
        volumes: The volumes.
        files: Every file that is read, absolute, without links.
        places: The volume's number and the region of each item; the whole volume where the region is drawn each time.
        patch_shape: Spatial, or None where each volume is one item.
        stride_shape: Likewise.
        halo_shape: What prediction reads around each patch.
        pad: What lies outside of a volume that is smaller than the patch, and around one that is predicted; None: such
            a volume is refused, and what is around one is reflected.
        axis: The number of the axis that items lack, or None. The shapes above have 1, 1 and 0 there.
        stats: Each volume's statistics, or None.
        random: Whether items draw random numbers, from torch's global generator.

    Raises:
        ValueError: The volumes do not fit one another or the patch, or there is no patch.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        files: Sequence[Path],
        slice_builder: SliceBuilder | None = None,
        transforms: Sequence[Any] | None = None,
        global_normalization: bool = False,
        random_scale: int | list[int] | None = None,
        random_scale_probability: float = 0.5,
        axis: Axis | None = None,
    ) -> None:
        _check_alike(volumes)
        self.volumes, self.files = list(volumes), tuple(path.resolve() for path in files)
        dims = len(self.volumes[0].shape)
        self.axis = None if axis is None else axis_number(axis, self.volumes)
        if slice_builder and self.axis is not None:
            slice_builder = across(slice_builder, self.axis)
        self.patch_shape = slice_builder.patch_shape if slice_builder else None
        self.stride_shape = slice_builder.stride_shape if slice_builder else None
        self.halo_shape = slice_builder.halo_shape if slice_builder else (0,) * dims
        self.pad: Pad | None = slice_builder.pad if slice_builder else None
        self.ignore_index = _void(self.volumes[0], slice_builder)
        self.places = self._placed(slice_builder)
        self.pipeline = Pipeline(transforms)
        self.still = self.pipeline.without_random()
        self.random_scale = _scales(random_scale, self.patch_shape, self.axis)
        if not 0 <= random_scale_probability <= 1:
            raise ValueError(f"random_scale_probability is {random_scale_probability}; possible: 0 to 1")
        self.random_scale_probability = random_scale_probability
        self.random = (
            self.pipeline.random or bool(self.random_scale and random_scale_probability) or self.places.are_drawn
        )
        percents = self.pipeline.percents
        self.stats = [Statistics(volume, percents) for volume in self.volumes] if global_normalization else None

    def _placed(self, slice_builder: SliceBuilder | None) -> Places:
        if slice_builder:
            return slice_builder.places_of(self.volumes)
        if self.axis is not None:
            return slices_of(self.volumes, self.axis)
        return Places([[whole(item)] for item in self.volumes])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        number, region = self.places[index]
        seed = int(torch.randint(2**62, ())) if self.random else 0
        rng = np.random.default_rng(seed)
        if isinstance(part := self.places.parts[number], Draws):
            region = part.draw(rng)
        if self.random_scale and rng.random() < self.random_scale_probability:
            assert self.patch_shape is not None
            sample = self.sample(number, _scaled(region, self.random_scale, self.volumes[number].shape, rng))
            kept = (extent for number, extent in enumerate(self.patch_shape) if number != self.axis)
            sample = resampled(sample, tuple(kept))
        else:
            sample = self.sample(number, region)
        sample = self.pipeline(sample, rng)
        image = torch.from_numpy(sample["image"].astype(np.float32, copy=False))
        if "label" not in sample:
            return image
        label = _label(sample["label"])
        if "weight" not in sample:
            return image, label
        return image, (label, torch.from_numpy(sample["weight"].astype(np.float32, copy=False)))

    def only(self, numbers: Sequence[int]) -> "PatchDataset":
        """The same of some of the volumes, by their numbers; what was read of them is shared."""
        result = copy.copy(self)
        parts = self.places.parts
        result.volumes = [self.volumes[number] for number in numbers]
        result.files = tuple(volume.path.resolve() for volume in result.volumes)
        result.places = Places([parts[number] for number in numbers], self.places.notes)
        result.stats = None if self.stats is None else [self.stats[number] for number in numbers]
        return result

    def where(self, index: int) -> str:
        """The file and the region of an item, for messages; transforms may have changed what lies where in it."""
        number, region = self.places[index]
        return f"{self.volumes[number].path} [{', '.join(f'{part.start}:{part.stop}' for part in region)}]"

    def sample(self, number: int, region: Region, *, only_image: bool = False) -> Sample:
        """What stands in a volume, before any transform.

        Args:
            number: The volume's.
            region: Spatial; what is outside of the volume is as `pad` has it, else reflected. The label is there
                `ignore_index`, if there is one, and has no weight; else it is padded as the image, but 0 and without
                weight where that is a number.
            only_image: Leave out the label and the weight.

        Returns:
            `image`, without the dataset's `axis`, and where there are any `label`, `weight` and `stats`; and `affine`,
            from the patch's voxels to millimetres, float64 (4, 4), where the file tells it.
        """
        volume = self.volumes[number]
        sample: Sample = {"image": padded(volume.read, region, volume.shape, self.pad)}
        if (affine := getattr(volume, "affine", None)) is not None:
            sample["affine"] = affine @ _shift([part.start for part in region])
        if volume.has_label and not only_image:
            is_number = self.pad not in (None, "reflect", "edge")
            fill, void = (0 if is_number else self.pad), self.pad is not None and self.ignore_index is not None
            sample["label"] = padded(volume.read_label, region, volume.shape, self.ignore_index if void else fill)
            if volume.has_weight:
                sample["weight"] = padded(volume.read_weight, region, volume.shape, 0 if void else fill)
        if self.stats is not None:
            sample["stats"] = self.stats[number]
        return sample if self.axis is None else flattened(sample, self.axis)

    def prepared(self, sample: Sample) -> Sample:
        """A sample after the transforms that draw nothing; what prediction uses, which writes each voxel where it was.

        Raises:
            ValueError: A transform moved the voxels in space.
        """
        result = self.still(sample, np.random.default_rng(0))
        before, after = sample.get("affine"), result.get("affine")
        if before is not None and (after is None or not np.allclose(after, before, atol=NEAR)):
            raise ValueError(
                "the transforms move the voxels in space, as Spacingd and Orientationd do, but a prediction is written "
                "where the file has them; leave such transforms out of this phase, and resample its files before"
            )
        return result


def whole(volume: Volume) -> Region:
    """The region of a whole volume."""
    return tuple(slice(0, extent) for extent in volume.shape)


def resampled(sample: Sample, shape: tuple[int, ...]) -> Sample:
    """A sample stretched or squeezed to another spatial shape, linearly but for its label, which takes the nearest.

    Args:
        sample: `image` (C, *spatial), and perhaps `label` and `weight`; other entries stay.
        shape: The spatial shape that is wanted.
    """
    extent = sample["image"].shape[1:]
    if extent == shape:
        return sample
    result = sample | {"image": _linear(sample["image"], shape)}
    if sample.get("affine") is not None:
        steps = np.array([old / new for old, new in zip(extent, shape, strict=True)] + [1.0] * (3 - len(shape)))
        result["affine"] = sample["affine"] @ _shift(list((steps - 1) / 2)) @ np.diag([*steps, 1.0])
    if "label" in sample:
        # The voxel in which the centre of the new one lies.
        nearest = [((np.arange(new) + 0.5) * old / new).astype(np.intp) for old, new in zip(extent, shape, strict=True)]
        result["label"] = sample["label"][(..., *np.ix_(*nearest))]
    if "weight" in sample:
        result["weight"] = _linear(sample["weight"][np.newaxis], shape)[0]
    return result


def _shift(voxels: Sequence[float]) -> np.ndarray:
    """From the voxels of a part that starts there to those of the whole, (4, 4)."""
    result = np.eye(4)
    result[: len(voxels), 3] = voxels
    return result


def _linear(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return F.interpolate(torch.from_numpy(values)[None], shape, mode=mode, align_corners=False)[0].numpy()


def _label(values: np.ndarray) -> Tensor:
    """Whole numbers as int64, which is what losses index with; others as float32."""
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False))


def _scaled(region: Region, most: tuple[int, ...], shape: tuple[int, ...], rng: np.random.Generator) -> Region:
    """A region around the same centre, of another extent, moved to where it lies within the volume."""
    result = []
    for part, change, extent in zip(region, most, shape, strict=True):
        space = max(extent, part.stop)  # of a volume that is padded, the patch's
        size = min(part.stop - part.start + int(rng.integers(-change, change + 1)), space)
        low = (part.start + part.stop - size) // 2
        low = min(max(low, 0), space - size)
        result.append(slice(low, low + size))
    return tuple(result)


def _scales(
    wish: int | Sequence[int] | None, patch: tuple[int, ...] | None, axis: int | None = None
) -> tuple[int, ...]:
    """The largest change of extent along each axis; empty where there is none."""
    if not wish:
        return ()
    if patch is None:
        raise ValueError("random_scale needs patches; give a slice_builder")
    most = (wish,) * (len(patch) - (axis is not None)) if isinstance(wish, int) else tuple(wish)
    most = most if axis is None else with_axis(most, axis, 0)
    if len(most) != len(patch) or any(not 0 <= change < extent for change, extent in zip(most, patch, strict=False)):
        raise ValueError(
            f"random_scale is {wish} and patch_shape {patch}; expected a number smaller than the patch along each axis"
        )
    return most if any(most) else ()


def _void(volume: Volume, slice_builder: SliceBuilder | None) -> int | None:
    """The label that does not count: the slice builder's, else the one that the volumes may hold."""
    own: int | None = getattr(slice_builder, "ignore_index", None)
    return getattr(getattr(volume, "checks", None), "ignore_index", None) if own is None else own


def _check_alike(volumes: Sequence[Volume]) -> None:
    """Whether one batch could hold patches of any of them."""
    if not volumes:
        raise ValueError("there is nothing to read")
    first = volumes[0]
    for volume in volumes[1:]:
        if len(volume.shape) != len(first.shape):
            what = f"has {len(volume.shape)} spatial dimensions, {first.path} {len(first.shape)}"
        elif volume.channels != first.channels:
            what = f"has {volume.channels} channels, {first.path} {first.channels}"
        else:
            continue
        raise ValueError(f"{volume.path} {what}; all files of a dataset must agree")
