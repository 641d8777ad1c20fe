"""Turns, scales and bends image, label and weight together."""

import functools
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dtrain.components.transforms.resample import MODES, ORDERS, resample
from dtrain.components.transforms.sample import (
    Sample,
    bounds,
    in_space,
    known,
    plane,
    share,
    spatial_axis,
    spatial_dims,
)


class Interpolation:
    """How each array of a sample is read between its grid points.

    Args:
        owner: The transform, for messages.
        order: Of the image's spline: 0 nearest, 1 linear, 3 cubic.
        label_order: The label's. Anything but 0 mixes values and is for labels of continuous values alone.
        weight_order: The weight's.
        mode: What lies outside: reflect, mirror, nearest, constant.
        fill: The image outside, with mode constant.
        label_fill: The label outside; a weight is 0 there.

    Raises:
        ValueError: An unknown order or mode; when called: a label of whole numbers would be mixed.
    """

    def __init__(
        self,
        owner: str,
        order: int = 1,
        label_order: int = 0,
        weight_order: int = 0,
        mode: str = "reflect",
        fill: float = 0.0,
        label_fill: float = 0.0,
    ) -> None:
        self.owner = owner
        orders = {"image": order, "label": label_order, "weight": weight_order}
        for key, value in orders.items():
            known(owner, "order" if key == "image" else f"{key}_order", value, ORDERS)
        self.orders = orders
        self.mode = known(owner, "mode", mode, tuple(MODES))
        self.fills = {"image": fill, "label": label_fill, "weight": 0.0}

    def __call__(self, key: str, array: np.ndarray, places: np.ndarray) -> np.ndarray:
        """An array (B, C, *space) at `places` (n, B or 1, *out), in its own type."""
        order = self.orders[key]
        if order and not np.issubdtype(array.dtype, np.floating):
            name = "order" if key == "image" else f"{key}_order"
            raise ValueError(f"{self.owner}: {name} {order} would mix a {key} of whole numbers; use 0")
        values = array.astype(np.float32, copy=False) if order else array
        return resample(values, places, order, self.mode, self.fills[key]).astype(array.dtype, copy=False)


