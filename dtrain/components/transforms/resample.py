"""Reads arrays between their grid points."""

import itertools
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

# What lies outside of an array, and the words of numpy.pad and of scipy.ndimage for it.
MODES = {
    "reflect": ("symmetric", "reflect"),
    "mirror": ("reflect", "mirror"),
    "nearest": ("edge", "nearest"),
    "constant": ("constant", "grid-constant"),
}
ORDERS = (0, 1, 2, 3, 4, 5)
SETTLED = 12  # voxels after which the border no longer shows in a spline's coefficients: 0.27 ** 12 < 1e-6
LARGEST = 12  # times the array's own size, up to which padding is cheaper than folding each place back inside


def resample(array: np.ndarray, places: np.ndarray, order: int, mode: str = "reflect", fill: float = 0.0) -> np.ndarray:
    """The values of arrays at any places, as scipy.ndimage.map_coordinates gives them.

    The array is padded as far as the places reach, so that no place needs to be folded back inside, and then read by
    its index (order 0: exact for every type) or by torch (order 1; order 3 in planes, as four reads of order 1: Sigg &
    Hadwiger, GPU Gems 2, chapter 20; in space, eight reads would take longer than scipy). All else is scipy's.

    Args:
        array: (B, C, *space), space of n = 2 or 3 axes; float32 unless the order is 0.
        places: (n, B or 1, *out), float32, in voxels; the same ones for all B arrays if there is one set only.
        order: Of the spline: 0 nearest, 1 linear, 3 cubic.
        mode: What is outside: reflect (d c b a | a b c d | d c b a), mirror (the edge is not repeated), nearest,
            constant.
        fill: The value outside with `constant`.

    Returns:
        (B, C, *out), of the array's type.
    """
    space = array.shape[2:]
    lowest = [int(np.floor(axis.min())) for axis in places]
    highest = [int(np.ceil(axis.max())) for axis in places]
    extra = SETTLED if order > 1 else 0
    margins = [
        (max(0, -low) + extra, max(0, high - size + 1) + extra)
        for low, high, size in zip(lowest, highest, space, strict=True)
    ]
    padded = np.prod([size + sum(margin) for size, margin in zip(space, margins, strict=True)])
    ours = order in (0, 1) or (order == 3 and len(space) == 2)
    if not ours or padded > LARGEST * np.prod([size + 2 * extra for size in space]):
        return _by_scipy(array, places, order, mode, fill)
    array = _padded(array, margins, mode, fill)
    shifts = np.array([before for before, _ in margins], dtype=np.float32)
    places = places + shifts.reshape(-1, *[1] * (places.ndim - 1))
    if order == 0:
        return _nearest(array, places)
    if order == 1:
        return _linear(torch.from_numpy(array), torch.from_numpy(places)).numpy()
    return _cubic(array, places)


def _padded(array: np.ndarray, margins: list[tuple[int, int]], mode: str, fill: float) -> np.ndarray:
    if not any(map(any, margins)):
        # A copy of what is read-only: torch warns of it, though nothing here writes.
        return np.require(array, requirements=["C", "W"])
    options: Any = {"constant_values": fill} if mode == "constant" else {}
    options["mode"] = MODES[mode][0]
    return np.pad(array, [(0, 0), (0, 0), *margins], **options)


def _nearest(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    index = np.zeros(places.shape[1:], dtype=np.intp)
    for size, axis in zip(array.shape[2:], places, strict=True):
        index *= size
        index += np.rint(axis).astype(np.intp)
    flat = array.reshape(*array.shape[:2], -1)
    if len(index) == 1:
        return flat.take(index[0], axis=2)
    return np.stack([one.take(where, axis=1) for one, where in zip(flat, index, strict=True)])


def _linear(array: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor(array.shape[2:], dtype=torch.float32).reshape(-1, *[1] * (places.dim() - 1))
    # grid_sample counts axes from the last one, and from -1 to 1 over the outer edges of the voxels.
    grid = (places * (2 / sizes) + (1 / sizes - 1)).flip(0).movedim(0, -1)
    grid = grid.expand(len(array), *grid.shape[1:])
    return F.grid_sample(array, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _cubic(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The cubic B-spline through the values; of its four weights along an axis, two at a time are one linear read."""
    from scipy import ndimage

    coefficients = array
    for axis in range(2, array.ndim):
        coefficients = ndimage.spline_filter1d(coefficients, 3, axis, np.float32, "mirror")
    spline, points = torch.from_numpy(coefficients), torch.from_numpy(places)
    base = points.floor()
    t = points - base
    square = t * t
    fourth = square * t / 6
    second = 2 / 3 - square + 3 * fourth
    upper = 1 / 6 + (t + square) / 2 - 2 * fourth  # the third and the fourth
    lower = 1 - upper
    reads = (base - 1 + second / lower, base + 1 + fourth / upper)
    weights = (lower, upper)
    result = torch.zeros(())
    for corner in itertools.product((0, 1), repeat=len(points)):
        weight = torch.stack([weights[side][axis] for axis, side in enumerate(corner)]).prod(0)
        read = torch.stack([reads[side][axis] for axis, side in enumerate(corner)])
        result = result + weight[:, None] * _linear(spline, read)
    return result.numpy()


def _by_scipy(array: np.ndarray, places: np.ndarray, order: int, mode: str, fill: float) -> np.ndarray:
    from scipy import ndimage

    result = np.empty((*array.shape[:2], *places.shape[2:]), array.dtype)
    for sample, channel in np.ndindex(array.shape[:2]):
        where = places[:, sample if places.shape[1] > 1 else 0]
        values = array[sample, channel]
        ndimage.map_coordinates(values, where, result[sample, channel], order=order, mode=MODES[mode][1], cval=fill)
    return result
