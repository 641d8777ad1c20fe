"""Makes of labels what a network is to learn: boundaries, masks, affinities.

A label of objects, (*spatial) or (1, *spatial), becomes channels (K, *spatial) of whole numbers, int32 or, with the
label itself among them, of a type that holds its numbers. Everything is found by comparing a voxel with others.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from dtrain.components.transforms.sample import Sample, known, spatial_dims

BOUNDARIES = ("thick", "inner", "outer")


class LabelToBoundary:
    """1 on the boundaries between objects, and between objects and background; 0 elsewhere.

    As pytorch-3dunet's StandardLabelToBoundary and skimage.segmentation.find_boundaries with connectivity 2. A voxel is
    compared with its neighbours across faces and edges (8 in 2-D, 18 in 3-D); it is on a boundary if one is different:

    - thick: on both sides, two voxels wide;
    - inner: on the objects' side only; where objects touch, on both;
    - outer: on the background's side only; where objects touch, on both (there, neighbours across corners count too).

    Channels, in this order: the foreground if asked for, the boundary, the label if appended.

    Args:
        mode: thick, inner or outer.
        foreground: A channel before: 1 where the label is above 0.
        append_label: The label itself as the last channel, for metrics that need the objects.
        ignore_index: Where the label has this value, every channel has it.

    Raises:
        ValueError: An unknown mode; when called: a label of several channels.
    """

    random = False

    def __init__(
        self,
        *,
        mode: str = "thick",
        foreground: bool = False,
        append_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.mode = known("LabelToBoundary", "mode", mode, BOUNDARIES)
        self.foreground, self.append_label, self.ignore_index = foreground, append_label, ignore_index

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (1 to 3, *spatial); draws nothing."""
        label = single(sample, "LabelToBoundary")
        channels = [label > 0] if self.foreground else []
        channels.append(boundaries(label, self.mode))
        return sample | {"label": stacked(channels, label, self.ignore_index, self.append_label)}


class BlobsToMask:
    """1 in every object, 0 in the background.

    With `boundary`, a second channel is 1 on the outer boundaries, see LabelToBoundary; or, with `cross_entropy`, the
    one channel holds classes: 0 background, 1 object, 2 boundary.

    Args:
        boundary: Mark the boundaries.
        cross_entropy: As a class of the one channel rather than as a second channel.
        append_label: The label itself as the last channel.

    Raises:
        ValueError: When called: a label of several channels.
    """

    random = False

    def __init__(self, *, boundary: bool = False, cross_entropy: bool = False, append_label: bool = False) -> None:
        self.boundary, self.cross_entropy, self.append_label = boundary, cross_entropy, append_label

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (1 to 3, *spatial); draws nothing."""
        label = single(sample, "BlobsToMask")
        channels = [(label > 0).astype(np.int32)]
        if self.boundary:
            outer = boundaries(label, "outer")
            channels = [np.where(outer, 2, channels[0])] if self.cross_entropy else [*channels, outer]
        return sample | {"label": stacked(channels, label, None, self.append_label)}


class LabelToAffinities:
    """1 where the voxels on both sides, `offset` apart along an axis, have different labels.

    As in pytorch-3dunet, so these are rather boundaries of some thickness than affinities, which are 1 where labels are
    the same (Lee et al. 2017, arXiv:1706.00120). Voxel i is given the pair i + (offset + 1) // 2 - offset and
    i + (offset + 1) // 2; for 1: itself and the next. Outside, the label is reflected.

    Channels: for each offset x, y and z (in 2-D x and y); then the label if appended.

    Args:
        offsets: Distances in voxels along x and y, 1 and more, all different.
        z_offsets: Distances along z, as many; they may be the same, as slices lie further apart. Default: `offsets`.
        aggregate_affinities: One channel for each offset: 1 if it is for any axis.
        append_label: The label itself as the last channel.
        ignore_index: Where the label has this value, every channel has it.

    Raises:
        ValueError: Offsets that are none; when called: a label of several channels.
    """

    random = False

    def __init__(
        self,
        *,
        offsets: Sequence[int],
        z_offsets: Sequence[int] | None = None,
        aggregate_affinities: bool = False,
        append_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.offsets = _offsets("LabelToAffinities", "offsets", offsets)
        along_z = self.offsets if z_offsets is None else z_offsets
        self.z_offsets = _offsets("LabelToAffinities", "z_offsets", along_z, may_repeat=True)
        if len(self.offsets) != len(self.z_offsets):
            raise ValueError(
                f"LabelToAffinities: offsets {offsets} and z_offsets {z_offsets}; expected as many of both"
            )
        self.aggregate_affinities, self.append_label = aggregate_affinities, append_label
        self.ignore_index = ignore_index

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (K, *spatial); draws nothing."""
        label = single(sample, "LabelToAffinities")
        channels: list[np.ndarray] = []
        for offset, z_offset in zip(self.offsets, self.z_offsets, strict=True):
            distances = (offset, offset, z_offset)[: label.ndim]
            pairs = [differs(label, -1 - axis, distance) for axis, distance in enumerate(distances)]
            channels += [np.logical_or.reduce(pairs)] if self.aggregate_affinities else pairs
        return sample | {"label": stacked(channels, label, self.ignore_index, self.append_label)}