class RandomRotate:
    """Turns in one plane by a random angle, uniform from -angle_spectrum to +angle_spectrum.

    The plane is the same in all slices along the other axis, so the places to read are computed once for all of them.
    The shape stays; voxels are taken as cubes. pytorch-3dunet's has whole degrees, and order 0 for the image as well.

    Args:
        angle_spectrum: The largest angle in degrees.
        axes: Pairs of axes of space, one of which is drawn each time. Default: all pairs that the data have.
        mode: What lies outside, in scipy's words: reflect, mirror, nearest, constant.
        order: Of the image's spline: 0 nearest, 1 linear, 3 cubic.
        label_order: The label's; 0 but for labels of continuous values.
        weight_order: The weight's.
        fill: The image outside, with mode constant.
        label_fill: The label outside, with mode constant.

    Raises:
        ValueError: A value out of range; when called: the data have no such axis.
    """

    random = True

    def __init__(
        self,
        *,
        angle_spectrum: float = 30,
        axes: Sequence[Sequence[int]] | None = None,
        mode: str = "reflect",
        order: int = 1,
        label_order: int = 0,
        weight_order: int = 0,
        fill: float = 0.0,
        label_fill: float = 0.0,
    ) -> None:
        if not angle_spectrum >= 0 or (axes is not None and not axes):
            raise ValueError(
                f"RandomRotate: angle_spectrum is {angle_spectrum}, axes {axes}; expected 0 or more, and pairs"
            )
        self.angle_spectrum = angle_spectrum
        self.axes = None if axes is None else [plane("RandomRotate", "a pair of axes", pair) for pair in axes]
        self.read = Interpolation("RandomRotate", order, label_order, weight_order, mode, fill, label_fill)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, shapes and types unchanged."""
        dims = spatial_dims(sample)
        pairs = list(combinations(range(dims), 2)) if self.axes is None else self.axes
        pair = pairs[int(rng.integers(len(pairs)))]
        first, second = sorted(spatial_axis(axis, dims, "RandomRotate") for axis in pair)
        angle = rng.uniform(-self.angle_spectrum, self.angle_spectrum)
        places = rotated(sample["image"].shape[first], sample["image"].shape[second], angle)

        def turn(key: str, array: np.ndarray) -> np.ndarray:
            slices = np.moveaxis(array, (first, second), (-2, -1))
            turned = self.read(key, slices.reshape(1, -1, *slices.shape[-2:]), places)
            return np.moveaxis(turned.reshape(slices.shape), (-2, -1), (first, second))

        return in_space(sample, turn)


def rotated(height: int, width: int, angle: float) -> np.ndarray:
    """Where each pixel of a plane is read to turn it about its middle, as scipy.ndimage.rotate does.

    Args:
        height: Pixels along the first axis.
        width: Pixels along the second axis.
        angle: In degrees.

    Returns:
        (2, 1, height, width), float32, in pixels.
    """
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    y = (np.arange(height) - (height - 1) / 2)[:, None]
    x = (np.arange(width) - (width - 1) / 2)[None]
    places = np.stack([cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2])
    return places[:, None].astype(np.float32)


class RandomScale:
    """Enlarges or reduces the content about the middle by one random factor; the shape stays.

    Args:
        scale: The range of the factor; above 1 enlarges.
        probability: How often it happens at all.
        axes: The axes of space that are scaled. Default: all.
        mode: What lies outside, where the content is reduced: reflect, mirror, nearest, constant.
        order: Of the image's spline: 0 nearest, 1 linear, 3 cubic.
        label_order: The label's; 0 but for labels of continuous values.
        weight_order: The weight's.
        fill: The image outside, with mode constant.
        label_fill: The label outside, with mode constant.

    Raises:
        ValueError: A value out of range; when called: the data have no such axis.
    """

    random = True

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.8, 1.25),
        probability: float = 0.5,
        axes: Sequence[int] | None = None,
        mode: str = "reflect",
        order: int = 1,
        label_order: int = 0,
        weight_order: int = 0,
        fill: float = 0.0,
        label_fill: float = 0.0,
    ) -> None:
        self.scale = bounds("RandomScale", "scale", scale, 0.01)
        self.probability = share("RandomScale", "probability", probability)
        self.axes = None if axes is None else tuple(axes)
        self.read = Interpolation("RandomScale", order, label_order, weight_order, mode, fill, label_fill)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, shapes and types unchanged."""
        dims = spatial_dims(sample)
        axes = range(dims) if self.axes is None else self.axes
        scaled = {spatial_axis(axis, dims, "RandomScale") for axis in axes}
        if rng.random() >= self.probability:
            return sample
        factor = rng.uniform(*self.scale)
        lines = []
        for axis in range(-dims, 0):
            size = sample["image"].shape[axis]
            line = np.arange(size) - (size - 1) / 2
            lines.append((line / factor if axis in scaled else line) + (size - 1) / 2)
        places = np.stack(np.meshgrid(*lines, indexing="ij"))[:, None].astype(np.float32)
        return in_space(sample, lambda key, array: self.read(key, array[None], places)[0])


