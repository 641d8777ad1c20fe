"""Where the patches of a prediction lie."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dtrain.predict.blending import Blend, shares

Region = tuple[slice, ...]


class Grid:
    """Patches over one volume: starts 0, s, 2s, ... along each axis, the last one flush with the end.

    They are numbered with the first axis slowest. Along an axis on which the patch is longer than the volume there is
    one, and what lies outside is cut off. All patches that cover a voxel share it: their weights there add up to 1. As
    weights are products over the axes, so are their sums: none of this needs an array of the volume's size.

    Args:
        shape: Extent of the volume, (D, H, W) or (H, W).
        stride: From one start to the next, at most the patch's extent.
        blend: How a patch counts: `constant`: everywhere alike; `gaussian`: by exp(-x^2 / 2 sigma^2) along each axis,
            x voxels from its middle, sigma an eighth of its length (Isensee et al., nnU-Net, Nature Methods 2021);
            `last`: not at all where a later one lies, as in pytorch-3dunet.
    """

    def __init__(self, shape: Sequence[int], patch: Sequence[int], stride: Sequence[int], blend: Blend) -> None:
        self.shape, self.patch = tuple(shape), tuple(patch)
        axes = zip(shape, patch, stride, strict=True)
        self.starts = [[*range(0, extent - side, step), max(0, extent - side)] for extent, side, step in axes]
        self._counts = tuple(map(len, self.starts))
        self._weights = [shares(*axis, blend) for axis in zip(shape, patch, self.starts, strict=True)]
        sides = zip(self.patch, self.starts, strict=True)
        overlap = any(later - start < side for side, starts in sides for start, later in pairwise(starts))
        self.is_averaged = overlap and blend != "last"  # else a patch simply takes the place of those before it

    def __len__(self) -> int:
        return math.prod(self._counts)

    def corner(self, index: int) -> tuple[int, ...]:
        """Where a patch begins."""
        places = np.unravel_index(index, self._counts)
        return tuple(starts[place] for starts, place in zip(self.starts, places, strict=True))

    def region(self, index: int, halo: Sequence[int]) -> Region:
        """A patch with its halo on each side; it may reach out of the volume."""
        ends = zip(self.corner(index), self.patch, halo, strict=True)
        return tuple(slice(start - around, start + length + around) for start, length, around in ends)

    def weights(self, index: int) -> list[np.ndarray]:
        """A patch's share along each axis, float64, as far as it lies in the volume; of a voxel it is their product."""
        places = np.unravel_index(index, self._counts)
        return [weights[place] for weights, place in zip(self._weights, places, strict=True)]

    def touching(self, begin: int, end: int) -> range:
        """The patches that cover any of the planes [begin, end) of the first axis."""
        first = bisect_right(self.starts[0], begin - self.patch[0])
        last = bisect_left(self.starts[0], end)
        per_layer = math.prod(self._counts[1:])  # patches with the same start along the first axis
        return range(first * per_layer, last * per_layer)

    def slabs(self, least_planes: int) -> list[tuple[int, int]]:
        """The volume cut across its first axis, where patches begin, in slabs of so many planes at least."""
        cuts = [0]
        for start in self.starts[0]:
            if start - cuts[-1] >= least_planes and self.shape[0] - start >= least_planes:
                cuts.append(start)
        return list(zip(cuts, [*cuts[1:], self.shape[0]], strict=True))
