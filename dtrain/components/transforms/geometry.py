"""Flips, quarter turns and crops of image, label and weight together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.components.transforms.sample import Sample, in_space, plane, share, spatial_axis, spatial_dims


class RandomFlip:
    """Mirrors along each of some axes, or does not.

    Args:
        axes: Axes of space, 0 the first of (D, H, W) or (H, W), -1 the last. Default: all.
        axis_prob: The probability of mirroring, for each axis.

    Raises:
        ValueError: The probability is not from 0 to 1; when called: the data have no such axis.
    """

    random = True

    def __init__(self, *, axes: Sequence[int] | None = None, axis_prob: float = 0.5) -> None:
        self.axes = None if axes is None else tuple(axes)
        self.axis_prob = share("RandomFlip", "axis_prob", axis_prob)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, shapes unchanged."""
        dims = spatial_dims(sample)
        axes = [spatial_axis(axis, dims, "RandomFlip") for axis in (range(dims) if self.axes is None else self.axes)]
        chosen = [axis for axis in axes if rng.random() < self.axis_prob]
        return in_space(sample, lambda _, array: np.flip(array, tuple(chosen)))


class RandomRotate90:
    """Turns by 0, 90, 180 or 270 degrees, each as likely; by 0 or 180 where the plane is not square.

    Args:
        axes: The two axes of the plane. Default: the last two, H and W.

    Raises:
        ValueError: These are not two axes; when called: the data have no such axis.
    """

    random = True

    def __init__(self, *, axes: Sequence[int] = (-2, -1)) -> None:
        self.axes = plane("RandomRotate90", "axes", axes)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, shapes unchanged."""
        dims = spatial_dims(sample)
        first, second = (spatial_axis(axis, dims, "RandomRotate90") for axis in self.axes)
        turns = int(rng.integers(4))
        if sample["image"].shape[first] != sample["image"].shape[second]:
            turns = 2 * (turns % 2)  # samples of other shapes would fit into no batch
        return in_space(sample, lambda _, array: np.rot90(array, turns, (first, second)))


class CropToFixed:
    """Cuts a window of a fixed size; what is too small is first padded on both sides by reflection.

    Args:
        size: The window along the last axes of space: [H, W], or [D, H, W]. Axes before them are left whole.
        centered: The window lies in the middle, and nothing is drawn; otherwise each place is as likely.

    Raises:
        ValueError: The size is not a list of two or three positive numbers; when called: the data have fewer axes.
    """

    def __init__(self, *, size: Sequence[int] = (256, 256), centered: bool = False) -> None:
        if len(size) not in (2, 3) or not all(type(extent) is int and extent > 0 for extent in size):
            raise ValueError(f"{type(self).__name__}: size is {size!r}; expected [H, W] or [D, H, W], 1 and more each")
        self.size = tuple(size)
        self.random = not centered

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with the window's shape along the last axes."""
        dims = spatial_dims(sample)
        if len(self.size) > dims:
            raise ValueError(f"{type(self).__name__}: size is {list(self.size)} for {dims}-D data")
        if not self.random and sample["image"].shape[-len(self.size) :] == self.size:
            return sample
        window: list[Any] = [...]
        padding = [(0, 0)] * (1 + dims - len(self.size))
        for found, wanted in zip(sample["image"].shape[-len(self.size) :], self.size, strict=True):
            spare, lack = max(0, found - wanted), max(0, wanted - found)
            start = int(rng.integers(spare + 1)) if self.random else spare // 2
            window.append(slice(start, start + wanted))
            padding.append((lack // 2, lack - lack // 2))

        def cut(_: str, array: np.ndarray) -> np.ndarray:
            part = array[tuple(window)]
            return np.pad(part, padding, "reflect") if any(map(any, padding)) else part

        return in_space(sample, cut)


class RandomCrop(CropToFixed):
    """Cuts a window of a fixed size at a random place; what is too small is first padded by reflection.

    Args:
        size: The window along the last axes of space: [H, W], or [D, H, W]. Axes before them are left whole.

    Raises:
        ValueError: The size is not a list of two or three positive numbers; when called: the data have fewer axes.
    """

    def __init__(self, *, size: Sequence[int]) -> None:
        super().__init__(size=size)
