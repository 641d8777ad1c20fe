"""Folders of 2-D images with masks: PNG, TIFF, NPY, and images as JPEG."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dtrain.components.datasets.files import found_files, one_line, paired, stem_of, unique_names
from dtrain.components.datasets.patches import PatchDataset, whole
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume, Checks, Region, Volume

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".bmp")
IMAGE_SUFFIXES = (*MASK_SUFFIXES, ".jpg", ".jpeg")
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
Color = Literal["gray", "rgb"]


class ImageMaskFolder(PatchDataset):
    """2-D images, and masks of the same stems: items (image, label), float32 (C, H, W) and int64 (H, W).

    Files are PNG, TIFF, BMP or NPY ((H, W) or (H, W, C)), images also JPEG, in the order of their names. Without a
    slice_builder each image is one item, so batches need images of one size, or transforms that cut them to one.

    Args:
        images: Files, folders or patterns; one or a list.
        masks: Likewise, the labels as whole numbers; a palette's numbers count, not its colours. Default: an item is
            the image alone.
        mask_suffix: What a mask's stem has behind its image's, as _mask in a_mask.png; then both may be in one folder.
        mask_values: The values in the masks' files that stand for the classes 0, 1, ..., such as [0, 255].
        color: gray or rgb: make every image so. Default: as it is; all must have as many channels.
        slice_builder: A SliceBuilder or FilterSliceBuilder with two numbers per shape. Default: whole images.
        transforms: What is done to each item, in this order.
        in_memory: Read all when the dataset is built. Default: only the images' sizes; a process keeps the last two.
        global_normalization: Give each image's statistics to the transforms, also where an item is a part of it.
        random_scale: See LazyHDF5Dataset.
        random_scale_probability: See LazyHDF5Dataset.
        num_classes: Refuse labels other than 0 to num_classes - 1.
        ignore_index: One label more that is possible.
        check_finite: Refuse NaN and infinity in the images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file has no partner or cannot be read, or image and mask differ in size.
        ModuleNotFoundError: Pillow or tifffile is not installed.
    """

    def __init__(
        self,
        images: str | list[str],
        masks: str | list[str] | None = None,
        mask_suffix: str = "",
        mask_values: list[int] | None = None,
        color: Color | None = None,
        slice_builder: SliceBuilder | None = None,
        transforms: list[Any] | None = None,
        in_memory: bool = False,
        global_normalization: bool = False,
        random_scale: int | list[int] | None = None,
        random_scale_probability: float = 0.5,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        check_finite: bool = True,
    ) -> None:
        pairs = image_pairs(images, masks, mask_suffix)
        volumes = image_volumes(pairs, color, mask_values, Checks(check_finite, num_classes, ignore_index), in_memory)
        files = [file for pair in pairs for file in pair if file]
        super().__init__(
            volumes, files, slice_builder, transforms, global_normalization, random_scale, random_scale_probability
        )


class ImageVolume:
    """An image file and perhaps a mask, decoded when they are read; a process keeps the last two. See Volume.

    Args:
        path: The image.
        mask: The mask, or None.
        name: Default: the path's stem.
        color: gray or rgb, or None: as it is.
        mask_values: The mask's values for the classes 0, 1, ...; empty: its values are the classes.
        checks: What each value must be. Default: finite.

    Raises:
        ValueError: A file is not an image, or the mask is of another size.
    """

    has_weight = False

    def __init__(
        self,
        path: Path,
        mask: Path | None = None,
        name: str = "",
        color: Color | None = None,
        mask_values: tuple[int, ...] = (),
        checks: Checks | None = None,
    ) -> None:
        self.path, self.mask, self.name = path, mask, name or path.stem
        self.color, self.mask_values, self.checks = color, mask_values, checks or Checks()
        self.has_label = mask is not None
        *shape, channels = image_shape(path)
        self.shape: tuple[int, ...] = tuple(shape)
        self.channels = {None: channels, "gray": 1, "rgb": 3}[color]
        if mask is not None and image_shape(mask)[:2] != self.shape:
            raise ValueError(f"{path} has the extent {self.shape}, its mask {mask} {image_shape(mask)[:2]}")

    def read(self, region: Region) -> np.ndarray:
        """See Volume."""
        return _recent(self).read(region)

    def read_label(self, region: Region) -> np.ndarray:
        """See Volume."""
        return _recent(self).read_label(region)

    def read_weight(self, region: Region) -> np.ndarray:
        """See Volume; there is none."""
        return _recent(self).read_weight(region)

    def load(self) -> ArrayVolume:
        """Both decoded.

        Raises:
            ValueError: A file cannot be read, or a value is not as it must be.
        """
        image = _coloured(read_image(self.path), self.color)
        self.checks.values(image if self.channels > 1 else image[0], str(self.path), whole(self), self.shape)
        result = ArrayVolume(self.path, image, self._own_label(), name=self.name)
        result.checks = self.checks
        return result

    def _own_label(self) -> np.ndarray | None:
        return None if self.mask is None else self._label(self.mask)

    def _label(self, mask: Path) -> np.ndarray:
        label = read_image(mask, palette=False)
        if label.shape[2] != 1:
            raise ValueError(
                f"{mask} has {label.shape[2]} channels; expected a mask of one, the labels as whole numbers"
            )
        label = label[..., 0]
        if label.dtype.kind == "f":
            if not np.isfinite(label).all() or (label != np.rint(label)).any():
                raise ValueError(f"{mask} holds fractions; expected a mask of labels, which are whole numbers")
            label = label.astype(np.int64)
        if self.mask_values:
            label = _classes(label, self.mask_values, self.checks.ignore_index, mask)
        return self.checks.labels(label, str(mask), whole(self), self.shape)


@functools.lru_cache(maxsize=2)
def _recent(volume: ImageVolume) -> ArrayVolume:
    return volume.load()


def image_pairs(images: str | list[str], masks: str | list[str] | None, suffix: str) -> list[tuple[Path, Path | None]]:
    """Each image's file with its mask's; see `ImageMaskFolder`."""
    found = found_files(images, IMAGE_SUFFIXES, "images", "image")
    if masks is None:
        return [(path, None) for path in found]
    pairs = paired(found, found_files(masks, MASK_SUFFIXES, "masks", "mask"), suffix, IMAGE_SUFFIXES)
    return [*pairs]


def image_volumes(
    pairs: list[tuple[Path, Path | None]],
    color: Color | None,
    mask_values: list[int] | None,
    checks: Checks,
    in_memory: bool,
) -> list[Volume]:
    """A volume for each pair; see `ImageMaskFolder`."""
    if color not in (None, "gray", "rgb"):
        raise ValueError(f"color is {color!r}; possible: gray, rgb")
    images = [image for image, _ in pairs]
    names = unique_names(images, [stem_of(image, IMAGE_SUFFIXES) for image in images])
    values = tuple(mask_values or ())
    volumes = [ImageVolume(*pair, name, color, values, checks) for pair, name in zip(pairs, names, strict=True)]
    return [volume.load() if in_memory else volume for volume in volumes]


def _coloured(values: np.ndarray, color: Color | None) -> np.ndarray:
    """(H, W, C) as (C, H, W) of the colours that are wanted; of an alpha channel there is nothing left then."""
    channels = values.shape[2]
    if color == "gray" and channels > 1:
        values = values[..., :3] @ LUMA[:, np.newaxis] if channels > 2 else values[..., :1]
    elif color == "rgb":
        values = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def _classes(label: np.ndarray, values: tuple[int, ...], ignore_index: int | None, mask: Path) -> np.ndarray:
    """The class of each value."""
    result = np.full(label.shape, -1, dtype=np.int64)
    for number, value in enumerate(values):
        result[label == value] = number
    unknown = result == -1
    if ignore_index is not None:
        result[label == ignore_index] = ignore_index
        unknown &= label != ignore_index
    if unknown.any():
        raise ValueError(f"{mask} holds the value {label[unknown][0]}, which is none of mask_values {list(values)}")
    return result


def image_shape(path: Path) -> tuple[int, int, int]:
    """(H, W, C) of an image file, of which no more than the head is read.

    Raises:
        ValueError: It is not an image, or has more than two dimensions and channels.
    """
    with _naming(path):
        if path.suffix.lower() == ".npy":
            return _with_channels(np.load(path, mmap_mode="r", allow_pickle=False)).shape
        if path.suffix.lower() in (".tif", ".tiff"):
            with _tiff(path) as page:
                return page.imagelength, page.imagewidth, page.samplesperpixel
        with _picture(path) as image:
            return image.height, image.width, 3 if image.mode == "P" else len(image.getbands())


def read_image(path: Path, *, palette: bool = True) -> np.ndarray:
    """(H, W, C) as stored.

    Args:
        path: PNG, TIFF, BMP, JPEG or NPY.
        palette: Whether a palette's colours are wanted rather than its numbers.

    Raises:
        ValueError: It cannot be read, or not without loss.
    """
    with _naming(path):
        if path.suffix.lower() == ".npy":
            return _with_channels(np.load(path, allow_pickle=False))
        if path.suffix.lower() in (".tif", ".tiff"):
            with _tiff(path) as page:
                try:
                    values = page.asarray()
                except ValueError as error:
                    if "imagecodecs" not in str(error):  # what that would unpack, Pillow may
                        raise
                else:
                    planar = values.ndim == 3 and values.shape[1:] == (page.imagelength, page.imagewidth)
                    return _with_channels(np.moveaxis(values, 0, 2) if planar else values)
        with _picture(path) as image:
            layout = str(image.tile[0][3]) if image.tile else ""
            if ";16" in layout and len(image.getbands()) > 1:  # Pillow would halve these silently
                raise ValueError("16 bits per colour; save it as uncompressed TIFF or as NPY")
            return _with_channels(np.asarray(image.convert("RGB") if image.mode == "P" and palette else image))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong inside is said of this file."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image: {one_line(error)}") from error


def _picture(path: Path) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("images need Pillow: pip install pillow") from error
    return Image.open(path)


@contextmanager
def _tiff(path: Path) -> Iterator[Any]:
    """The only page of a TIFF file."""
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("TIFF files need tifffile: pip install tifffile") from error
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        if len(file.pages) > 1 or file.series[0].size != page.size:
            raise ValueError(
                f"it is a stack of shape {file.series[0].shape}; expected one image (store stacks as HDF5)"
            )
        yield page


def _with_channels(values: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (H, W, C)."""
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape is {values.shape}; expected (H, W) or (H, W, C)")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"its type is {values.dtype}; expected numbers")
    return values if values.ndim == 3 else values[..., np.newaxis]
