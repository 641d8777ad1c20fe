"""What a sample is, and changing all of it alike."""

from collections.abc import Callable
from typing import Any

import numpy as np

Sample = dict[str, Any]
ARRAYS = ("image", "label", "weight")  # what of a sample is an array over space


def spatial_dims(sample: Sample) -> int:
    """2 for an image (C, H, W), 3 for a volume (C, D, H, W).

    Raises:
        ValueError: The image is neither, or the label or weight is of other places.
    """
    image = sample["image"]
    dims: int = image.ndim - 1
    if dims not in (2, 3):
        raise ValueError(f"an image of shape {image.shape}; expected (C, H, W) or (C, D, H, W)")
    for key in ARRAYS[1:]:
        if key in sample and (sample[key].shape[-dims:] != image.shape[1:] or sample[key].ndim > dims + 1):
            raise ValueError(f"an image of shape {image.shape} with a {key} of shape {sample[key].shape}")
    return dims


def in_space(sample: Sample, change: Callable[[str, np.ndarray], np.ndarray]) -> Sample:
    """The sample with each of its arrays changed.

    Args:
        sample: It is not changed.
        change: Gets the key and an array that has a channel axis, (K, *spatial); returns an array that has one, too.

    Returns:
        A new dict; what had no channel axis has none again. Where in space its voxels lie, `affine`, becomes None if it
        was known: it is not any more.
    """
    dims = spatial_dims(sample)
    result = dict(sample) | ({"affine": None} if "affine" in sample else {})
    for key in ARRAYS:
        if key in sample:
            bare = sample[key].ndim == dims
            changed = change(key, sample[key][None] if bare else sample[key])
            result[key] = changed[0] if bare else changed
    return result


def spatial_axis(axis: int, dims: int, owner: str) -> int:
    """An axis of space, counted from 0 or from the end, as one counted from the end: -1 is W.

    Raises:
        ValueError: There is no such axis.
    """
    if not -dims <= axis < dims:
        raise ValueError(
            f"{owner}: there is no axis {axis} in {dims}-D data; possible: 0 to {dims - 1}, or -{dims} to -1"
        )
    return axis - dims if axis >= 0 else axis


# --------------------------------------------------------------------------------------- what a constructor is given


def share(owner: str, name: str, value: float) -> float:
    """A probability, 0 to 1.

    Raises:
        ValueError: It is none.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} is {value}; possible: 0 to 1")
    return value


def bounds(owner: str, name: str, value: Any, least: float = -np.inf) -> tuple[float, float]:
    """A range [low, high].

    Raises:
        ValueError: It is none, or begins below `least`.
    """
    good = isinstance(value, list | tuple) and len(value) == 2 and least <= value[0] <= value[1] < np.inf
    if not good:
        border = f" of at least {least:g}" if least > -np.inf else ""
        raise ValueError(f"{owner}: {name} is {value!r}; expected two numbers{border}, [lowest, highest]")
    return float(value[0]), float(value[1])


def plane(owner: str, name: str, value: Any) -> tuple[int, int]:
    """Two different axes.

    Raises:
        ValueError: It is something else.
    """
    good = isinstance(value, list | tuple) and len(value) == 2 and all(type(axis) is int for axis in value)
    if not good or value[0] == value[1]:
        raise ValueError(f"{owner}: {name} is {value!r}; expected two different axes, e.g. [1, 2]")
    return value[0], value[1]


def known(owner: str, name: str, value: Any, possible: tuple[Any, ...]) -> Any:
    """One of several values.

    Raises:
        ValueError: It is none of them.
    """
    if value not in possible:
        raise ValueError(f"{owner}: {name} is {value!r}; possible: {', '.join(map(str, possible))}")
    return value