class LabelToZAffinities:
    """LabelToAffinities along z alone: one channel for each offset, then the label if appended.

    Args:
        offsets: Distances in voxels, 1 and more, all different.
        append_label: The label itself as the last channel.
        ignore_index: Where the label has this value, every channel has it.

    Raises:
        ValueError: Offsets that are none; when called: a label of several channels, or an image, which has no z.
    """

    random = False

    def __init__(self, *, offsets: Sequence[int], append_label: bool = False, ignore_index: int | None = None) -> None:
        self.offsets = _offsets("LabelToZAffinities", "offsets", offsets)
        self.append_label, self.ignore_index = append_label, ignore_index

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (K, D, H, W); draws nothing."""
        label = single(sample, "LabelToZAffinities")
        if label.ndim != 3:
            raise ValueError(f"LabelToZAffinities: a label of shape {label.shape}; expected (D, H, W)")
        channels = [differs(label, 0, offset) for offset in self.offsets]
        return sample | {"label": stacked(channels, label, self.ignore_index, self.append_label)}


class RandomLabelToAffinities:
    """LabelToAffinities for one random offset along one random axis: one channel, then the label if appended.

    Args:
        max_offset: The offset is drawn from 1 to this.
        z_offset_scale: Along z it is divided by this, but at least 1, since slices lie further apart.
        append_label: The label itself as the last channel.
        ignore_index: Where the label has this value, every channel has it.

    Raises:
        ValueError: A number below 1; when called: a label of several channels.
    """

    random = True

    def __init__(
        self,
        *,
        max_offset: int = 10,
        z_offset_scale: int = 2,
        append_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        if max_offset < 1 or z_offset_scale < 1:
            raise ValueError(
                f"RandomLabelToAffinities: max_offset is {max_offset}, z_offset_scale {z_offset_scale}; "
                "possible: 1 and more"
            )
        self.max_offset, self.z_offset_scale = max_offset, z_offset_scale
        self.append_label, self.ignore_index = append_label, ignore_index

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (1 or 2, *spatial)."""
        label = single(sample, "RandomLabelToAffinities")
        offset, axis = int(rng.integers(1, self.max_offset + 1)), int(rng.integers(label.ndim))
        if axis == 2:
            offset = max(1, offset // self.z_offset_scale)
        channels = [differs(label, -1 - axis, offset)]
        return sample | {"label": stacked(channels, label, self.ignore_index, self.append_label)}


class LabelToBoundaryAndAffinities:
    """The channels of LabelToBoundary, then those of LabelToAffinities, then the label if appended.

    Args:
        xy_offsets: LabelToAffinities' `offsets`.
        z_offsets: LabelToAffinities' `z_offsets`.
        mode: LabelToBoundary's.
        foreground: LabelToBoundary's.
        append_label: The label itself as the last channel.
        ignore_index: Where the label has this value, every channel has it.

    Raises:
        ValueError: What the two raise.
    """

    random = False

    def __init__(
        self,
        *,
        xy_offsets: Sequence[int],
        z_offsets: Sequence[int] | None = None,
        mode: str = "thick",
        foreground: bool = False,
        append_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.parts = (
            LabelToBoundary(mode=mode, foreground=foreground, ignore_index=ignore_index),
            LabelToAffinities(
                offsets=xy_offsets, z_offsets=z_offsets, append_label=append_label, ignore_index=ignore_index
            ),
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (K, *spatial); draws nothing."""
        return sample | {"label": np.concatenate([part(sample, rng)["label"] for part in self.parts])}


class LabelToMaskAndAffinities:
    """1 in every object, then the channels of LabelToAffinities, then the label if appended.

    Args:
        xy_offsets: LabelToAffinities' `offsets`.
        z_offsets: LabelToAffinities' `z_offsets`.
        background: What is above it is an object.
        append_label: The label itself as the last channel.
        ignore_index: Where the label has this value, every channel has it, the mask too (pytorch-3dunet's does not).

    Raises:
        ValueError: What LabelToAffinities raises.
    """

    random = False

    def __init__(
        self,
        *,
        xy_offsets: Sequence[int],
        z_offsets: Sequence[int] | None = None,
        background: int = 0,
        append_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.background, self.ignore_index = background, ignore_index
        self.affinities = LabelToAffinities(
            offsets=xy_offsets, z_offsets=z_offsets, append_label=append_label, ignore_index=ignore_index
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (K, *spatial); draws nothing."""
        label = single(sample, "LabelToMaskAndAffinities")
        mask = stacked([label > self.background], label, self.ignore_index, False)
        return sample | {"label": np.concatenate([mask, self.affinities(sample, rng)["label"]])}


class Relabel:
    """Numbers labels consecutively in the order of their values: [10, 10, 0, 6, 6] becomes [2, 2, 0, 1, 1].

    0 stays 0, the background; in pytorch-3dunet the smallest label becomes 0 where there is no background.

    Args:
        run_cc: Number the connected components (across corners, too) of equal labels instead, as a crop or a
            deformation may have cut objects apart; in the order in which they are met. Needs scikit-image.
        append_original: The label as it was, as a second channel.
        ignore_label: With `run_cc`, voxels of this label are background instead of those of 0, which are components
            then; as in pytorch-3dunet, `append_original` must be true, so that one can tell where they are.

    Raises:
        ValueError: `ignore_label` without `append_original`; when called: a label of several channels.
        ModuleNotFoundError: scikit-image is not installed.
    """

    random = False

    def __init__(self, *, run_cc: bool = True, append_original: bool = False, ignore_label: int | None = None) -> None:
        if ignore_label is not None and not append_original:
            raise ValueError("Relabel: ignore_label needs append_original: true, to tell where it is")
        self.run_cc, self.append_original, self.ignore_label = run_cc, append_original, ignore_label

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (*spatial) int32, or (2, *spatial); draws nothing."""
        label = single(sample, "Relabel")
        numbered = _components(label, self.ignore_label) if self.run_cc else label
        values, ranks = np.unique(numbered, return_inverse=True)
        ranks = ranks.reshape(label.shape).astype(np.int32)
        if values[0] > 0:  # no background in this patch
            ranks += 1
        return sample | {"label": stacked([ranks], label, None, True) if self.append_original else ranks}


class RgbToLabel:
    """R * 65536 + G * 256 + B, for labels that are stored as coloured images.

    Raises:
        ValueError: When called: the label has other than three channels.
    """

    random = False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a label (*spatial) int32, of one (3, *spatial) or (*spatial, 3), 0 to 255; draws nothing."""
        label, space = sample["label"], sample["image"].shape[1:]
        if label.shape == (*space, 3):
            label = np.moveaxis(label, -1, 0)
        if label.shape != (3, *space):
            raise ValueError(f"RgbToLabel: a label of shape {label.shape}; expected three channels, {(3, *space)}")
        red, green, blue = label.astype(np.int32)
        return sample | {"label": red * 65536 + green * 256 + blue}


# ------------------------------------------------------------------------------------------------------ what they share


def single(sample: Sample, owner: str) -> np.ndarray:
    """The label of objects as (*spatial).

    Raises:
        ValueError: It has several channels.
    """
    label: np.ndarray = sample["label"]
    dims = spatial_dims(sample)
    if label.ndim == dims + 1 and len(label) == 1:
        label = label[0]
    if label.ndim != dims:
        raise ValueError(f"{owner}: a label of shape {label.shape}; expected one number per voxel, without channels")
    return label


def stacked(channels: Sequence[np.ndarray], label: np.ndarray, ignore_index: int | None, append: bool) -> np.ndarray:
    """Channels as one array (K, *spatial), int32 or what holds the appended label too.

    Args:
        channels: (*spatial) each.
        label: (*spatial), the label they were made of.
        ignore_index: Where the label has this value, every channel has it.
        append: The label is the last channel.
    """
    result = np.stack(channels).astype(np.int32, copy=False)
    if ignore_index is not None:
        result[:, label == ignore_index] = ignore_index
    if append:
        kind: Any = np.int64 if label.dtype == np.uint64 else np.result_type(np.int32, label.dtype)
        result = np.concatenate([result, label[None]]).astype(kind, copy=False)
    return result


def boundaries(label: np.ndarray, mode: str) -> np.ndarray:
    """Where a label changes; see LabelToBoundary.

    Args:
        label: (*spatial).
        mode: thick, inner or outer.

    Returns:
        bool, (*spatial).
    """
    found = np.zeros(label.shape, dtype=bool)
    for here, there in _neighbours(label.ndim, 2):
        different = label[here] != label[there]
        found[here] |= different
        found[there] |= different
    if mode == "inner":
        found &= label != 0
    if mode == "outer":
        touching = label == 0
        for here, there in _neighbours(label.ndim, label.ndim):
            one, other = label[here], label[there]
            objects = (one != other) & (one != 0) & (other != 0)
            touching[here] |= objects
            touching[there] |= objects
        found &= touching
    return found


def _neighbours(dims: int, connectivity: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Slices of an array and of its neighbours in one direction, for half of all directions."""
    sides = {-1: (slice(1, None), slice(None, -1)), 0: (slice(None), slice(None)), 1: (slice(None, -1), slice(1, None))}
    for step in product((-1, 0, 1), repeat=dims):
        if step > (0,) * dims and np.count_nonzero(step) <= connectivity:
            here, there = zip(*(sides[part] for part in step), strict=True)
            yield here, there


def differs(label: np.ndarray, axis: int, offset: int) -> np.ndarray:
    """Whether the two voxels that lie `offset` apart around each voxel differ; see LabelToAffinities.

    Args:
        label: (*spatial).
        axis: Along which.
        offset: In voxels, 1 and more.

    Returns:
        bool, (*spatial).
    """
    size = label.shape[axis]
    upper = np.arange(size) + (offset + 1) // 2
    reflected = [np.where(at % (2 * size) < size, at % size, size - 1 - at % size) for at in (upper, upper - offset)]
    return label.take(reflected[0], axis) != label.take(reflected[1], axis)


def _offsets(owner: str, name: str, value: Sequence[int], may_repeat: bool = False) -> tuple[int, ...]:
    good = isinstance(value, list | tuple) and all(type(offset) is int and offset > 0 for offset in value)
    if not good or not value or (len(set(value)) < len(value) and not may_repeat):
        expected = f"{'' if may_repeat else 'different '}whole numbers, 1 and more"
        raise ValueError(f"{owner}: {name} is {value!r}; expected {expected}")
    return tuple(value)


def _components(label: np.ndarray, background: int | None) -> np.ndarray:
    try:
        from skimage.measure import label as components
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Relabel with run_cc needs scikit-image: pip install scikit-image") from error
    return components(label, background=background)
