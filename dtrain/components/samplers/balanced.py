"""Balanced: every class equally often."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dtrain.components.samplers.values import Values, values_of


class Balanced:
    """Samples such that every class comes equally often, however rare it is.

    Of K classes, each K samples in a row have every class once, in an order of their own. Within a class its samples
    come one after another in a shuffled order, over all epochs, and again only when all have come. Computed from the
    position: nothing but the labels is kept.

    Args:
        dataset: What is sampled.
        by: Where the labels are: an attribute or method of the dataset, or several, of which each combination is a
            class; a list or file of labels; a function of the dataset.
        num_samples: Samples of an epoch. Default: as many as the dataset has.
    """

    def __init__(self, dataset: Dataset, by: Values = "labels", num_samples: int | None = None) -> None:
        labels = _classes(dataset, by)
        self.classes, numbers, self.counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._sorted = np.argsort(numbers, kind="stable")
        self._starts = np.cumsum(self.counts) - self.counts
        self.num_samples = len(labels) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, found {self.num_samples}")
        self._by = by if isinstance(by, str) else "a list" if isinstance(by, list) else getattr(by, "__name__", "by")

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        counts = f"{self.counts.min():,} to {self.counts.max():,} samples"
        return f"Balanced by {self._by} ({len(self.classes):,} classes of {counts}, 1/{len(self.classes)} each)"

    def at(self, epoch: int, positions: np.ndarray, random: Any) -> np.ndarray:
        """The samples at some positions of an epoch; `random` gives the numbers."""
        classes = len(self.classes)
        group, place = np.divmod(positions, classes)
        own = random.permuted(place, classes, epoch, group)
        turn = epoch * -(-self.num_samples // classes) + group  # how often the class has come before
        time, inside = np.divmod(turn, self.counts[own])
        return self._sorted[self._starts[own] + random.permuted(inside, self.counts[own], own, time)]


def _classes(dataset: Any, by: Values) -> np.ndarray:
    """A label for each sample; a combination's is its number."""
    if isinstance(by, list) and by and all(isinstance(item, str) and hasattr(dataset, item) for item in by):
        columns = [np.unique(values_of(dataset, item, "labels"), return_inverse=True)[1] for item in by]
        return np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(-1)
    return values_of(dataset, by, "labels")
