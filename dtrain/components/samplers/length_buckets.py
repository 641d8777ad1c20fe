"""LengthBuckets: batches of samples of similar length."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dtrain.components.samplers.values import Values, values_of


class LengthBuckets:
    """Batches of samples of similar length, so that padding wastes little.

    The samples, sorted by length, are cut into buckets. In each epoch those of a bucket come in a new order and are cut
    into batches, and the batches of all buckets come in a new order. Computed from the batch's number.

    Args:
        dataset: What is sampled.
        by: Where the lengths are: an attribute or method of the dataset, a list or file of them, a function of it.
        batch_size: Samples of a batch.
        max_tokens: Instead: the most that a padded batch may have, samples times the longest of its bucket.
        buckets: How many, as far as each fills four batches. More of them pad less and shuffle less.
        shuffle: False: buckets and batches as they are sorted, the same in every epoch.
        drop_last: Leave out batches that are not full.
    """

    def __init__(
        self,
        dataset: Dataset,
        by: Values = "lengths",
        batch_size: int | None = None,
        max_tokens: int | None = None,
        buckets: int = 20,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if (batch_size is None) == (max_tokens is None):
            raise ValueError("batch_size or max_tokens: one of the two is needed")
        for key, value in {"batch_size": batch_size, "max_tokens": max_tokens, "buckets": buckets}.items():
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, found {value}")
        lengths = values_of(dataset, by, "lengths")
        if max_tokens is not None and lengths.max() > max_tokens:
            sample = int(lengths.argmax())
            raise ValueError(f"max_tokens is {max_tokens}, and sample {sample} alone has the length {lengths[sample]}")
        self._sorted, self._shuffle = np.argsort(lengths, kind="stable"), shuffle
        sorted_lengths = lengths[self._sorted]
        typical = batch_size or max(1, int(max_tokens / max(1.0, float(np.median(lengths)))))  # type: ignore[operator]
        count = max(1, min(buckets, len(lengths) // (4 * typical)))
        edges = np.arange(count + 1) * len(lengths) // count
        if batch_size:  # only the last batch of all may be short
            edges[:-1] = edges[:-1] // batch_size * batch_size
        self._edges = edges
        longest = np.maximum(1, sorted_lengths[edges[1:] - 1])
        sizes = np.full(count, batch_size) if batch_size else max_tokens // longest
        inside: np.ndarray = np.diff(edges).astype(np.int64)
        sizes = np.minimum(sizes.astype(np.int64), inside)
        whole, rest = inside // sizes, inside % sizes
        batches = whole + (0 if drop_last else (rest > 0).astype(np.int64))
        self._bucket = np.repeat(np.arange(count), batches)  # of each batch, as they are sorted
        place = np.arange(len(self._bucket)) - np.repeat(np.cumsum(batches) - batches, batches)
        self._first = place * sizes[self._bucket]  # of the batch, within its bucket
        self._sizes = np.minimum(sizes[self._bucket], np.diff(edges)[self._bucket] - self._first)
        padded = int((self._sizes * longest[self._bucket]).sum())
        self._text = f"{count} bucket{'s' if count > 1 else ''} of lengths {lengths.min():g} to {lengths.max():g}"
        self._text += f", padded by at most {1 - lengths.sum() / max(padded, 1):.0%}" if not drop_last else ""

    def __len__(self) -> int:
        return len(self._sizes)

    def __repr__(self) -> str:
        return f"LengthBuckets ({self._text})"

    def sizes(self, epoch: int, random: Any) -> np.ndarray:
        """Samples of each batch of an epoch, in order."""
        return self._sizes[self._order(epoch, np.arange(len(self)), random)]

    def at(self, epoch: int, numbers: np.ndarray, random: Any) -> list[np.ndarray]:
        """The samples of some batches of an epoch; `random` gives the numbers."""
        own = self._order(epoch, numbers, random)
        ends = np.cumsum(self._sizes[own])
        batch = np.repeat(own, self._sizes[own])
        bucket = self._bucket[batch]
        inside = self._first[batch] + np.arange(len(batch)) - np.repeat(ends - self._sizes[own], self._sizes[own])
        if self._shuffle:
            inside = random.permuted(inside, np.diff(self._edges)[bucket], epoch, bucket, 1)
        return np.split(self._sorted[self._edges[bucket] + inside], ends[:-1]) if len(own) else []

    def _order(self, epoch: int, numbers: np.ndarray, random: Any) -> np.ndarray:
        return random.permuted(numbers, len(self), epoch, 0, 0) if self._shuffle else numbers
