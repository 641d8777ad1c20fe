"""The files of predictions: HDF5, TIFF, PNG, NIfTI, NPY, Zarr, written from chunks of planes."""

import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Format = Literal["hdf5", "tiff", "png", "nifti", "npy", "zarr", "ome-zarr"]
ENDINGS = {
    **{"hdf5": ".h5", "tiff": ".tif", "png": ".png", "nifti": ".nii.gz", "npy": ".npy"},
    **{"zarr": ".zarr", "ome-zarr": ".ome.zarr"},  # folders
}
PACKAGES = ("h5py", "tifffile", "nibabel", "scipy", "zarr")  # not installed with dtrain itself
CHUNK_SIDE = 256  # voxels of an HDF5 chunk along the last two axes; it has one plane, so that none is written twice
ZARR_PLANES = 16  # of a Zarr chunk, which is a file of its own; as many planes are collected before they are written


class FileSpec(NamedTuple):
    """What a file is to hold."""

    path: Path  # as messages name it; it is written under a temporary name
    shape: tuple[int, ...]  # extent of the volume
    has_channels: bool  # whether a chunk is (planes, K, ...) rather than (planes, ...)
    dtype: str | None = None  # of the numbers in the file; None: the chunks' own
    dataset: str = "predictions"  # of an HDF5 file
    compression: str | None = None  # gzip, lzf (HDF5 only) or None
    source: Path | None = None  # the file that the volume was read from, for NIfTI's header and Zarr's version
    space: Sequence[Mapping[str, Any]] = ()  # of each axis of the volume name, unit, scale, translation; for OME-Zarr


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


def _zarr(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    """A group with one array."""
    import zarr

    group = zarr.open_group(str(path), mode="w-", zarr_format=_zarr_version(spec))
    _fill(group, spec.dataset, chunks, channels, spec)


def _ome_zarr(path: Path, chunks: Iterator[np.ndarray], channels: tuple[int, ...], spec: FileSpec) -> None:
    """An image of one resolution, with the axes of the volume that was read: OME-NGFF 0.4 in version 2, 0.5 in 3."""
    import zarr

    version = _zarr_version(spec)
    group = zarr.open_group(str(path), mode="w-", zarr_format=version)
    space = [dict(axis) for axis in spec.space] or [{"name": name} for name in "zyx"[-len(spec.shape) :]]
    axes = [{"name": "c", "type": "channel"}] * len(channels)
    axes += [{"name": axis["name"], "type": "space", **_only(axis, "unit")} for axis in space]
    scale = [*(1.0 for _ in channels), *(float(axis.get("scale", 1.0)) for axis in space)]
    shift = [*(0.0 for _ in channels), *(float(axis.get("translation", 0.0)) for axis in space)]
    changes: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if any(shift):
        changes.append({"type": "translation", "translation": shift})
    tag = {"version": "0.4"} if version == 2 else {}
    levels = [{"path": "0", "coordinateTransformations": changes}]
    content: dict[str, Any] = {"multiscales": [{**tag, "name": spec.dataset, "axes": axes, "datasets": levels}]}
    if not channels and np.dtype(spec.dtype).kind == "u":
        content["image-label"] = tag
    group.attrs.update(content if version == 2 else {"ome": {"version": "0.5", **content}})
    _fill(group, "0", chunks, channels, spec, [axis["name"] for axis in axes])


def _only(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}


def _zarr_version(spec: FileSpec) -> Any:
    """2 where the volume was read from a store of version 2, else 3."""
    if spec.source is not None and any((spec.source / mark).exists() for mark in (".zgroup", ".zarray")):
        return 2
    return 3


def _fill(
    group: Any,
    name: str,
    chunks: Iterator[np.ndarray],
    channels: tuple[int, ...],
    spec: FileSpec,
    names: Sequence[str] | None = None,
) -> None:
    """An array of a group, each of whose chunks is written once: planes are collected as far as one reaches."""
    depth = min(CHUNK_SIDE if len(spec.shape) == 2 else ZARR_PLANES, spec.shape[0])
    blocks = (*(1 for _ in channels), depth, *(min(CHUNK_SIDE, extent) for extent in spec.shape[1:]))
    options: dict[str, Any] = {"compressors": None, "fill_value": 0}
    gzip_codec: Any
    if group.metadata.zarr_format == 3:
        from zarr.codecs import GzipCodec

        gzip_codec, options["dimension_names"] = GzipCodec, names
    else:
        from numcodecs import GZip

        gzip_codec = GZip
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}  # as OME-NGFF 0.4 has it
    if spec.compression:
        options["compressors"] = [gzip_codec()]
    shape = (*channels, *spec.shape)
    array = group.create_array(name, shape=shape, chunks=blocks, dtype=spec.dtype, **options)
    _copy(_regrouped(chunks, depth), array, channels)


def _regrouped(chunks: Iterator[np.ndarray], planes: int) -> Iterator[np.ndarray]:
    """The same planes in blocks of so many, which begin at multiples of that; the last may have fewer."""
    waiting: list[np.ndarray] = []
    count = 0
    for chunk in chunks:
        low = 0
        while low < len(chunk):
            part = chunk[low : low + planes - count]
            low, count = low + len(part), count + len(part)
            waiting.append(part.copy())  # a chunk is to be used before the next is asked for
            if count == planes:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


WRITERS = {
    **{"hdf5": _hdf5, "tiff": _tiff, "png": _png, "nifti": _nifti, "npy": _npy},
    **{"zarr": _zarr, "ome-zarr": _ome_zarr},
}
