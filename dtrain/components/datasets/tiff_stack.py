"""Patches of 3-D TIFF stacks, as ImageJ, OME and microscopes write them: pages are read as they are needed."""

import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtrain.components.datasets.files import found_files, one_line, paired, stem_of, unique_names
from dtrain.components.datasets.flat import Axis
from dtrain.components.datasets.kept_facts import facts_of
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import Checks, StoredVolume, Volume
from dtrain.components.transforms.pipeline import Pipeline

SUFFIXES = (".tif", ".tiff", ".ome.tif", ".ome.tiff")
PAGE_BYTES = 1 << 26  # of unpacked pages that a process keeps


class TiffStackDataset(PatchDataset):
    """Patches of TIFF stacks, and of labels with the same stems; see PatchDataset.

    A stack is (Z, Y, X), with channels (Z, C, Y, X) or (C, Z, Y, X) or, as colours, (Z, Y, X, C). What is stored in one
    piece is memory-mapped; else the pages that a patch touches are unpacked. Files are opened read-only.

    Args:
        images: Files (*.tif, *.tiff), folders or patterns; one or a list.
        labels: Likewise, as whole numbers. Default: an item is the image alone.
        label_suffix: What a label's stem has behind its image's, as _mask in a_mask.tif.
        axes: What the axes of the files are, such as ZYX or ZCYX, where these do not say so themselves.
        slice_builder: A SliceBuilder or FilterSliceBuilder. Default: each file is one item.
        transforms: What is done to each patch, in this order.
        in_memory: Read all when the dataset is built.
        global_normalization: See LazyHDF5Dataset.
        random_scale: See LazyHDF5Dataset.
        random_scale_probability: See LazyHDF5Dataset.
        num_classes: Refuse labels other than 0 to num_classes - 1.
        ignore_index: One label more that is possible.
        check_finite: Refuse NaN and infinity in the images.
        axis: z | y | x: items are slices across this axis, (C, H, W), for a 2-D network. A slice_builder then has two
            numbers per shape; without one, an item is a whole slice.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file has no partner or cannot be read, or image and label differ in shape.
        ModuleNotFoundError: tifffile is not installed.
    """

    def __init__(
        self,
        images: str | list[str],
        labels: str | list[str] | None = None,
        label_suffix: str = "",
        axes: str | None = None,
        slice_builder: SliceBuilder | None = None,
        transforms: list[Any] | None = None,
        in_memory: bool = False,
        global_normalization: bool = False,
        random_scale: int | list[int] | None = None,
        random_scale_probability: float = 0.5,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        check_finite: bool = True,
        axis: Axis | None = None,
    ) -> None:
        found = found_files(images, SUFFIXES, "images", "TIFF file")
        pairs: Sequence[tuple[Path, Path | None]] = [(path, None) for path in found]
        if labels is not None:
            pairs = [*paired(found, found_files(labels, SUFFIXES, "labels", "TIFF file"), label_suffix, SUFFIXES)]
        names = unique_names([image for image, _ in pairs], [stem_of(image, SUFFIXES) for image, _ in pairs])
        checks = Checks(check_finite, num_classes, ignore_index)
        volumes: list[Volume] = []
        for (image, label), name in zip(pairs, names, strict=True):
            volume = TiffVolume(image, label, axes, name, checks)
            volumes.append(volume.load() if in_memory else volume)
        files = [file for pair in pairs for file in pair if file]
        percents = Pipeline(transforms).percents if global_normalization else None
        with facts_of(volumes, pairs, [axes, vars(checks), percents, axis], slice_builder, global_normalization):
            super().__init__(
                volumes, files, slice_builder, transforms, global_normalization, random_scale, random_scale_probability,
                axis,
            )  # fmt: skip


class TiffVolume(StoredVolume):
    """A TIFF stack and perhaps a label, of which only the pages that a region touches are read. See Volume.

    Args:
        path: The image.
        label: The label, or None.
        axes: Of both files; None: as they say.
        name: Default: the file's stem.
        checks: What each value must be. Default: finite.

    Raises:
        ValueError: A file cannot be read, or the label is of another shape.
    """

    word = "file"

    def __init__(
        self,
        path: Path,
        label: Path | None = None,
        axes: str | None = None,
        name: str = "",
        checks: Checks | None = None,
    ) -> None:
        self.path, self.name, self.axes = path, name or stem_of(path, SUFFIXES), axes
        self.raw, self.label, self.weight = (str(path),), (() if label is None else (str(label),)), None
        self.checks = checks or Checks()
        _stack.cache_clear()  # another file may lie in a known one's place
        PAGES.clear()
        image, labels = ([_stack(Path(file), axes, 0).shape for file in files] for files in (self.raw, self.label))
        self._fit(image, labels, [])
        self.label_file = (label, axes or "") if label is not None else None

    def _array(self, name: str) -> "Stack":
        return _stack(Path(name), self.axes, os.getpid())


