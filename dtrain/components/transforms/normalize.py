"""Brings values to a common scale, from given figures, the file's or the array's own.

The file's figures are `stats` of the sample, a dict that a dataset puts there: `mean`, `std`, `min`, `max`, over all
channels, perhaps with a method `percentile`, from a percentage to a value. Where an image is rescaled, they are
rescaled too, so that a second transform finds what holds for the values that it is given.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.components.transforms.intensity import per_channel
from dtrain.components.transforms.sample import Sample, known

KEYS = ("image", "label")
Number = float | Sequence[float]


class Standardize:
    """(v - mean) / max(std, eps).

    Args:
        eps: The least deviation that is divided by.
        mean: Given with `std`; a number, or one per channel. Default: the file's if the sample tells it, else the
            array's own.
        std: Given with `mean`.
        channelwise: Each channel has a mean and deviation of its own, not the file's.
        use_stats: Take the file's figures where the sample tells them; false: always the array's own.
        key: What is standardized: image, or a label of continuous values.

    Raises:
        ValueError: Only one of `mean` and `std` is given.
    """

    random = False

    def __init__(
        self,
        *,
        eps: float = 1e-10,
        mean: Number | None = None,
        std: Number | None = None,
        channelwise: bool = False,
        use_stats: bool = True,
        key: str = "image",
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"Standardize: mean is {mean}, std is {std}; give both or none")
        self.given = None if mean is None else {"mean": mean, "std": std}
        self.eps, self.channelwise, self.use_stats = eps, channelwise, use_stats
        self.key = known("Standardize", "key", key, KEYS)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with float32 values; draws nothing."""
        array = sample[self.key]
        figures: Any = self.given or _stats(sample, self)
        if not figures:
            figures = dict(zip(("mean", "std"), _moments(array, _axes(array, self.channelwise)), strict=True))
        return rescaled(sample, self.key, figures["mean"], np.maximum(figures["std"], self.eps))


class PercentileNormalizer:
    """(v - low) / (high - low + eps), low and high the `pmin`-th and `pmax`-th percentile.

    Args:
        pmin: A percentage.
        pmax: A percentage above it.
        channelwise: Each channel has percentiles of its own, not the file's.
        eps: What keeps an array of a single value from being divided by 0.
        use_stats: Take the file's percentiles where the sample tells them; false: always the array's own.
        key: What is normalized: image, or a label of continuous values.

    Raises:
        ValueError: The percentages are not in order within 0 and 100.
    """

    random = False

    def __init__(
        self,
        *,
        pmin: float = 1.0,
        pmax: float = 99.6,
        channelwise: bool = False,
        eps: float = 1e-10,
        use_stats: bool = True,
        key: str = "image",
    ) -> None:
        if not 0 <= pmin < pmax <= 100:
            raise ValueError(f"PercentileNormalizer: pmin is {pmin}, pmax {pmax}; expected 0 <= pmin < pmax <= 100")
        self.pmin, self.pmax, self.eps = pmin, pmax, eps
        self.channelwise, self.use_stats = channelwise, use_stats
        self.key = known("PercentileNormalizer", "key", key, KEYS)
        self.percents_of_file = [pmin, pmax]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with float32 values; draws nothing."""
        array = sample[self.key]
        if percentile := getattr(_stats(sample, self), "percentile", None):
            low, high = percentile(self.pmin), percentile(self.pmax)
        else:
            low, high = np.percentile(array, (self.pmin, self.pmax), axis=_axes(array, self.channelwise))
        return rescaled(sample, self.key, low, high - low + self.eps)


class Normalize:
    """-1 .. 1 (or 0 .. 1) from min_value .. max_value; what lies beyond is clipped.

    An array of a single value becomes -1 (or 0) throughout, whatever the value.

    Args:
        min_value: Becomes -1 (or 0); a number, or one per channel. Default: the file's least value if the sample tells
            it, else the array's own.
        max_value: Becomes 1. Default: the largest, likewise.
        norm01: 0 .. 1 instead of -1 .. 1.
        channelwise: Each channel has a least and largest value of its own, not the file's.
        eps: What keeps an array of a single value from being divided by 0.
        use_stats: Take the file's figures where the sample tells them; false: always the array's own.
        key: What is normalized: image, or a label of continuous values.

    Raises:
        ValueError: `max_value` is not above `min_value`.
    """

    random = False

    def __init__(
        self,
        *,
        min_value: Number | None = None,
        max_value: Number | None = None,
        norm01: bool = False,
        channelwise: bool = False,
        eps: float = 1e-10,
        use_stats: bool = True,
        key: str = "image",
    ) -> None:
        if min_value is not None and max_value is not None and not np.all(np.less(min_value, max_value)):
            raise ValueError(f"Normalize: min_value is {min_value}, max_value {max_value}; expected a larger max_value")
        self.min_value, self.max_value, self.norm01, self.eps = min_value, max_value, norm01, eps
        self.channelwise, self.use_stats = channelwise, use_stats
        self.key = known("Normalize", "key", key, KEYS)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with float32 values; draws nothing."""
        array = sample[self.key]
        axes = _axes(array, self.channelwise)
        told = _stats(sample, self)
        low: Any = self.min_value if self.min_value is not None else told.get("min")
        high: Any = self.max_value if self.max_value is not None else told.get("max")
        low = np.asarray(array.min(axes) if low is None else low, dtype=np.float64)
        high = np.asarray(array.max(axes) if high is None else high, dtype=np.float64)
        # In two steps: beside a large value float32 would round eps away, and what has one value would not become -1.
        result = rescaled(sample, self.key, low, high - low + self.eps)
        if not self.norm01:
            result = rescaled(result, self.key, 0.5, 0.5)
        return result | {self.key: result[self.key].clip(0 if self.norm01 else -1, 1)}


