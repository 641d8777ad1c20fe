"""Weighted: samples drawn by weight, with replacement."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dtrain.components.samplers.values import Values, values_of


class Weighted:
    """Samples that are drawn with replacement, each as often as its weight says.

    As torch's WeightedRandomSampler, but each position is computed on its own, and more than 2**24 samples will do.

    Args:
        dataset: What is sampled.
        weights: One for each sample, at least 0: a list, a file (.npy; .csv with one on each line), an attribute or
            method of the dataset, or a function of it.
        num_samples: Samples of an epoch. Default: as many as the dataset has.
    """

    def __init__(self, dataset: Dataset, weights: Values, num_samples: int | None = None) -> None:
        try:
            found = values_of(dataset, weights, "weights").astype(np.float64)
        except ValueError as error:
            raise ValueError(f"weights: {str(error).removeprefix('by: ')}") from None
        if not np.isfinite(found).all() or found.min() < 0 or not found.any():
            raise ValueError("weights must be finite, at least 0, and not all 0")
        self._sums = np.cumsum(found)
        self._last = int(np.flatnonzero(found)[-1])
        self.num_samples = len(found) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, found {self.num_samples}")
        self._range = found.min(), found.max()

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"Weighted (weights from {self._range[0]:g} to {self._range[1]:g})"

    def at(self, epoch: int, positions: np.ndarray, random: Any) -> np.ndarray:
        """The samples at some positions of an epoch; `random` gives the numbers."""
        drawn = random.uniform(positions, epoch) * self._sums[-1]
        return np.minimum(np.searchsorted(self._sums, drawn, side="right"), self._last)