class Stack(NamedTuple):
    """A stack as (*spatial) or (C, *spatial), to be sliced."""

    path: Path
    sheets: Sequence[Any]  # tifffile's pages, open in this process
    pages: np.ndarray  # (Z,), (C, Z) or without Z and C: which of them each plane is
    mapped: np.ndarray | None  # all of it, where it is stored in one piece
    plane: tuple[int, int]
    has_colours: bool  # whether a page holds the channels, as its last axis

    @property
    def shape(self) -> tuple[int, ...]:
        """(*spatial) or (C, *spatial)."""
        colours = (self.sheets[0].samplesperpixel,) if self.has_colours else ()
        return (*colours, *self.pages.shape, *self.plane)

    def __getitem__(self, region: Any) -> np.ndarray:  # type: ignore[override]
        if self.mapped is not None:
            return np.array(self.mapped[region])  # in memory of its own, at once
        colours, rest = (region[0], region[1:]) if self.has_colours else (slice(None), region)
        numbers, (rows, columns) = self.pages[rest[:-2]], rest[-2:]
        try:
            planes = [PAGES.page(self, int(number))[rows, columns] for number in numbers.reshape(-1)]
        except (ValueError, RuntimeError) as error:
            raise OSError(one_line(error)) from error
        block = np.stack(planes).reshape(*numbers.shape, *planes[0].shape)
        return np.moveaxis(block, -1, 0)[colours] if self.has_colours else block


class Pages:
    """The pages that this process unpacked last: neighbouring patches need the same ones."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self.known: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
        self.bytes = 0

    def page(self, stack: Stack, number: int) -> np.ndarray:
        """A page of a stack, unpacked: (Y, X) or (Y, X, C)."""
        key = stack.path, number
        if key not in self.known:
            values = stack.sheets[number].asarray()
            while self.known and self.bytes + values.nbytes > PAGE_BYTES:
                self.bytes -= self.known.popitem(last=False)[1].nbytes
            self.known[key] = values
            self.bytes += values.nbytes
        self.known.move_to_end(key)
        return self.known[key]


PAGES = Pages()


@functools.lru_cache(maxsize=64)
def _stack(path: Path, axes: str | None, _process: int) -> Stack:
    """A file, opened once by each process.

    Raises:
        ValueError: It cannot be read, or its axes are not those of a stack.
        ModuleNotFoundError: tifffile is not installed.
    """
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("TIFF files need tifffile: pip install tifffile") from error
    try:
        series, sheets, shape, found = _contents(tifffile.TiffFile(path))
        found = axes or found
    except Exception as error:
        raise ValueError(f"{path} cannot be read as TIFF: {one_line(error)}") from error
    if series.dtype.kind not in "biuf":
        raise ValueError(f"{path} has the type {series.dtype}; expected numbers")
    kept = [(letter, size) for letter, size in zip(found, shape, strict=False) if size > 1 or letter in "ZYX"]
    letters = "".join(letter for letter, _ in kept)
    depth = "Z" if "Z" in letters else next((letter for letter in letters if letter in "QIR"), "")  # unnamed pages
    order = letters.replace(depth, "Z") if depth else letters
    is_known = order in ("YX", "ZYX", "CYX", "CZYX", "ZCYX", "YXS", "ZYXS", "YXC", "ZYXC")
    page = sheets[0]
    plane = (int(page.imagelength), int(page.imagewidth))
    has_colours = order[-1:] in ("S", "C") and is_known
    inner = [size for _, size in kept][order.find("Y") :]
    if len(found) != len(shape) or not is_known or tuple(inner[:2]) != plane or page.imagedepth > 1:
        raise ValueError(
            f"{path} has the shape {shape} and the axes {found}; expected ZYX, ZCYX, CZYX, ZYXC or YX; "
            "axes says what they are, where the file does not"
        )
    outer = [size for _, size in kept][: order.find("Y")]
    numbers = np.arange(prod(outer)).reshape(outer)
    numbers = np.swapaxes(numbers, 0, 1) if order.startswith("ZC") else numbers
    mapped = _mapped(path, series, order, outer, plane, has_colours) if len(sheets) == len(series.pages) else None
    if mapped is None and (len(sheets) < numbers.size or None in sheets):
        raise ValueError(f"{path} has the shape {shape}, and lacks pages of it: it holds {len(sheets)}")
    return Stack(path, sheets, numbers, mapped, plane, has_colours)


def _contents(file: Any) -> tuple[Any, Sequence[Any], tuple[int, ...], str]:
    """The first image of a file with its pages, shape and axes; pages that were written one by one are one stack."""
    first, *others = file.series
    alike = [first, *(series for series in others if (series.shape, series.dtype) == (first.shape, first.dtype))]
    if len(alike) == 1:
        return first, first.pages, tuple(first.shape), first.axes
    if any(len(series.pages) > 1 or series.size != series.pages[0].size for series in alike):
        raise ValueError(f"it holds {len(alike)} images of the shape {first.shape}; expected one")
    return first, [series.pages[0] for series in alike], (len(alike), *first.shape), f"Z{first.axes}"


def _mapped(
    path: Path, series: Any, order: str, outer: list[int], plane: tuple[int, int], has_colours: bool
) -> np.ndarray | None:
    """The file's values as (*spatial) or (C, *spatial) where they are stored in one piece, uncompressed."""
    if series.dataoffset is None:
        return None
    dtype = np.dtype(series.parent.byteorder + series.dtype.char)
    colours = [series.shape[-1]] if has_colours else []
    values = np.memmap(path, dtype, mode="r", offset=series.dataoffset, shape=(*outer, *plane, *colours))
    if has_colours:
        return np.moveaxis(values, -1, 0)
    return np.swapaxes(values, 0, 1) if order.startswith("ZC") else values
