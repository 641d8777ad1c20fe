"""Where the patches of a volume lie, computed by number rather than kept."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import Any, Literal, overload

import numpy as np

from dtrain.components.datasets.volumes import Region, Volume, padded

LEAST = 64  # voxels along the last two axes, of a patch that is checked


class SliceBuilder:
    """Patches on a grid: starts 0, s, 2s, ... along each axis, the last one flush with the end.

    Args:
        patch_shape: Voxels of a patch, one number per axis.
        stride_shape: From one start to the next. Default: the patch's, so that nothing overlaps.
        halo_shape: Voxels that prediction reads around each patch, for context; reflected where the volume ends.
            Training does not use it.
        skip_shape_check: false: refuse patches of less than 64 voxels along one of the last two axes.
        pad: What lies behind the end of a volume that is smaller than the patch: reflect, edge (the border's values),
            or a number (constant: 0). Default: such a volume is refused. See `PatchDataset.sample` for the label.

    Raises:
        ValueError: Lengths that differ, or a number out of range.
    """

    def __init__(
        self,
        patch_shape: list[int],
        stride_shape: list[int] | None = None,
        halo_shape: list[int] | None = None,
        skip_shape_check: bool = True,
        pad: Literal["reflect", "edge", "constant"] | float | None = None,
    ) -> None:
        if isinstance(pad, str) and pad not in ("reflect", "edge", "constant"):
            raise ValueError(f"pad is {pad!r}; possible: reflect, edge, constant, or a number")
        self.pad = pad
        self.patch_shape = _extents("patch_shape", patch_shape, 1, len(patch_shape))
        self.stride_shape = _extents("stride_shape", stride_shape or patch_shape, 1, len(patch_shape))
        self.halo_shape = _extents("halo_shape", halo_shape or [0] * len(patch_shape), 0, len(patch_shape))
        if not skip_shape_check and min(self.patch_shape[-2:]) < LEAST:
            raise ValueError(
                f"patch_shape {self.patch_shape} has less than {LEAST} voxels along one of the last two axes; "
                "skip_shape_check: true allows it"
            )

    def places(self, volume: Volume) -> Sequence[Region]:
        """The regions of a volume's patches, the last axis fastest; of a padded volume they reach over its end.

        Raises:
            ValueError: The patch is larger than the volume and nothing pads it, or it is of other dimensions.
        """
        self.check(volume)
        return Grid(volume.shape, self.patch_shape, self.stride_shape)

    def check(self, volume: Volume) -> None:
        """Whether patches can be taken of a volume.

        Raises:
            ValueError: See `places`.
        """
        if len(volume.shape) != len(self.patch_shape):
            raise ValueError(
                f"patch_shape {self.patch_shape} has {len(self.patch_shape)} numbers, "
                f"{volume.path} {len(volume.shape)} spatial dimensions: {volume.shape}"
            )
        is_larger = any(patch > extent for patch, extent in zip(self.patch_shape, volume.shape, strict=True))
        if is_larger and self.pad is None:
            raise ValueError(
                f"patch_shape {self.patch_shape} is larger than {volume.path}, whose extent is {volume.shape}; "
                "pad (reflect, edge or a number) in the slice_builder fills what is missing"
            )

    def places_of(self, volumes: Sequence[Volume]) -> "Places":
        """The patches of several volumes, one volume after the other.

        Raises:
            ValueError: See `places`.
        """
        return Places([self.places(volume) for volume in volumes])


class FilterSliceBuilder(SliceBuilder):
    """The patches of SliceBuilder's grid in which enough is labelled.

    It reads the labels once, when the dataset is built: for each row of patches along the last axis, what these hold.

    Args:
        patch_shape: See SliceBuilder.
        stride_shape: See SliceBuilder.
        halo_shape: See SliceBuilder.
        skip_shape_check: See SliceBuilder.
        threshold: A patch is kept if more than this share of its labels counts: is neither 0 nor `ignore_index`.
        slack_acceptance: The others are kept with this probability.
        ignore_index: A label that does not count. Default: all but 0 count.
        seed: Decides which of the others are kept; the same ones in every run.
        pad: See SliceBuilder; what is padded does not count.

    Raises:
        ValueError: See SliceBuilder; or a share or probability that is not within 0 and 1.
    """

    def __init__(
        self,
        patch_shape: list[int],
        stride_shape: list[int] | None = None,
        halo_shape: list[int] | None = None,
        skip_shape_check: bool = True,
        threshold: float = 0.6,
        slack_acceptance: float = 0.01,
        ignore_index: int | None = None,
        seed: int = 47,
        pad: Literal["reflect", "edge", "constant"] | float | None = None,
    ) -> None:
        super().__init__(patch_shape, stride_shape, halo_shape, skip_shape_check, pad)
        for name, value in (("threshold", threshold), ("slack_acceptance", slack_acceptance)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; possible: 0 to 1")
        self.threshold, self.slack_acceptance = threshold, slack_acceptance
        self.ignore_index, self.seed = ignore_index, seed

    def places(self, volume: Volume) -> Sequence[Region]:
        """The regions that are kept, in the grid's order.

        Raises:
            ValueError: See SliceBuilder; or the volume has no label.
        """
        grid = super().places(volume)
        assert isinstance(grid, Grid)
        if not volume.has_label:
            raise ValueError(f"FilterSliceBuilder needs labels, and {volume.path} is read without; use SliceBuilder")
        facts: dict[str, Any] = getattr(volume, "facts", {}) if settings_of(self) else {}
        if "chosen" not in facts:
            shares = np.concatenate([self._shares(volume, row, grid.starts[-1]) for row in grid.rows()])
            # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version.
            accepted = np.random.RandomState(self.seed).random_sample(len(shares)) < self.slack_acceptance
            chosen = np.flatnonzero((shares > self.threshold) | accepted)
            facts["chosen"] = [chosen.tolist(), float(shares.max())]
        numbers, most = facts["chosen"]
        return Chosen(grid, np.array(numbers, np.int64), most)

    def places_of(self, volumes: Sequence[Volume]) -> "Places":
        """The patches of several volumes; one of them may have none.

        Raises:
            ValueError: See `places`; or no patch is kept at all.
        """
        found = super().places_of(volumes)
        if not len(found):
            chosen = [part for part in found.parts if isinstance(part, Chosen)]
            raise ValueError(
                f"FilterSliceBuilder keeps none of {sum(len(part.grid) for part in chosen)} patches: at most "
                f"{max(part.most for part in chosen):.2%} of a patch is labelled, and threshold is {self.threshold:.2%}"
            )
        return found

    def _shares(self, volume: Volume, row: Region, starts: Sequence[int]) -> np.ndarray:
        """The share of labels that count, for the patches of a row; no label is read twice for it."""
        patch = self.patch_shape[-1]
        line = slice(0, max(volume.shape[-1], patch))
        label = padded(volume.read_label, (*row, line), volume.shape, 0)
        counts = label != 0 if self.ignore_index is None else (label != 0) & (label != self.ignore_index)
        sums = np.concatenate(([0], counts.reshape(-1, counts.shape[-1]).sum(axis=0).cumsum()))
        lows = np.array(starts)
        return (sums[lows + patch] - sums[lows]) / (counts.size // counts.shape[-1] * patch)


def settings_of(builder: SliceBuilder | None) -> dict[str, Any]:
    """All that the patches which a FilterSliceBuilder keeps follow from; of another class's code nothing is known."""
    return vars(builder) if type(builder) is FilterSliceBuilder else {}


class Grid(Sequence[Region]):
    """All patches of a volume in order, the last axis fastest.

    Args:
        shape: The volume's extent.
        patch: A patch's; where it is larger, the only one begins at 0.
        stride: From one start to the next.
    """

    def __init__(self, shape: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.patch = patch
        self.starts = [Starts(*axis) for axis in zip(shape, patch, stride, strict=True)]

    def __len__(self) -> int:
        return math.prod(map(len, self.starts))

    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Region]: ...
    def __getitem__(self, index: int | slice) -> Region | Sequence[Region]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        rest = _within(index, len(self))
        lows = []
        for starts in reversed(self.starts):
            rest, number = divmod(rest, len(starts))
            lows.append(starts[number])
        return tuple(slice(low, low + size) for low, size in zip(reversed(lows), self.patch, strict=True))

    def rows(self) -> Iterator[Region]:
        """The regions of all axes but the last, in the grid's order."""
        for lows in product(*self.starts[:-1]):
            yield tuple(slice(low, low + size) for low, size in zip(lows, self.patch, strict=False))


class Starts(Sequence[int]):
    """0, s, 2s, ... along one axis, and one start more where those leave something at the end.

    Args:
        extent: Of the volume.
        patch: Of a patch; a larger one begins at 0.
        stride: s.
    """

    def __init__(self, extent: int, patch: int, stride: int) -> None:
        self.last, self.stride = max(extent - patch, 0), stride

    def __len__(self) -> int:
        return 1 + -(-self.last // self.stride)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return min(_within(index, len(self)) * self.stride, self.last)


class Chosen(Sequence[Region]):
    """Some of a grid's patches.

    Args:
        grid: The patches to choose from.
        numbers: Which of them.
        most: The largest share of labels that count, of all patches.
    """

    def __init__(self, grid: Sequence[Region], numbers: np.ndarray, most: float) -> None:
        self.grid, self.numbers, self.most = grid, numbers, most

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Region]: ...
    def __getitem__(self, index: int | slice) -> Region | Sequence[Region]:
        if isinstance(index, slice):
            return [self.grid[int(number)] for number in self.numbers[index]]
        return self.grid[int(self.numbers[index])]


class Draws(Sequence[Region]):
    """Patches of a volume whose places are drawn when they are asked for; as a sequence, each is the whole volume.

    Args:
        shape: The volume's extent.
        patch: A patch's; a larger one begins at 0.
        patches: How many there are.
    """

    def __init__(self, shape: tuple[int, ...], patch: tuple[int, ...], patches: int) -> None:
        self.shape, self.patch, self.patches = shape, patch, patches

    def __len__(self) -> int:
        return self.patches

    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Region]: ...
    def __getitem__(self, index: int | slice) -> Region | Sequence[Region]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        _within(index, len(self))
        return tuple(slice(0, extent) for extent in self.shape)

    def draw(self, rng: np.random.Generator) -> Region:
        """A patch's region, each that lies within the volume as likely as any other."""
        spans = (extent - patch for extent, patch in zip(self.shape, self.patch, strict=True))
        return self.beginning([int(rng.integers(max(span, 0) + 1)) for span in spans])

    def beginning(self, lows: Sequence[int]) -> Region:
        """The region of a patch that begins there, moved to where it lies within the volume."""
        sides = zip(lows, self.shape, self.patch, strict=True)
        starts = [min(max(low, 0), max(extent - patch, 0)) for low, extent, patch in sides]
        return tuple(slice(start, start + patch) for start, patch in zip(starts, self.patch, strict=True))


class Places(Sequence[tuple[int, Region]]):
    """The patches of several volumes, one volume after the other, each with its volume's number.

    Args:
        parts: Each volume's patches.
        notes: What is worth a line when they are first used.
    """

    def __init__(self, parts: Sequence[Sequence[Region]], notes: Sequence[str] = ()) -> None:
        self.parts, self.notes = parts, notes
        self.are_drawn = any(isinstance(part, Draws) for part in parts)
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> tuple[int, Region]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[int, Region]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, Region] | Sequence[tuple[int, Region]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = _within(index, len(self))
        number = bisect_right(self.ends, index)
        return number, self.parts[number][index - self.ends[number]]


def _within(index: int, length: int) -> int:
    """The index counted from the start."""
    if not -length <= index < length:
        raise IndexError(f"there is no number {index} of {length}")
    return index % length


def _extents(name: str, values: Sequence[int], least: int, length: int) -> tuple[int, ...]:
    """The numbers as a tuple."""
    if not length or len(values) != length or any(not isinstance(value, int) or value < least for value in values):
        expected = f"{length or 'some'} whole numbers, one per axis, {least} or more"
        raise ValueError(f"{name} is {list(values)}; expected {expected}")
    return tuple(values)
