"""Volumes as stacks of slices, for 2-D networks: which axis is cut, where the slices lie, and samples without it."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dtrain.components.datasets.slices import Grid, Places, SliceBuilder
from dtrain.components.datasets.volumes import Volume

Axis = Literal["z", "y", "x"]
Sample = dict[str, Any]


def axis_number(axis: Axis, volumes: Sequence[Volume]) -> int:
    """Which of the volumes' axes it is. They are z, y, x, unless a volume's `axis_names` say otherwise, as NIfTI's.

    Raises:
        ValueError: There is no such axis, or a volume is an image already.
    """
    for volume in volumes:
        if len(volume.shape) != 3:
            raise ValueError(f"axis is {axis}, and {volume.path} has the extent {volume.shape}; expected three axes")
    names = getattr(volumes[0], "axis_names", "zyx")
    if axis not in tuple(names):
        raise ValueError(f"axis is {axis}; possible: {', '.join(names)}")
    return names.index(axis)


def with_axis(values: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    """Two numbers, one per axis of a slice, as three."""
    return (*values[:axis], value, *values[axis:])


def across(builder: SliceBuilder, axis: int) -> SliceBuilder:
    """A slice builder of a slice's two axes as one of volumes, whose patches are one voxel thick.

    Raises:
        ValueError: It has not two numbers per shape.
    """
    if len(builder.patch_shape) != 2:
        found = f"slice_builder: patch_shape is {list(builder.patch_shape)}"
        raise ValueError(f"{found}; with axis, a patch has the two numbers of a slice")
    result = copy.copy(builder)
    result.patch_shape = with_axis(builder.patch_shape, axis, 1)
    result.stride_shape = with_axis(builder.stride_shape, axis, 1)
    result.halo_shape = with_axis(builder.halo_shape, axis, 0)
    return result


def slices_of(volumes: Sequence[Volume], axis: int) -> Places:
    """Every slice of every volume."""
    shapes = [tuple(volume.shape) for volume in volumes]
    patches = [(*shape[:axis], 1, *shape[axis + 1 :]) for shape in shapes]
    return Places([Grid(shape, patch, patch) for shape, patch in zip(shapes, patches, strict=True)])


def flattened(sample: Sample, axis: int) -> Sample:
    """A sample that is one voxel thick without that axis; its affine has the axis's column behind the others."""
    result = dict(sample)
    for key in ("image", "label", "weight"):
        if key in sample:
            result[key] = sample[key].take(0, axis - 3)
    if sample.get("affine") is not None:
        columns = [column for column in range(3) if column != axis]
        result["affine"] = np.asarray(sample["affine"])[:, [*columns, axis, 3]]
    return result
