"""Random changes of the image's values."""

from collections.abc import Sequence

import numpy as np

from dtrain.components.transforms.sample import Sample, bounds, share, spatial_dims


class RandomContrast:
    """mean + a (v - mean), a uniform within `alpha`.

    Args:
        alpha: The range of a; above 1 is more contrast.
        mean: The value that stays. Default: the mean of the file where the sample tells it, else of the image.
        probability: How often it happens at all.
        clip: [lowest, highest] value afterwards. Default: none. pytorch-3dunet clips to [-1, 1].

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(
        self,
        *,
        alpha: Sequence[float] = (0.5, 1.5),
        mean: float | None = None,
        probability: float = 0.1,
        clip: Sequence[float] | None = None,
    ) -> None:
        self.alpha = bounds("RandomContrast", "alpha", alpha)
        self.mean = mean
        self.probability = share("RandomContrast", "probability", probability)
        self.clip = None if clip is None else bounds("RandomContrast", "clip", clip)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with another image, float32 (C, *spatial)."""
        if rng.random() >= self.probability:
            return sample
        factor, image = np.float32(rng.uniform(*self.alpha)), sample["image"]
        mean = self.mean
        if mean is None:
            mean = (sample.get("stats") or {}).get("mean", image.mean(dtype=np.float64))
        middle = per_channel(mean, image)
        image = middle + factor * (image - middle)
        return sample | {"image": image if self.clip is None else image.clip(*self.clip)}


class RandomGammaCorrection:
    """The image, brought to 0..1, to the power of g, uniform within `gamma`; then back to its own range.

    Args:
        gamma: The range of g; below 1 brightens.
        probability: How often it happens at all.
        keep_range: Bring it back. pytorch-3dunet leaves it at 0..1, so that images differ in range by chance; an image
            of a single value, which has no range, is then clipped to 0..1, as there.

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(
        self, *, gamma: Sequence[float] = (0.5, 1.5), probability: float = 0.1, keep_range: bool = True
    ) -> None:
        self.gamma = bounds("RandomGammaCorrection", "gamma", gamma, 0)
        self.probability = share("RandomGammaCorrection", "probability", probability)
        self.keep_range = keep_range

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with another image, float32 (C, *spatial); one of a single value keeps it, with keep_range."""
        if rng.random() >= self.probability:
            return sample
        image, gamma = sample["image"], np.float32(rng.uniform(*self.gamma))
        low, span = image.min(), np.ptp(image)
        if not span > 0:
            return sample if self.keep_range else sample | {"image": image.clip(0, 1) ** gamma}
        image = ((image - low) / span) ** gamma
        return sample | {"image": image * span + low if self.keep_range else image}


class GaussianBlur:
    """A Gaussian filter over space, each channel by itself, sigma uniform within a range.

    Args:
        sigma: The range of the Gaussian's deviation in voxels.
        probability: How often it happens at all.

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(self, *, sigma: Sequence[float] = (0.1, 2.0), probability: float = 0.5) -> None:
        self.sigma = bounds("GaussianBlur", "sigma", sigma, 0)
        self.probability = share("GaussianBlur", "probability", probability)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with another image, float32 (C, *spatial)."""
        if rng.random() >= self.probability:
            return sample
        from scipy.ndimage import gaussian_filter

        axes = tuple(range(-spatial_dims(sample), 0))
        image = gaussian_filter(sample["image"], rng.uniform(*self.sigma), mode="nearest", axes=axes)
        return sample | {"image": image}


class AdditiveGaussianNoise:
    """v + n, n normal with mean 0 and one deviation for the whole image, uniform within `scale`.

    Args:
        scale: The range of the deviation.
        probability: How often it happens at all.

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(self, *, scale: Sequence[float] = (0.0, 1.0), probability: float = 0.1) -> None:
        self.scale = bounds("AdditiveGaussianNoise", "scale", scale, 0)
        self.probability = share("AdditiveGaussianNoise", "probability", probability)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with another image, float32 (C, *spatial)."""
        if rng.random() >= self.probability:
            return sample
        deviation = np.float32(rng.uniform(*self.scale))
        noise = rng.standard_normal(sample["image"].shape, dtype=np.float32)
        noise *= deviation
        noise += sample["image"]
        return sample | {"image": noise}


class AdditivePoissonNoise:
    """v + n, n Poisson with one mean for the whole image, uniform within `lam`. So the image brightens by that mean.

    Args:
        lam: The range of the mean.
        probability: How often it happens at all.

    Raises:
        ValueError: A value out of range.
    """

    random = True

    def __init__(self, *, lam: Sequence[float] = (0.0, 1.0), probability: float = 0.1) -> None:
        self.lam = bounds("AdditivePoissonNoise", "lam", lam, 0)
        self.probability = share("AdditivePoissonNoise", "probability", probability)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with another image, float32 (C, *spatial)."""
        if rng.random() >= self.probability:
            return sample
        noise = rng.poisson(rng.uniform(*self.lam), sample["image"].shape)
        return sample | {"image": sample["image"] + noise.astype(np.float32)}


def per_channel(value: object, image: np.ndarray) -> np.ndarray:
    """A number, or one per channel, so that it can be added to an image (C, *spatial), as float32.

    Raises:
        ValueError: There are other than 1 or C numbers.
    """
    values = np.asarray(value, dtype=np.float32)
    if values.size not in (1, len(image)):
        raise ValueError(
            f"{values.size} values for an image of {len(image)} channels; expected one, or one per channel"
        )
    return values.reshape(-1, *[1] * (image.ndim - 1))
