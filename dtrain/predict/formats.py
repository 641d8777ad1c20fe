"""The files of predictions: HDF5, TIFF, PNG, NIfTI, NPY, written from chunks of planes."""

import gzip
import io
from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Format = Literal["hdf5", "tiff", "png", "nifti", "npy"]
ENDINGS = {"hdf5": ".h5", "tiff": ".tif", "png": ".png", "nifti": ".nii.gz", "npy": ".npy"}
PACKAGES = ("h5py", "tifffile", "nibabel", "scipy")  # not installed with dtrain itself
CHUNK_SIDE = 256  # voxels of an HDF5 chunk along the last two axes; it has one plane, so that none is written twice


class FileSpec(NamedTuple):
    """What a file is to hold."""

    path: Path  # as messages name it; it is written under a temporary name
    shape: tuple[int, ...]  # extent of the volume
    has_channels: bool  # whether a chunk is (planes, K, ...) rather than (planes, ...)
    dtype: str | None = None  # of the numbers in the file; None: the chunks' own
    dataset: str = "predictions"  # of an HDF5 file
    compression: str | None = None  # gzip, lzf (HDF5 only) or None
    source: Path | None = None  # the file that the volume was read from, for NIfTI's header


def write(target: Path, file_format: Format, chunks: Iterator[np.ndarray], spec: FileSpec) -> None:
    """Write a file from chunks of planes, (planes, K, ...) or (planes, ...), from the first plane to the last.

    Raises:
        OSError: It cannot be written.
        ModuleNotFoundError: A package is missing; the message says which.
        ValueError: The numbers do not fit the type or the format.
    """
    first = next(chunks)
    if spec.dtype is None:
        spec = spec._replace(dtype=str(first.dtype if first.dtype != bool else np.dtype(np.uint8)))
    channels = first.shape[1:2] if spec.has_channels else ()
    converted = (_converted(chunk, str(spec.dtype), spec.path) for chunk in chain([first], chunks))
    try:
        WRITERS[file_format](target, converted, channels, spec)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise ModuleNotFoundError(f"these predictions need {error.name}: pip install {error.name}") from error