def rescaled(sample: Sample, key: str, shift: Any, scale: Any) -> Sample:
    """(v - shift) / scale as float32; the file's figures of an image likewise.

    Args:
        sample: It is not changed.
        key: "image" or "label".
        shift: A number, or one per channel.
        scale: A number, or one per channel.
    """
    array = sample[key].astype(np.float32, copy=False)
    changed = array - per_channel(shift, array)
    changed /= per_channel(scale, array)
    result = sample | {key: changed}
    if key == "image" and sample.get("stats"):
        result["stats"] = Rescaled(sample["stats"], np.ravel(shift), np.ravel(scale))
    return result


class Rescaled(dict[str, Any]):
    """A file's figures for an image that was rescaled to (v - shift) / scale."""

    def __init__(self, stats: Any, shift: np.ndarray, scale: np.ndarray) -> None:
        super().__init__({name: (value - (name != "std") * shift) / scale for name, value in stats.items()})
        if percentile := getattr(stats, "percentile", None):
            self.percentile = lambda percent: (percentile(percent) - shift) / scale


def _stats(sample: Sample, transform: Any) -> dict[str, Any]:
    """The file's figures where they are told and meant; they are of all channels together."""
    meant = transform.use_stats and transform.key == "image" and not transform.channelwise
    return (sample.get("stats") if meant else None) or {}


def _moments(array: np.ndarray, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Mean and deviation. The squares of a row are added up in float32, the rows in float64: no large copy is made."""
    mean = array.mean(axes, dtype=np.float64, keepdims=True)
    centred = array.astype(np.float32, copy=False) - mean.astype(np.float32)
    squares = np.einsum("...i,...i->...", centred, centred)
    rows = tuple(axis for axis in axes if axis != array.ndim - 1)
    variance = squares.sum(rows, dtype=np.float64) / array.shape[-1]
    count = np.prod([array.shape[axis] for axis in rows], dtype=np.int64)
    return mean.reshape(variance.shape), np.sqrt(variance / count)


def _axes(array: np.ndarray, channelwise: bool) -> tuple[int, ...]:
    return tuple(range(1 if channelwise else 0, array.ndim))
