"""Volumes and images that are read region by region, from arrays or HDF5."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dtrain.components.datasets.files import one_line

Region = tuple[slice, ...]
"""Spatial; start and stop are integers and may lie outside of the volume: what is outside is reflected."""

Pad = Literal["reflect", "edge", "constant"] | float
"""What lies outside of a volume: reflected, the border's values, or a number; constant: 0."""

Check = Callable[[np.ndarray, str, Region, tuple[int, ...]], np.ndarray]
KEPT_BYTES = 1 << 26  # of decompressed chunks, where neighbours are read one after another
CHUNK_SLOTS = 20_011  # of HDF5's table of these chunks: a prime number, of a hundred times as many as usual ones are
OPEN_FILES = 32  # that a process keeps open; one more closes the one that was longest unused


class Volume(Protocol):
    """What one file holds: an image, and perhaps a label and a weight of the same extent.

    Attributes:
        path: The file, or the image file, that it is of.
        name: The stem for output files; unique within a dataset.
        shape: (D, H, W) or (H, W).
        channels: Of the image.
        has_label: Whether `read_label` may be called.
        has_weight: Whether `read_weight` may be called.

    It may also have `checks`, what its values are known to be, and `label_file`, the file that the label is in and
    which part of it that is.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    channels: int
    has_label: bool
    has_weight: bool

    def read(self, region: Region) -> np.ndarray:
        """The image, float32 (C, *region), in an array of its own; the values as they are stored."""

    def read_label(self, region: Region) -> np.ndarray:
        """The label, (*region) or (K, *region), in an array of its own and the type that is stored."""

    def read_weight(self, region: Region) -> np.ndarray:
        """The weight, float32 (*region), in an array of its own."""


@dataclass(frozen=True)
class Checks:
    """What the values that are read from a file must be.

    Args:
        finite: Neither the image nor the weight holds NaN or infinity.
        num_classes: The labels are 0 to num_classes - 1, whole numbers. Default: anything finite.
        ignore_index: One more label that is possible.
    """

    finite: bool = True
    num_classes: int | None = None
    ignore_index: int | None = None

    def values(self, block: np.ndarray, what: str, region: Region, shape: tuple[int, ...]) -> np.ndarray:
        """Values of an image or a weight, as they are.

        Args:
            block: (*leading, *region).
            what: Names the file and the part of it.
            region: Where the block lies.
            shape: The whole extent.

        Raises:
            ValueError: One of them is not finite.
        """
        if self.finite and not _is_finite(block):
            place, value = _first(~np.isfinite(block), block, region, shape)
            raise ValueError(f"{what} holds {value} at {place}; check_finite: false lets it pass")
        return block

    def labels(self, block: np.ndarray, what: str, region: Region, shape: tuple[int, ...]) -> np.ndarray:
        """Labels as they are; if their number of classes is known, as integers.

        Args:
            block: (*leading, *region).
            what: Names the file and the part of it.
            region: Where the block lies.
            shape: The whole extent.

        Raises:
            ValueError: One of them is not finite, or is none of the possible labels.
        """
        if not _is_finite(block):
            place, value = _first(~np.isfinite(block), block, region, shape)
            raise ValueError(f"{what} holds {value} at {place}; a label is a finite number")
        if self.num_classes is None:
            return block
        whole = block
        if block.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                whole = block.astype(np.int64)
            self._refuse(whole != block, block, what, region, shape)
        if whole.min() < 0 or whole.max() >= self.num_classes:
            wrong = (whole < 0) | (whole >= self.num_classes)
            if self.ignore_index is not None:
                wrong &= whole != self.ignore_index
            self._refuse(wrong, block, what, region, shape)
        return whole

    def _refuse(self, wrong: np.ndarray, block: np.ndarray, what: str, region: Region, shape: tuple[int, ...]) -> None:
        if wrong.any():
            place, value = _first(wrong, block, region, shape)
            assert self.num_classes is not None
            also = "" if self.ignore_index is None else f" and {self.ignore_index} (ignore_index)"
            raise ValueError(f"{what} holds the label {value} at {place}; possible: 0 to {self.num_classes - 1}{also}")


def _is_finite(block: np.ndarray) -> bool:
    if block.dtype.kind != "f":
        return True
    with np.errstate(all="ignore"):
        # A sum is read faster than a mask is written; it may also overflow, so it only acquits.
        return bool(np.isfinite(block.sum()) or np.isfinite(block).all())


def _first(wrong: np.ndarray, block: np.ndarray, region: Region, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """Where in the whole array the first wrong value lies, and the value."""
    at = tuple(int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
    leading = len(at) - len(shape)
    inside = (_reflected(part, size) for part, size in zip(region, shape, strict=True))
    return (*at[:leading], *(int(line[index]) for line, index in zip(inside, at[leading:], strict=True))), block[at]


class ArrayVolume:
    """A volume in memory.

    Args:
        path: The file that the arrays are of; it names the volume in messages.
        image: (C, *spatial), numbers.
        label: (*spatial) or (K, *spatial), or None.
        weight: (*spatial), or None.
        name: Default: the path's stem.

    Attributes:
        checks: What the values were found to be where they come from a file.
        label_file: The file that the label is of, and which part of it that is; None where no file holds it alone.
        facts: What is known of the file, for as long as a dataset is made of it.

    Raises:
        ValueError: The shapes do not fit.
    """

    facts: dict[str, Any]

    checks = Checks()
    label_file: tuple[Path, str] | None = None

    def __init__(
        self,
        path: Path,
        image: np.ndarray,
        label: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        name: str = "",
    ) -> None:
        self.path, self.name = path, name or path.stem
        self.channels, self.shape = image.shape[0], image.shape[1:]
        self.has_label, self.has_weight = label is not None, weight is not None
        self.image, self.label, self.weight = image, label, weight
        for what, array in (("label", label), ("weight", weight)):
            if array is not None:
                check_extent(f"{path}: the {what}", array.shape, "the image", self.shape, channels=what == "label")

    def read(self, region: Region) -> np.ndarray:
        """See `Volume`."""
        return read_region(self.image.__getitem__, self.shape, region, 1).astype(np.float32)

    def read_label(self, region: Region) -> np.ndarray:
        """See `Volume`."""
        assert self.label is not None, f"{self.path} has no label"
        leading = self.label.ndim - len(self.shape)
        return read_region(self.label.__getitem__, self.shape, region, leading).copy()

    def read_weight(self, region: Region) -> np.ndarray:
        """See `Volume`."""
        assert self.weight is not None, f"{self.path} has no weight"
        return read_region(self.weight.__getitem__, self.shape, region, 0).astype(np.float32)


class StoredVolume:
    """A volume in a file of several arrays by name, of which only the regions asked for are read.

    A subclass finds the shapes, and `_array` gives what can be sliced.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    channels: int
    has_label: bool
    has_weight: bool
    raw: tuple[str, ...]
    label: tuple[str, ...]
    weight: str | None
    checks: Checks
    label_file: tuple[Path, str] | None = None
    word = "dataset"  # for one of the arrays, in messages

    def _fit(self, raws: Sequence[Any], labels: Sequence[Any], weights: Sequence[Any]) -> None:
        """Take over the arrays' shapes, which fit together, or ValueError."""
        self.has_label, self.has_weight = bool(self.label), self.weight is not None
        self.label_file = (self.path, ", ".join(self.label)) if self.label else None
        if len(raws[0]) not in (2, 3, 4):
            raise ValueError(
                f"{self.path}: {self.word} '{self.raw[0]}' has the shape {raws[0]}; "
                "expected (H, W), (D, H, W) or (C, D, H, W), 2 to 4 dimensions"
            )
        self.shape = raws[0][-3:]
        parts = ((self.raw, raws, True), (self.label, labels, True), ([self.weight], weights, False))
        for names, shapes, channels in parts:
            for item, shape in zip(names, shapes, strict=False):
                what = f"{self.path}: {self.word} '{item}'"
                check_extent(what, shape, f"'{self.raw[0]}'", self.shape, channels=channels)
        self.channels = sum(self._layers(shape) for shape in raws)
        self._raw_shapes, self._label_shapes = raws, labels

    def _array(self, name: str) -> Any:
        """What gives a block when it is sliced."""
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        """See `Volume`.

        Raises:
            ValueError: The file cannot be read, or a value is not finite.
        """
        return self._image(region).astype(np.float32, copy=False)

    def read_label(self, region: Region) -> np.ndarray:
        """See `Volume`.

        Raises:
            ValueError: The file cannot be read, or a label is none.
        """
        assert self.label, f"{self.path} has no label"
        block = self._stacked(self.label, self._label_shapes, region, self.checks.labels)
        if len(self.label) == 1 and len(self._label_shapes[0]) == len(self.shape):
            return block[0]
        return block

    def read_weight(self, region: Region) -> np.ndarray:
        """See `Volume`.

        Raises:
            ValueError: The file cannot be read, or a value is not finite.
        """
        assert self.weight is not None, f"{self.path} has no weight"
        return self._one(self.weight, 0, region, self.checks.values).astype(np.float32, copy=False)

    def load(self) -> ArrayVolume:
        """All of it in memory, in the types that are stored (double precision as single).

        Raises:
            ValueError: See the readers.
        """
        everything = tuple(slice(0, extent) for extent in self.shape)
        image = _single(self._image(everything))
        label = _single(self.read_label(everything)) if self.has_label else None
        weight = self.read_weight(everything) if self.has_weight else None
        result = ArrayVolume(self.path, image, label, weight, self.name)
        result.checks, result.label_file = self.checks, self.label_file
        return result

    def _image(self, region: Region) -> np.ndarray:
        return self._stacked(self.raw, self._raw_shapes, region, self.checks.values)

    def _layers(self, shape: tuple[int, ...]) -> int:
        return shape[0] if len(shape) > len(self.shape) else 1

    def _one(self, name: str, leading: int, region: Region, check: Check) -> np.ndarray:
        array = self._array(name)
        try:
            block = read_region(array.__getitem__, self.shape, region, leading)
        except OSError as error:
            raise ValueError(f"{self.path}: {self.word} '{name}' cannot be read: {one_line(error)}") from error
        block = block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("="))
        return check(block, f"{self.path}: {self.word} '{name}'", region, self.shape)

    def _stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], region: Region, check: Check
    ) -> np.ndarray:
        """Several datasets as channels."""
        blocks = []
        for name, shape in zip(names, shapes, strict=True):
            leading = len(shape) - len(self.shape)
            block = self._one(name, leading, region, check)
            blocks.append(block if leading else block[np.newaxis])
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class HDF5Volume(StoredVolume):
    """A volume in an HDF5 file, of which only the regions asked for are read.

    The file is opened read-only by the process that reads, at its first read, and stays open there; an open file is
    neither pickled nor used after a fork. The object itself holds names and shapes.

    Args:
        path: The file.
        raw: The datasets of the image, each (*spatial) or, in three dimensions, (C, *spatial); they are stacked.
        label: Those of the label, likewise; several, or one with channels, give (K, *spatial). Empty: none.
        weight: The dataset of the weight, (*spatial), or None.
        name: Default: the path's stem.
        checks: What each value that is read must be. Default: finite.
        facts: What is known of the file already; what is found is added. Default: nothing.

    Attributes:
        reads_in_order: Whether neighbours are read one after another, so that chunks are worth keeping.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an HDF5 file, lacks a dataset, or the datasets are not numbers or do not fit together.
    """

    reads_in_order = False

    def __init__(
        self,
        path: Path,
        raw: Sequence[str] = ("raw",),
        label: Sequence[str] = (),
        weight: str | None = None,
        name: str = "",
        checks: Checks | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.name = path, name or path.stem
        self.raw, self.label, self.weight = tuple(raw), tuple(label), weight
        self.checks = checks or Checks()
        self.facts = {} if facts is None else facts
        FILES.forget(path)
        is_whole = True
        if "shapes" not in self.facts:
            parts = (self.raw, self.label, () if weight is None else (weight,))
            with open_hdf5(path) as file:
                shapes = [[_shape(path, file, item) for item in items] for items in parts]
                is_whole = all(_is_within(file, item) for items in parts for item in items)
            if not is_whole:  # nothing here tells whether the other file has changed: what is found is not kept
                self.facts = {}
            self.facts["shapes"] = shapes
        shapes = [[tuple(shape) for shape in of_part] for of_part in self.facts["shapes"]]
        self._fit(shapes[0], shapes[1], shapes[2])
        self.label_file = self.label_file if is_whole else None

    def load(self) -> ArrayVolume:
        """All of it in memory, in the types that are stored (double precision as single).

        Raises:
            ValueError: See the readers.
        """
        loaded = super().load()
        loaded.facts = self.facts
        FILES.close()
        return loaded

    def _array(self, name: str) -> Any:
        return FILES.dataset(self.path, name, KEPT_BYTES // len(self.raw) if self.reads_in_order else 0)


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == np.float64 else values


class OpenFiles:
    """The HDF5 files that this process has open, read-only, with the datasets that were used of them."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.files: OrderedDict[Path, tuple[Any, dict[str, Any]]] = OrderedDict()
        self.keeping: Path | None = None  # the file of which chunks are kept

    def dataset(self, path: Path, name: str, kept_bytes: int = 0) -> Any:
        """An open dataset, of which HDF5 keeps so many bytes of chunks, decompressed; 0: as it does by default, 1 MB.

        Chunks of one file at a time are kept.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file cannot be opened, or lacks the dataset.
        """
        if self.process != os.getpid():  # forked: these handles are the parent's
            self.process, self.files, self.keeping = os.getpid(), OrderedDict(), None
        if kept_bytes and path != self.keeping:
            for other in (path, self.keeping or path):
                if other in self.files:
                    self.files.pop(other)[0].close()
            self.keeping = path
        if path not in self.files:
            while len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)[1][0].close()
            self.files[path] = open_hdf5(path, kept_bytes), {}
        self.files.move_to_end(path)
        file, datasets = self.files[path]
        if name not in datasets:
            _shape(path, file, name)
            datasets[name] = file[name]
        return datasets[name]

    def forget(self, path: Path) -> None:
        """Open a file anew when it is needed next: another one may lie in its place."""
        if self.process == os.getpid() and path in self.files:
            self.files.pop(path)[0].close()

    def close(self) -> None:
        """Close all that this process has opened."""
        for file, _ in self.files.values() if self.process == os.getpid() else ():
            file.close()
        self.files.clear()
        self.keeping = None


FILES = OpenFiles()


def open_hdf5(path: Path, kept_bytes: int = 0) -> Any:
    """The file, opened read-only; see `OpenFiles.dataset`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an HDF5 file, or a part of one.
        ModuleNotFoundError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("HDF5 files need h5py: pip install h5py") from error
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        kept = {"rdcc_nbytes": kept_bytes, "rdcc_nslots": CHUNK_SLOTS, "rdcc_w0": 0} if kept_bytes else {}
        return h5py.File(path, "r", **kept)
    except OSError as error:
        why = "it is empty, 0 bytes" if path.is_file() and not path.stat().st_size else one_line(error)
        raise ValueError(f"{path} cannot be read as HDF5: {why}") from error


def _shape(path: Path, file: Any, name: str) -> tuple[int, ...]:
    """The shape of a dataset that is there, holds numbers, and is not empty."""
    import h5py

    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        there: list[str] = []
        file.visititems(lambda key, item: there.append(f"{key} {item.shape}") if hasattr(item, "shape") else None)
        raise ValueError(f"{path} has no dataset '{name}'; there are: {', '.join(there) or 'none'}")
    if dataset.dtype.kind not in "biuf":
        raise ValueError(f"{path}: dataset '{name}' has the type {dataset.dtype}; expected numbers")
    if not dataset.size:
        raise ValueError(f"{path}: dataset '{name}' is empty, its shape is {dataset.shape}")
    return dataset.shape


def _is_within(file: Any, name: str) -> bool:
    """Whether the values of a dataset lie in the file: neither a link, nor a virtual or external dataset."""
    dataset = file[name]
    return dataset.file.filename == file.filename and not dataset.is_virtual and not dataset.external


def check_extent(what: str, shape: tuple[int, ...], other: str, spatial: tuple[int, ...], *, channels: bool) -> None:
    """Whether something covers the same voxels as the image.

    Raises:
        ValueError: Its spatial shape is another one, or it has channels where it may not.
    """
    leading = len(shape) - len(spatial)
    if shape[-len(spatial) :] != spatial or leading not in ((0, 1) if channels else (0,)):
        expected = f"{spatial}" + (f" or (channels, {str(spatial)[1:]}" if channels else "")
        raise ValueError(f"{what} has the shape {shape}, {other} the extent {spatial}; expected {expected}")


def read_region(
    source: Callable[[Region], np.ndarray], shape: tuple[int, ...], region: Region, leading: int
) -> np.ndarray:
    """A region of something that can be sliced; what lies outside is reflected, without repeating the border.

    Nothing but the part inside is read. It is numpy's pad mode "reflect", also for more than one extent outside.

    Args:
        source: Takes slices, `leading` of them for all channels and then one per spatial axis, and gives the array.
        shape: The spatial extent of the source.
        region: What is wanted.
        leading: Axes in front of the spatial ones, read whole.

    Returns:
        (*leading, *region); a view where the source gives one.
    """
    everything = (slice(None),) * leading
    if all(0 <= part.start <= part.stop <= extent for part, extent in zip(region, shape, strict=True)):
        return source((*everything, *region))
    places = [_reflected(part, extent) for part, extent in zip(region, shape, strict=True)]
    block = source((*everything, *(slice(int(at.min()), int(at.max()) + 1) for at in places)))
    for axis, at in enumerate(places, leading):
        at = at - at.min()
        if len(at) != block.shape[axis] or (np.diff(at) != 1).any():
            block = block.take(at, axis=axis)
    return block


def padded(read: Callable[[Region], np.ndarray], region: Region, shape: tuple[int, ...], pad: Pad | None) -> np.ndarray:
    """A region of a volume of which some may lie outside.

    Args:
        read: Reads a region, (*leading, *region); it reflects what lies outside.
        region: What is wanted; it reaches into the volume.
        shape: The volume's extent.
        pad: What lies outside; None: reflect.

    Returns:
        (*leading, *region), in a type that holds the number, too.
    """
    inside = tuple(
        slice(max(part.start, 0), min(part.stop, extent)) for part, extent in zip(region, shape, strict=True)
    )
    if pad in (None, "reflect") or inside == region:
        return read(region)
    block = read(inside)
    around = [(own.start - part.start, part.stop - own.stop) for part, own in zip(region, inside, strict=True)]
    widths = [(0, 0)] * (block.ndim - len(shape)) + around
    if pad == "edge":
        return np.pad(block, widths, mode="edge")
    value = 0 if pad == "constant" else pad
    if block.dtype.kind in "iub":
        block = block.astype(np.result_type(block.dtype, np.min_scalar_type(value)), copy=False)
    return np.pad(block, widths, constant_values=value)


def _reflected(part: slice, extent: int) -> np.ndarray:
    """The positions inside for all positions of a slice."""
    period = max(2 * (extent - 1), 1)
    at = np.arange(part.start, part.stop) % period
    return np.minimum(at, period - at) if extent > 1 else np.zeros_like(at)
