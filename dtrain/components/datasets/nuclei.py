"""The nuclei of the Data Science Bowl 2018, and whatever is laid out like them: also one mask file for each object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dtrain.components.datasets.files import found_files, unique_names
from dtrain.components.datasets.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Color,
    ImageVolume,
    image_pairs,
    image_shape,
    image_volumes,
    read_image,
)
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import Checks, Volume

Objects = Literal["instances", "foreground"]


class DSB2018Dataset(PatchDataset):
    """Folders that hold `images` and `masks`, as pytorch-3dunet reads the Data Science Bowl 2018, or its raw files.

    These are a folder for each image, with the image in `images` and in `masks` a file for each nucleus; the label is
    put together of them. An item is (C, H, W), not (C, 1, H, W). Without any folder `masks` an item is the image alone.

    Args:
        file_paths: The folders; one or a list. Of the raw files the folder that holds the images' folders, or some of
            these.
        slice_builder: See ImageMaskFolder.
        transforms: See ImageMaskFolder.
        color: See ImageMaskFolder.
        mask_values: See ImageMaskFolder.
        in_memory: See ImageMaskFolder.
        global_normalization: See ImageMaskFolder.
        num_classes: See ImageMaskFolder.
        ignore_index: See ImageMaskFolder.
        objects: Of the raw files: instances: 0, and 1, 2, ... for the nuclei in the order of their files' names (where
            two overlap, the later one's); or foreground: 1 where there is one.

    Raises:
        FileNotFoundError: A folder lacks `images`, or lacks `masks` where another has it.
        ValueError: See ImageMaskFolder.
    """

    def __init__(
        self,
        file_paths: str | list[str],
        slice_builder: SliceBuilder | None = None,
        transforms: list[Any] | None = None,
        color: Color | None = None,
        mask_values: list[int] | None = None,
        in_memory: bool = True,
        global_normalization: bool = False,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        objects: Objects = "instances",
    ) -> None:
        roots = [Path(item).expanduser() for item in ([file_paths] if isinstance(file_paths, str) else file_paths)]
        checks = Checks(True, num_classes, ignore_index)
        folders = [folder for root in roots for folder in object_folders(root)]
        volumes: list[Volume]
        if folders:
            if objects not in ("instances", "foreground"):
                raise ValueError(f"objects is {objects!r}; possible: instances, foreground")
            images = object_volumes(folders, color, objects, checks)
            volumes = [volume.load() if in_memory else volume for volume in images]
            files = [file for volume in images for file in (volume.path, *getattr(volume, "masks", ()))]
        else:
            pairs = _pairs_of(roots)
            volumes = image_volumes(pairs, color, mask_values, checks, in_memory)
            files = [file for pair in pairs for file in pair if file]
        super().__init__(volumes, files, slice_builder, transforms, global_normalization)


def _pairs_of(roots: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    """Images and masks of folders that hold both."""
    labelled = [root for root in roots if (root / "masks").is_dir()]
    if labelled and (without := [root for root in roots if root not in labelled]):
        raise FileNotFoundError(f"{without[0]} lacks the folder 'masks', which {labelled[0]} has")
    return [
        pair
        for root in roots
        for pair in image_pairs(str(root / "images"), str(root / "masks") if labelled else None, suffix="")
    ]


class ObjectMasksVolume(ImageVolume):
    """An image whose label is put together of one mask per object: 0, and 1, 2, ... in the order of the files' names.

    What is not 0 in a mask is of its object; where two overlap, it is the later one's. See Volume.

    Args:
        path: The image.
        masks: The masks, of the image's extent; there may be none.
        name: For output files.
        color: gray or rgb, or None: as it is.
        objects: instances, or foreground: 1 wherever one of the objects is.
        checks: What each value must be. Default: finite.

    Raises:
        ValueError: A file is not an image, or a mask is of another size.
    """

    def __init__(
        self,
        path: Path,
        masks: Sequence[Path],
        name: str = "",
        color: Color | None = None,
        objects: Objects = "instances",
        checks: Checks | None = None,
    ) -> None:
        super().__init__(path, None, name, color, (), checks)
        self.masks, self.objects, self.has_label = tuple(masks), objects, True
        for mask in self.masks:
            if image_shape(mask)[:2] != self.shape:
                raise ValueError(f"{path} has the extent {self.shape}, its mask {mask} {image_shape(mask)[:2]}")

    def _own_label(self) -> np.ndarray:
        dtype = np.uint8 if self.objects == "foreground" else np.min_scalar_type(len(self.masks))
        label = np.zeros(self.shape, dtype)
        for number, mask in enumerate(self.masks, 1):
            values = read_image(mask, palette=False)
            # Some masks of the set are RGBA, whose last channel is opaque everywhere.
            inside = values[..., :3].any(axis=2) if values.shape[2] > 2 else values[..., 0] != 0
            label[inside] = 1 if self.objects == "foreground" else number
        region = tuple(slice(0, extent) for extent in self.shape)
        return self.checks.labels(label, f"the label of {self.path}", region, self.shape)


def object_folders(root: Path) -> list[Path]:
    """The folders <id>, each with `images` and perhaps `masks`, that a folder is or holds; [] where it holds none."""
    images = root / "images"
    if not images.is_dir():
        entries = root.iterdir() if root.is_dir() else ()
        return sorted(folder for folder in entries if (folder / "images").is_dir())
    masks = root / "masks"
    if not masks.is_dir() or len(list(images.iterdir())) != 1:
        return []
    stems = {path.stem for path in masks.iterdir()}
    return [root] if not stems or stems != {path.stem for path in images.iterdir()} else []


def object_volumes(folders: Sequence[Path], color: Color | None, objects: Objects, checks: Checks) -> list[ImageVolume]:
    """An image for each folder, called as the folder is; of those without any `masks` the image alone.

    Raises:
        FileNotFoundError: One lacks `masks` where another has it.
        ValueError: A folder holds several images, or a file cannot be read.
    """
    labelled = [folder for folder in folders if (folder / "masks").is_dir()]
    if labelled and len(labelled) < len(folders):
        without = next(folder for folder in folders if folder not in labelled)
        raise FileNotFoundError(f"{without} lacks the folder 'masks', which {labelled[0]} has")
    names = unique_names([folder.resolve() for folder in folders], [folder.name for folder in folders])
    volumes: list[ImageVolume] = []
    for folder, name in zip(folders, names, strict=True):
        image, *more = found_files(str(folder / "images"), IMAGE_SUFFIXES, "file_paths", "image")
        if more:
            raise ValueError(f"{folder / 'images'} holds {1 + len(more)} images; expected one, beside its masks")
        if not labelled:
            volumes.append(ImageVolume(image, None, name, color, (), checks))
            continue
        masks = sorted(path for path in (folder / "masks").iterdir() if path.name.lower().endswith(MASK_SUFFIXES))
        volumes.append(ObjectMasksVolume(image, [path.resolve() for path in masks], name, color, objects, checks))
    return volumes