def _converted(chunk: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    wanted = np.dtype(dtype)
    if wanted.kind == "u" and chunk.dtype.kind == "f":
        return np.rint(chunk * np.iinfo(wanted).max).astype(wanted)  # probabilities over the whole range of the type
    if wanted.kind == "u" and chunk.size and chunk.max() > np.iinfo(wanted).max:
        raise ValueError(f"{path}: {int(chunk.max())} does not fit into predictor.dtype {dtype}; choose a larger one")
    return chunk.astype(wanted, copy=False)


def _copy(chunks: Iterator[np.ndarray], target: Any, channels: tuple[int, ...]) -> None:
    """Copy chunks into an array or dataset, (K, *spatial) or (*spatial)."""
    low = 0
    for chunk in chunks:
        if channels:
            target[:, low : low + len(chunk)] = np.swapaxes(chunk, 0, 1)
        else:
            target[low : low + len(chunk)] = chunk
        low += len(chunk)


def _in_memory(chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> np.ndarray:
    array = np.empty((*channels, *spec.shape), spec.dtype)
    _copy(chunks, array, channels)
    return array


def _hdf5(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    import h5py

    sides = [min(CHUNK_SIDE, extent) for extent in spec.shape[-2:]]
    blocks = (*(1 for _ in channels), *(1 for _ in spec.shape[:-2]), *sides)
    with _Hdf5File(path) as target:
        with h5py.File(target, "w") as file:
            shape = (*channels, *spec.shape)
            dataset = file.create_dataset(spec.dataset, shape, spec.dtype, chunks=blocks, compression=spec.compression)
            _copy(target.checked(chunks), dataset, channels)
        target.check()


class _Hdf5File(io.FileIO):
    """A file that accepts every write and keeps the first error for us.

    When HDF5 hears of a full disk, it can no longer close the file in order, and the process may crash over it later.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it; after an error, nothing any more."""
        view, done = memoryview(data).cast("B"), 0
        try:
            while self._error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the file's length; after an error, not any more."""
        try:
            if self._error is None:
                return super().truncate(size)
        except OSError as error:
            self._error = error
        return size or 0

    def check(self) -> None:
        """Raise the error that was kept, if any."""
        if self._error is not None:
            raise self._error

    def checked(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same chunks, as long as there is no error."""
        for chunk in chunks:
            yield chunk
            self.check()


def _npy(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    # Written rather than mapped: a full disk is then an error, not a signal that ends the process.
    with path.open("wb") as file:
        header = {"descr": np.dtype(spec.dtype).str, "fortran_order": False, "shape": (*channels, *spec.shape)}
        np.lib.format.write_array_header_2_0(file, header)
        header_bytes, low = file.tell(), 0
        plane_bytes = prod(spec.shape[1:]) * np.dtype(spec.dtype).itemsize
        for chunk in chunks:
            by_channel = np.swapaxes(chunk, 0, 1) if channels else chunk[np.newaxis]
            for channel, planes in enumerate(by_channel):
                file.seek(header_bytes + (channel * spec.shape[0] + low) * plane_bytes)
                file.write(np.ascontiguousarray(planes).data)
            low += len(chunk)


def _tiff(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    """Planes as pages, the channels of a plane one after another (axes ZCYX)."""
    import tifffile

    options: dict[str, Any] = {"photometric": "minisblack", "compression": "zlib" if spec.compression else None}
    nbytes = prod((*channels, *spec.shape)) * np.dtype(spec.dtype).itemsize
    with tifffile.TiffWriter(path, bigtiff=nbytes > 2**32 - 2**26) as file:
        if len(spec.shape) == 2:  # a chunk holds rows of the one page
            array = _in_memory(chunks, channels, spec)
            file.write(array, metadata={"axes": "C" * len(channels) + "YX"}, **options)
            return
        pages = (page for chunk in chunks for plane in chunk for page in (plane if channels else [plane]))
        shape = (spec.shape[0], *channels, *spec.shape[1:])
        metadata = {"axes": "Z" + "C" * len(channels) + "YX"}
        contiguous = (np.ascontiguousarray(page) for page in pages)
        file.write(contiguous, shape=shape, dtype=spec.dtype, metadata=metadata, **options)


def _png(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    from PIL import Image

    array = _in_memory(chunks, channels, spec)
    if array.dtype.kind == "f":
        array = _converted(array, "uint8", spec.path)
    is_one_plane = array.size == prod(array.shape[-2:])
    if not is_one_plane or array.dtype.itemsize > 2:
        limit = "numbers up to 65535" if is_one_plane else f"one plane, found {array.shape}"
        raise ValueError(f"{spec.path}: a PNG holds {limit}; possible: predictor.format: hdf5, tiff")
    Image.fromarray(array.reshape(array.shape[-2:])).save(path, format="PNG")


def _nifti(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    """In memory. Several channels are the fourth axis, since the first three are space."""
    array = _in_memory(chunks, channels, spec)
    if channels == (1,):
        array = array[0]
    elif channels:
        array = np.moveaxis(array.reshape(*channels, *spec.shape, *(1,) * (3 - len(spec.shape))), 0, -1)
    image = _placed(array, spec)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _placed(array: np.ndarray, spec: FileSpec) -> Any:
    """An image where the one that was read lies, if that is NIfTI: both affines with their codes, units, description.

    What its header says of its values (type, scaling, intent, range to show, extensions) is not taken over.
    """
    import nibabel

    if spec.source is None or not spec.source.name.lower().endswith((".nii", ".nii.gz")):
        return nibabel.Nifti1Image(array, np.eye(4))
    source: Any = nibabel.load(spec.source)
    header = source.header.copy()
    header.extensions.clear()
    header.set_data_dtype(array.dtype)
    header.set_intent("none" if spec.has_channels else "label")
    header["cal_min"] = header["cal_max"] = 0  # unknown
    header["aux_file"] = b""
    image = type(source)(array, source.affine, header)
    if array.ndim == 4:  # instead of the seconds from one image of the source to the next
        image.header.set_zooms((*image.header.get_zooms()[:3], 1))
    return image


WRITERS = {"hdf5": _hdf5, "tiff": _tiff, "png": _png, "nifti": _nifti, "npy": _npy}
