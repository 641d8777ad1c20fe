"""The files of predictions: HDF5, TIFF, PNG, NIfTI, NPY, written whole or not at all; knows no model and no rank."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Format = Literal["hdf5", "tiff", "png", "nifti", "npy"]
ENDINGS = {"hdf5": ".h5", "tiff": ".tif", "png": ".png", "nifti": ".nii.gz", "npy": ".npy"}
CHUNK_SIDE = 256  # voxels of an HDF5 chunk along the last two axes; it has one plane, so that none is written twice


class Sheet(NamedTuple):
    """What a file is to hold.

    Attributes:
        shape: Extent of the volume.
        channels: Whether a chunk is (planes, K, ...) rather than (planes, ...).
        dtype: Of the numbers in the file; None: the chunks' own.
        dataset: The dataset of an HDF5 file.
        compression: gzip, lzf (HDF5 alone) or None.
        source: The file that the volume was read from, for NIfTI's place in space.
    """

    shape: tuple[int, ...]
    channels: bool
    dtype: str | None = None
    dataset: str = "predictions"
    compression: str | None = None
    source: Path | None = None


def write(
    path: Path, file_format: Format, chunks: Iterator[np.ndarray], sheet: Sheet, written: Callable[[Path], None]
) -> None:
    """Write a file from chunks of planes.

    Args:
        path: Replaced if it is there; untouched if this fails.
        file_format: What to write.
        chunks: (planes, K, ...) or (planes, ...), from the first plane to the last.
        sheet: What is to be written.
        written: Called with the whole file under its temporary name, just before it gets its own.

    Raises:
        OSError: It cannot be written.
        ModuleNotFoundError: The format's package is missing; the message says which.
        ValueError: The numbers do not fit the type or the format.
    """
    first = next(chunks)
    if sheet.dtype is None:
        sheet = sheet._replace(dtype=str(first.dtype if first.dtype != bool else np.dtype(np.uint8)))
    channels = first.shape[1:2] if sheet.channels else ()
    converted = (_converted(chunk, str(sheet.dtype), path) for chunk in chain([first], chunks))

    def fill(target: Path) -> None:
        WRITERS[file_format](target, converted, channels, sheet)
        written(target)

    whole_file(path, fill)


def whole_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Have a file written under another name, bring it to the disk, give it its own name; nothing is left of a failure.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _converted(chunk: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    wanted = np.dtype(dtype)
    if wanted.kind == "u" and chunk.dtype.kind == "f":
        return np.rint(chunk * np.iinfo(wanted).max).astype(wanted)  # probabilities over the whole range of the type
    if wanted.kind == "u" and chunk.size and chunk.max() > np.iinfo(wanted).max:
        raise ValueError(f"{path}: {int(chunk.max())} does not fit into predictor.dtype {dtype}; choose a larger one")
    return chunk.astype(wanted, copy=False)


def _placed(chunks: Iterator[np.ndarray], target: Any, channels: tuple[int, ...]) -> None:
    """Put chunks into what can be indexed as (K, *spatial) or (*spatial)."""
    low = 0
    for chunk in chunks:
        if channels:
            target[:, low : low + len(chunk)] = np.swapaxes(chunk, 0, 1)
        else:
            target[low : low + len(chunk)] = chunk
        low += len(chunk)


def _in_memory(chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> np.ndarray:
    array = np.empty((*channels, *sheet.shape), sheet.dtype)
    _placed(chunks, array, channels)
    return array


def _hdf5(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> None:
    with _needed("h5py"):
        import h5py
    sides = [min(CHUNK_SIDE, extent) for extent in sheet.shape[-2:]]
    blocks = (*(1 for _ in channels), *(1 for _ in sheet.shape[:-2]), *sides)
    with Steady(path) as steady:
        with h5py.File(steady, "w") as file:
            shape = (*channels, *sheet.shape)
            target = file.create_dataset(
                sheet.dataset, shape, sheet.dtype, chunks=blocks, compression=sheet.compression
            )
            _placed(steady.checked(chunks), target, channels)
        steady.check()


class Steady:
    """A file for HDF5 that takes every write, and keeps the first error for us.

    Told of a full disk, HDF5 can no longer close the file in order, and the process may crash over it later.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def __enter__(self) -> "Steady":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # seek, tell, readinto, flush

    def write(self, data: Any) -> int:
        """Write all of it; after an error, nothing any more."""
        view, done = memoryview(data).cast("B"), 0
        try:
            while self._error is None and done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self._error = error
        return len(view)

    def truncate(self, size: int) -> int:
        """Make the file so long."""
        try:
            if self._error is None:
                self._file.truncate(size)
        except OSError as error:
            self._error = error
        return size

    def check(self) -> None:
        """Raise what was kept."""
        if self._error is not None:
            raise self._error

    def checked(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same chunks, as long as there is no error."""
        for chunk in chunks:
            yield chunk
            self.check()


def _npy(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> None:
    # Written rather than mapped: a full disk is an error then, and no signal that ends the process.
    spatial = 1 if channels else 0
    with path.open("wb") as file:
        header = {"descr": np.dtype(sheet.dtype).str, "fortran_order": False, "shape": (*channels, *sheet.shape)}
        np.lib.format.write_array_header_2_0(file, header)
        begin, low = file.tell(), 0
        plane = int(np.prod(sheet.shape[1:], dtype=np.int64)) * np.dtype(sheet.dtype).itemsize
        for chunk in chunks:
            parts = np.swapaxes(chunk, 0, 1) if spatial else chunk[np.newaxis]
            for channel, part in enumerate(parts):
                file.seek(begin + (channel * sheet.shape[0] + low) * plane)
                file.write(np.ascontiguousarray(part).data)
            low += len(chunk)


def _tiff(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> None:
    """Planes as pages, the channels of a plane one after another (axes ZCYX)."""
    with _needed("tifffile"):
        import tifffile
    axes = "ZYX"[-len(sheet.shape) :]
    options: dict[str, Any] = {"photometric": "minisblack", "compression": "zlib" if sheet.compression else None}
    nbytes = int(np.prod((*channels, *sheet.shape), dtype=np.int64)) * np.dtype(sheet.dtype).itemsize
    with tifffile.TiffWriter(path, bigtiff=nbytes > 2**32 - 2**26) as file:
        if len(sheet.shape) == 2:  # a chunk holds rows of the one page
            array = _in_memory(chunks, channels, sheet)
            file.write(array, metadata={"axes": "C" * len(channels) + axes}, **options)
            return
        pages = (page for chunk in chunks for plane in chunk for page in (plane if channels else [plane]))
        shape = (sheet.shape[0], *channels, *sheet.shape[1:])
        whole = {"axes": axes[:1] + "C" * len(channels) + axes[1:]}
        file.write(
            (np.ascontiguousarray(page) for page in pages), shape=shape, dtype=sheet.dtype, metadata=whole, **options
        )


def _png(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> None:
    with _needed("pillow"):
        from PIL import Image
    array = _in_memory(chunks, channels, sheet)
    if array.dtype.kind == "f":
        array = _converted(array, "uint8", path)
    if array.size != int(np.prod(array.shape[-2:])):
        raise ValueError(f"{path}: a PNG holds one plane, found {array.shape}; possible: predictor.format: hdf5, tiff")
    if array.dtype.itemsize > 2:
        raise ValueError(f"{path}: a PNG holds numbers up to 65535; possible: predictor.format: hdf5, tiff")
    Image.fromarray(array.reshape(array.shape[-2:])).save(path, format="PNG")


def _nifti(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], sheet: Sheet) -> None:
    """In memory. The place in space is that of the file that was read, if it is NIfTI; channels are the last axis."""
    with _needed("nibabel"):
        import nibabel
    array = _in_memory(chunks, channels, sheet)
    if channels:
        array = array[0] if channels == (1,) else np.moveaxis(array, 0, -1)
    affine = np.eye(4)
    if sheet.source is not None and sheet.source.name.endswith((".nii", ".nii.gz")):
        affine = nibabel.load(sheet.source).affine  # type: ignore[attr-defined]
    image = nibabel.Nifti1Image(array, affine)
    path.write_bytes(_gzipped(image.to_bytes()))


def _gzipped(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, compresslevel=4, mtime=0)


@contextmanager
def _needed(package: str) -> Iterator[None]:
    """An import of an optional package.

    Raises:
        ModuleNotFoundError: With the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this format of predictions needs {package}: pip install {package}") from error


WRITERS: dict[str, Callable[[Path, Iterator[np.ndarray], tuple[int, ...], Sheet], None]] = {
    "hdf5": _hdf5,
    "tiff": _tiff,
    "png": _png,
    "nifti": _nifti,
    "npy": _npy,
}
