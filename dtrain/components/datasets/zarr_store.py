"""Patches of Zarr stores: plain arrays, and the multiscale images and labels of OME-Zarr (OME-NGFF)."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtrain.components.datasets.files import found_files, one_line, stem_of, unique_names
from dtrain.components.datasets.flat import Axis
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume, Checks, StoredVolume, Volume

SUFFIXES = (".zarr", ".ome.zarr")
MARKS = (".zgroup", ".zarray", "zarr.json")  # what the folder of a store holds, one of them
MILLIMETRES = {
    **{"angstrom": 1e-7, "nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0},
    **{"decimeter": 100.0, "meter": 1000.0, "inch": 25.4},
}


class ZarrDataset(PatchDataset):
    """Patches of Zarr stores, of version 2 or 3, each read from its chunks when it is asked for; see PatchDataset.

    A store is a folder, opened read-only: an array; a group of arrays; or an OME-Zarr, in whose image and labels
    one of the resolutions is read. Of OME-Zarr each volume keeps the scale and the unit of its axes, with which a
    prediction is written.

    Args:
        file_paths: Stores, folders (all *.zarr in them, sorted) or patterns; one or a list.
        raw_internal_path: The image's array, (D, H, W), (C, D, H, W) or (H, W), or an OME-Zarr image; several are
            stacked as channels. Default: the store itself, if it is an array or an OME-Zarr image, else `raw`.
        label_internal_path: The label's, such as labels/cells; several are stacked. Default: an item is the image
            alone.
        weight_internal_path: The array of each voxel's weight, of the image's extent.
        level: Which resolution of an OME-Zarr is read: its number, 0 for the full one, or its name in the store.
        timepoint: Which point in time of an OME-Zarr is read, where it holds several.
        slice_builder: A SliceBuilder or FilterSliceBuilder. Default: each store is one item.
        transforms: What is done to each patch, in this order.
        in_memory: Read all when the dataset is built.
        global_normalization: See LazyHDF5Dataset.
        random_scale: See LazyHDF5Dataset.
        random_scale_probability: See LazyHDF5Dataset.
        num_classes: Refuse labels other than 0 to num_classes - 1, and read them as integers.
        ignore_index: One label more that is possible.
        check_finite: Refuse NaN and infinity in the image and the weight.
        axis: z | y | x: items are slices across this axis, (C, H, W), for a 2-D network. A slice_builder then has two
            numbers per shape; without one, an item is a whole slice.

    Raises:
        FileNotFoundError: There is no such store.
        ValueError: A store or array is not as it must be.
        ModuleNotFoundError: zarr is not installed.
    """

    def __init__(
        self,
        file_paths: str | list[str],
        raw_internal_path: str | list[str] | None = None,
        label_internal_path: str | list[str] | None = None,
        weight_internal_path: str | None = None,
        level: int | str = 0,
        timepoint: int | None = None,
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
        stores = found_files(file_paths, SUFFIXES, "file_paths", "Zarr store", MARKS)
        raw, label = _names(raw_internal_path), _names(label_internal_path)
        if weight_internal_path is not None and not label:
            raise ValueError("weight_internal_path needs a label_internal_path: a weight weighs labels")
        checks = Checks(check_finite, num_classes, ignore_index)
        volumes: list[Volume] = []
        for path, name in zip(stores, unique_names(stores, [stem_of(path, SUFFIXES) for path in stores]), strict=True):
            volume = ZarrVolume(path, raw, label, weight_internal_path, level, timepoint, name, checks)
            volumes.append(volume.load() if in_memory else volume)
        super().__init__(
            volumes,
            stores,
            slice_builder,
            transforms,
            global_normalization,
            random_scale,
            random_scale_probability,
            axis,
        )  # fmt: skip  # fmt: skip


class ZarrVolume(StoredVolume):
    """A volume in a Zarr store, of which only the chunks that a region touches are read.

    The object holds names and shapes; each process opens the arrays itself, at its first read.

    Args:
        path: The store.
        raw: What the image is stacked of: arrays or OME-Zarr images. Empty: the store itself, else `raw`.
        label: Those of the label. Empty: none.
        weight: That of the weight, or None.
        level: The resolution of OME-Zarr images, by number or name.
        timepoint: The point in time, where there are several.
        name: Default: the path's stem.
        checks: What each value that is read must be. Default: finite.

    Attributes:
        space: For each axis its name, and where the store says so unit, scale (voxel to voxel) and translation.
        axis_names: Theirs in one.
        affine: From voxels to millimetres, float64 (4, 4), or None where the store does not tell.

    Raises:
        ValueError: It is not a Zarr store, lacks an array, or the arrays are not numbers or do not fit together.
    """

    word = "array"

    def __init__(
        self,
        path: Path,
        raw: Sequence[str] = (),
        label: Sequence[str] = (),
        weight: str | None = None,
        level: int | str = 0,
        timepoint: int | None = None,
        name: str = "",
        checks: Checks | None = None,
    ) -> None:
        self.path, self.name = path, name or stem_of(path, SUFFIXES)
        self.raw, self.label, self.weight = tuple(raw) or (_default(path),), tuple(label), weight
        self.checks = checks or Checks()
        _opened_array.cache_clear()  # another store may lie in a known one's place
        parts = (self.raw, self.label, () if weight is None else (weight,))
        self.views = {item: _view_of(path, item, level, timepoint) for part in parts for item in part}
        self._fit(*([self.views[item].shape for item in part] for part in parts))
        first = self.views[self.raw[0]]
        self.space = [dict(axis) for axis in first.space]
        self.affine, self.axis_names = _affine(self.space), "".join(axis["name"] for axis in self.space)

    def load(self) -> "PlacedStore":
        """All of it in memory, with its space.

        Raises:
            ValueError: See the readers.
        """
        loaded = super().load()
        result = PlacedStore(loaded.path, loaded.image, loaded.label, loaded.weight, loaded.name)
        result.space, result.affine, result.axis_names = self.space, self.affine, self.axis_names
        return result

    def _array(self, name: str) -> "_Sliceable":
        return _Sliceable(self.path, self.views[name])


class PlacedStore(ArrayVolume):
    """A Zarr store's volume in memory; the attributes are ZarrVolume's."""

    space: list[dict[str, Any]]
    affine: np.ndarray | None
    axis_names: str


class View(NamedTuple):
    """An array in a store, seen as (*spatial) or (C, *spatial)."""

    array: str  # its path in the store
    before: tuple[int, ...]  # what stands at the axes in front of these
    shape: tuple[int, ...]
    space: Sequence[dict[str, Any]]  # see ZarrVolume


class _Sliceable(NamedTuple):
    """What `read_region` slices."""

    path: Path
    view: View

    def __getitem__(self, region: Any) -> np.ndarray:  # type: ignore[override]
        array = _opened_array(self.path, self.view.array, os.getpid())
        try:
            return np.asarray(array[(*self.view.before, *region)])
        except (ValueError, RuntimeError, KeyError) as error:  # as codecs say it
            raise OSError(one_line(error)) from error


@functools.lru_cache(maxsize=256)
def _opened_array(path: Path, name: str, _process: int) -> Any:
    """An array, opened once in each process: what a process opened before a fork is not used after it."""
    return opened(path, name)


def opened(path: Path, name: str = "") -> Any:
    """A group or an array of a store, read-only.

    Raises:
        ValueError: It is not a Zarr store, or has nothing of that name.
        ModuleNotFoundError: zarr is not installed.
    """
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Zarr stores need zarr: pip install zarr") from error
    try:
        return zarr.open(str(path), mode="r", path=name or None)
    except Exception as error:
        if name:
            there = ", ".join(_members(path)) or "none"
            raise ValueError(f"{path} has no array '{name}'; there are: {there}") from error
        raise ValueError(f"{path} cannot be read as Zarr: {one_line(error)}") from error


def _members(path: Path) -> Iterator[str]:
    """What a store holds that a config can name, with shapes."""
    root = opened(path)
    for key, item in root.members(max_depth=2) if hasattr(root, "members") else ():
        if hasattr(item, "shape"):
            yield f"{key} {item.shape}"
        elif _multiscale(item):
            yield f"{key} (an OME-Zarr image)"


def _names(wish: str | list[str] | None) -> tuple[str, ...]:
    return () if wish is None else (wish,) if isinstance(wish, str) else tuple(wish)


def _default(path: Path) -> str:
    """What of a store is the image, unless something is named: itself, else `raw`."""
    root = opened(path)
    return "" if hasattr(root, "shape") or _multiscale(root) else "raw"


def _multiscale(group: Any) -> dict[str, Any]:
    """The description of a multiscale image, as OME-NGFF 0.4 and before or 0.5 has it; {} if it is none."""
    attributes = dict(group.attrs)
    several = attributes.get("ome", attributes).get("multiscales") or [{}]
    return dict(several[0])


def _view_of(path: Path, name: str, level: int | str, timepoint: int | None) -> View:
    """An array, or one resolution of an image, as what a volume reads of it."""
    item, what = opened(path, name), f"{path}: array '{name}'"
    described: dict[str, Any] = {}
    if not hasattr(item, "shape"):
        described = _multiscale(item)
        if not described:
            raise ValueError(f"{path}: '{name}' is a group without an image; there are: {', '.join(_members(path))}")
        dataset = _of_level(path, described, level)
        name = f"{name}/{dataset['path']}".strip("/")
        item, what = opened(path, name), f"{path}: array '{name}'"
        described = described | {"of level": dataset}
    if item.dtype.kind not in "biuf":
        raise ValueError(f"{what} has the type {item.dtype}; expected numbers")
    if not item.size:
        raise ValueError(f"{what} is empty, its shape is {item.shape}")
    axes = _axes(described, len(item.shape), what)
    before: tuple[int, ...] = ()
    if axes[0]["type"] == "time":
        count = item.shape[0]
        if timepoint is None and count > 1:
            raise ValueError(f"timepoint is not given, and {what} has {count} of them; possible: 0 to {count - 1}")
        if not 0 <= (timepoint or 0) < count:
            raise ValueError(f"timepoint is {timepoint}, and {what} has {count} of them; possible: 0 to {count - 1}")
        before = (timepoint or 0,)
    spatial = [axis for axis in axes if axis["type"] == "space"]
    space = [{key: axis[key] for key in axis if key != "type"} for axis in spatial]
    return View(name, before, item.shape[len(before) :], space)


def _of_level(path: Path, described: dict[str, Any], level: int | str) -> dict[str, Any]:
    """The description of one resolution."""
    levels = described["datasets"]
    names = [str(item["path"]) for item in levels]
    if isinstance(level, int) and 0 <= level < len(levels):
        return dict(levels[level])
    if str(level) in names:
        return dict(levels[names.index(str(level))])
    raise ValueError(
        f"level is {level}, which {path} does not have; possible: 0 to {len(levels) - 1}, or by name {', '.join(names)}"
    )


def _axes(described: dict[str, Any], dims: int, what: str) -> list[dict[str, Any]]:
    """Name and type of each axis, and of those in space what is known of unit, scale and translation."""
    listed: Any = described.get("axes")
    if listed is None:  # a plain array: its last three axes are space; or OME-NGFF up to 0.2
        letters = "tczyx" if described else ("czyx"[-dims:] if dims <= 4 else "")
        listed = list(letters)
    types = {"t": "time", "c": "channel"}
    axes = [{"name": axis} if isinstance(axis, str) else dict(axis) for axis in listed]
    axes = [{"type": types.get(axis["name"], "space"), **axis} for axis in axes]
    kinds = [axis["type"] for axis in axes]
    if len(axes) != dims or kinds != sorted(kinds, key=["time", "channel", "space"].index) or len(kinds) > 5:
        names = "".join(axis["name"] for axis in axes) or "none that are known"
        raise ValueError(f"{what} has {dims} dimensions and the axes {names}; expected [t][c][z]yx")
    for of in (described.get("of level", {}), described):  # the level's own first, then the image's
        for change in of.get("coordinateTransformations") or ():
            for axis, value in zip(axes, change.get(change.get("type")) or (), strict=False):
                if change["type"] == "scale":
                    axis["scale"] = axis.get("scale", 1.0) * value
                    axis["translation"] = axis.get("translation", 0.0) * value
                elif change["type"] == "translation":
                    axis["translation"] = axis.get("translation", 0.0) + value
    return axes


def _affine(space: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """From voxels to millimetres, with z, y, x of the store as z, y, x of the world; None where it is not told."""
    if any(axis.get("unit") not in MILLIMETRES or "scale" not in axis for axis in space):
        return None
    result, world = np.zeros((4, 4)), {"x": 0, "y": 1, "z": 2}
    rows = [world.get(axis["name"], 2 - number) for number, axis in enumerate(space, 3 - len(space))]
    for column, (row, axis) in enumerate(zip(rows, space, strict=True)):
        millimetres = MILLIMETRES[axis["unit"]]
        result[row, column] = axis["scale"] * millimetres
        result[row, 3] = axis.get("translation", 0.0) * millimetres
    for column, row in enumerate(sorted({0, 1, 2} - set(rows)), len(space)):
        result[row, column] = 1.0
    result[3, 3] = 1.0
    return result
