"""What makes a batch of samples that cannot be stacked, for `loaders.collate_fn`."""

from collections.abc import Sequence
from typing import Any


def detection_collate(samples: Sequence[Any]) -> tuple[list[Any], ...] | None:
    """Samples (image, target) as ([image, ...], [target, ...]): what torchvision's detectors are called with.

    Nothing is stacked, so images may differ in size and targets in their number of boxes. A sample that is None is left
    out; where nothing is left, there is no batch.

    Args:
        samples: Tuples of the same length, or None.
    """
    kept = [sample for sample in samples if sample is not None]
    return tuple(map(list, zip(*kept, strict=True))) if kept else None