class ElasticDeformation:
    """Moves each voxel by a smooth random field, the same for image, label and weight.

    Along each axis the field is white noise of deviation 1 under a Gaussian filter of `sigma`, reflected at the edges,
    times `alpha`, as in pytorch-3dunet; after Simard et al., "Best practices for convolutional neural networks", ICDAR
    2003. Nothing is filtered, though. Such a filter leaves a cosine as it is but for a factor, so independent normal
    numbers times these factors, as amplitudes of the cosines, are a field of the very same distribution. All factors
    but the first few are next to nothing. Those few are drawn and summed up, axis by axis, which costs a hundredth. A
    volume of one slice is an image.

    Args:
        alpha: Factor of the field. With the defaults a voxel moves by about one voxel in large volumes; by more in
            patches that are small beside `sigma`, whose field is nearly one shift.
        sigma: Deviation of the Gaussian in voxels.
        probability: How often it happens at all.
        apply_3d: Along D as well; otherwise along H and W alone, with a field that changes from slice to slice.
        mode: What lies outside: reflect, mirror, nearest, constant.
        order: Of the image's spline: 0 nearest, 1 linear, 3 cubic.
        label_order: The label's; 0 but for labels of continuous values.
        weight_order: The weight's.
        fill: The image outside, with mode constant.
        label_fill: The label outside, with mode constant.

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(
        self,
        *,
        alpha: float = 2000,
        sigma: float = 50,
        probability: float = 0.1,
        apply_3d: bool = True,
        mode: str = "reflect",
        order: int = 1,
        label_order: int = 0,
        weight_order: int = 0,
        fill: float = 0.0,
        label_fill: float = 0.0,
    ) -> None:
        if not sigma > 0 or not alpha >= 0:
            raise ValueError(f"ElasticDeformation: sigma is {sigma}, alpha {alpha}; expected above 0, and 0 or more")
        self.alpha, self.sigma, self.apply_3d = alpha, sigma, apply_3d
        self.probability = share("ElasticDeformation", "probability", probability)
        self.read = Interpolation("ElasticDeformation", order, label_order, weight_order, mode, fill, label_fill)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, shapes and types unchanged."""
        dims = spatial_dims(sample)
        if rng.random() >= self.probability:
            return sample
        space = sample["image"].shape[1:]
        volume = dims == 3 and self.apply_3d and space[0] > 1
        moved = space if volume else space[-2:]
        grid = np.stack(np.meshgrid(*(np.arange(size, dtype=np.float32) for size in moved), indexing="ij"))
        fields = np.stack([smooth_noise(space, self.sigma, rng) for _ in moved])
        fields *= np.float32(self.alpha)
        # A volume or an image is read as one array, places (n, 1, *space); slices as D of them, places (2, D, H, W).
        places = grid[:, None] + (fields if dims == 3 and not volume else fields[:, None])

        def bend(key: str, array: np.ndarray) -> np.ndarray:
            if dims == 3 and not volume:
                return self.read(key, array.swapaxes(0, 1), places).swapaxes(0, 1)
            return self.read(key, array[None], places)[0]

        return in_space(sample, bend)


def smooth_noise(space: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """What scipy.ndimage.gaussian_filter(white noise, sigma, mode="reflect") is, made of its cosines.

    Args:
        space: The shape of the field, any number of axes.
        sigma: Deviation of the Gaussian in voxels.
        rng: Draws one normal number for each cosine that counts.

    Returns:
        `space`, float32: a Gaussian field with the filter's covariance.
    """
    waves = [cosines(size, float(sigma)) for size in space]
    field = rng.standard_normal([wave.shape[1] for wave in waves], dtype=np.float32)
    for wave in reversed(waves):  # the last axis is spread out, and the one before it becomes the last
        field = np.moveaxis(field, -1, 0)
        field = np.tensordot(wave, field, axes=(1, 0))
    return np.ascontiguousarray(field)


@functools.lru_cache(maxsize=64)
def cosines(size: int, sigma: float) -> np.ndarray:
    """The cosines that a Gaussian filter leaves along an axis, times what it leaves of them.

    Returns:
        (size, number of cosines), float32: orthonormal DCT-II vectors times the filter's response.
    """
    reach = int(4 * sigma + 0.5)  # where scipy cuts the Gaussian off
    offsets = np.arange(1, reach + 1)
    gauss = np.exp(-0.5 * (offsets / sigma) ** 2)
    # A Gaussian leaves exp(-(pi k sigma / size)^2 / 2) of wave k: from here on less than exp(-5^2 / 2) = 4e-6.
    count = min(size, int(np.ceil(5 * size / (np.pi * sigma))) + 1)
    waves = np.arange(count)
    response = 1 + 2 * np.cos(np.pi * waves[:, None] * offsets[None] / size) @ gauss
    response /= 1 + 2 * gauss.sum()
    basis = np.cos(np.pi * np.outer(np.arange(size) + 0.5, waves) / size) * np.sqrt(2 / size)
    basis[:, 0] /= np.sqrt(2)
    result = (basis * response).astype(np.float32)
    result.flags.writeable = False  # it is shared
    return result
