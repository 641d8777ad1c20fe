"""How much each of the patches that overlap counts at each place: their weights, which add up to 1."""

from typing import Literal

import numpy as np

Blend = Literal["gaussian", "constant", "last"]

SIGMAS = 8  # a patch's length in standard deviations of its Gaussian


def shares(extent: int, patch: int, starts: list[int], blend: Blend) -> list[np.ndarray]:
    """Each start's share along one axis, cut to the volume. With `last` it is 1 up to the next start, then 0."""
    if blend == "last":
        nexts = [*starts[1:], extent]
        return [
            (np.arange(start, min(start + patch, extent)) < end).astype(float)
            for start, end in zip(starts, nexts, strict=True)
        ]
    away = np.arange(patch) - (patch - 1) / 2
    own = np.exp(-0.5 * (away * SIGMAS / patch) ** 2) if blend == "gaussian" else np.ones(patch)
    total = np.zeros(extent)
    for start in starts:
        total[start : start + patch] += own[: extent - start]
    return [own[: extent - start] / total[start : start + patch] for start in starts]
