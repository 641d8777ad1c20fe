"""Mean, deviation and percentiles of a whole volume, read once, block by block."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.components.datasets.volumes import Region, Volume

BLOCK = 2**22  # voxels that are read at a time
SAMPLE = 2**20  # values from which percentiles are taken, where there are more
TABLE = 10001  # percentiles 0, 0.01, ..., 100, between which others lie


class Statistics(dict[str, float]):
    """`mean`, `std` (of all values, divided by their number), `min` and `max` of a volume, over all channels.

    Percentiles are exact up to 2**20 values; of more they are those of 2**20 values drawn from all, always the same
    ones, which misses the rank by some 0.05 % of all values (0.01 % at the 1st and the 99th percentile).

    Args:
        volume: Read whole, at most 2**22 voxels at a time; not where its `facts` have what is wanted.
        percents: Percentiles that will be asked for, 0 to 100. For another one the volume is read again.
    """

    def __init__(self, volume: Volume, percents: Sequence[float] = ()) -> None:
        self.volume = volume
        self.percentiles: dict[float, float] = {}
        facts: dict[str, Any] = getattr(volume, "facts", {})
        kept = facts.get("statistics")
        if kept is None:
            figures, sample = _read(volume, with_sample=bool(percents))
            super().__init__(figures)
            self._find(percents, sample)
        else:
            super().__init__(kept["figures"])
            self.percentiles = dict(kept["percentiles"])
        for percent in percents:
            self.percentile(percent)
        facts["statistics"] = {"figures": dict(self), "percentiles": [*self.percentiles.items()]}

    def percentile(self, percent: float) -> float:
        """The value below which so many percent of all values lie, 0 to 100."""
        if percent not in self.percentiles:
            self._find([percent], _read(self.volume, with_sample=True)[1])
        return self.percentiles[percent]

    def _find(self, percents: Sequence[float], sample: np.ndarray) -> None:
        """Between the two of the percentiles 0, 0.01, ..., 100 that it lies between."""
        steps, shares = np.linspace(0, 100, TABLE), np.linspace(0, 1, TABLE)
        for percent in percents:
            low = min(int(np.searchsorted(steps, percent, "right")) - 1, TABLE - 2)
            ends = np.quantile(sample, shares[low : low + 2]).astype(np.float32)
            if low == 0:
                ends[0] = self["min"]
            if low == TABLE - 2:
                ends[1] = self["max"]
            self.percentiles[percent] = float(np.interp(percent, steps[low : low + 2], ends))


def _read(volume: Volume, with_sample: bool) -> tuple[dict[str, float], np.ndarray]:
    """The figures of a volume, and the values from which its percentiles are taken."""
    total = math.prod(volume.shape) * volume.channels
    # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version.
    draw = np.random.RandomState(0)
    count, mean, squares, sample = 0, 0.0, 0.0, [np.empty(0, np.float32)]
    low, high = math.inf, -math.inf
    for region in blocks(volume.shape, max(BLOCK // volume.channels, 1)):
        values = volume.read(region).ravel()
        size, own = values.size, float(values.mean(dtype=np.float64))
        # Chan, Golub & LeVeque 1983: sums of squares of parts, put together without losing digits.
        squares += float(values.var(dtype=np.float64)) * size + (own - mean) ** 2 * count * size / (count + size)
        count, mean = count + size, mean + (own - mean) * size / (count + size)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if with_sample:
            share = size if total <= SAMPLE else -(-size * SAMPLE // total)
            sample.append(values if share == size else values[draw.randint(0, size, share)])
    return {"mean": mean, "std": math.sqrt(squares / count), "min": low, "max": high}, np.concatenate(sample)


def blocks(shape: tuple[int, ...], voxels: int) -> Iterator[Region]:
    """Regions that cover a volume, each of at most so many voxels, where a row along the last axis has no more."""
    sizes = list(shape)
    for axis in range(len(shape)):
        rest = math.prod(sizes[axis + 1 :])
        sizes[axis] = min(max(voxels // rest, 1), shape[axis])
        if sizes[axis] > 1:
            break
    for number in np.ndindex(*(-(-extent // size) for extent, size in zip(shape, sizes, strict=True))):
        yield tuple(
            slice(at * size, min((at + 1) * size, extent))
            for at, size, extent in zip(number, sizes, shape, strict=True)
        )
