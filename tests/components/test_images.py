"""Folders of images with masks, and NIfTI: what is read of which file, and what is refused."""

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dtrain.components.datasets.files import stem_of
from dtrain.components.datasets.images import ImageMaskFolder, read_image
from dtrain.components.datasets.nifti import NiftiDataset
from dtrain.components.datasets.nuclei import DSB2018Dataset
from dtrain.components.datasets.slices import FilterSliceBuilder, SliceBuilder

MEMORY = pytest.mark.parametrize("in_memory", [False, True])


def colours(shape: tuple[int, ...] = (20, 24, 3), seed: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8 if high <= 256 else np.uint16)


def masks_of(shape: tuple[int, ...] = (20, 24), seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, shape, dtype=np.uint8)


def saved(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images, of several formats, with masks."""
    for number, (ending, other) in enumerate([(".png", ".tif"), (".tif", ".npy"), (".npy", ".png")]):
        saved(tmp_path / f"images/{'cab'[number]}{ending}", colours(seed=number))
        saved(tmp_path / f"masks/{'cab'[number]}{other}", masks_of(seed=number))
    return tmp_path


@MEMORY
def test_images_come_with_the_masks_of_the_same_stem(in_memory: bool, root: Path) -> None:
    dataset = ImageMaskFolder(f"{root}/images", f"{root}/masks", in_memory=in_memory, num_classes=3)
    assert [volume.name for volume in dataset.volumes] == ["a", "b", "c"]
    assert len(dataset.files) == 6 and not dataset.random
    for item, seed in zip(dataset, (1, 2, 0), strict=False):
        image, label = item
        assert image.dtype == torch.float32 and label.dtype == torch.int64
        np.testing.assert_array_equal(image, np.moveaxis(colours(seed=seed), 2, 0))
        np.testing.assert_array_equal(label, masks_of(seed=seed))
    assert len(pickle.dumps(dataset)) < 5000 or in_memory


def test_patches_of_images_and_images_alone(root: Path) -> None:
    dataset = ImageMaskFolder(f"{root}/images", slice_builder=SliceBuilder([8, 8], [6, 8]))
    assert len(dataset) == 3 * 3 * 3
    number, (rows, columns) = dataset.places[10]
    np.testing.assert_array_equal(dataset[10], np.moveaxis(colours(seed=2)[rows, columns], 2, 0))
    assert number == 1
    outside = dataset.volumes[0].read((slice(-2, 4), slice(20, 26)))
    expected = np.pad(colours(seed=1), [(2, 0), (0, 2), (0, 0)], mode="reflect")[:6, 20:26]
    np.testing.assert_array_equal(outside, np.moveaxis(expected, 2, 0))
    filtered = FilterSliceBuilder([8, 8], threshold=0.7, slack_acceptance=0)
    chosen = ImageMaskFolder(f"{root}/images", f"{root}/masks", slice_builder=filtered)
    assert all((label > 0).float().mean() > 0.7 for _, label in (chosen[at] for at in range(len(chosen))))
    assert 0 < len(chosen) < 27


def test_both_may_lie_in_one_folder(tmp_path: Path) -> None:
    for stem in "ab":
        saved(tmp_path / f"{stem}.png", colours(seed=ord(stem)))
        saved(tmp_path / f"{stem}_mask.png", masks_of(seed=ord(stem)))
    dataset = ImageMaskFolder(str(tmp_path), str(tmp_path), mask_suffix="_mask")
    assert [path.name for path in dataset.files] == ["a.png", "a_mask.png", "b.png", "b_mask.png"]
    np.testing.assert_array_equal(dataset[1][1], masks_of(seed=ord("b")))


def test_colours_are_made_alike(tmp_path: Path) -> None:
    gray = colours((20, 24))
    saved(tmp_path / "a.png", gray)
    saved(tmp_path / "b.png", colours())
    saved(tmp_path / "c.png", colours((20, 24, 4)))
    with pytest.raises(ValueError, match=r"b\.png has 3 channels, .*a\.png 1"):
        ImageMaskFolder(str(tmp_path))
    rgb = ImageMaskFolder(str(tmp_path), color="rgb")
    np.testing.assert_array_equal(rgb[0], np.stack([gray] * 3))
    np.testing.assert_array_equal(rgb[2], np.moveaxis(colours((20, 24, 4))[..., :3], 2, 0))
    single = ImageMaskFolder(str(tmp_path), color="gray")
    np.testing.assert_array_equal(single[0], gray[None])
    by_pillow = np.asarray(Image.fromarray(colours()).convert("L"))
    assert np.abs(single[1][0].numpy() - by_pillow).max() <= 1
    with pytest.raises(ValueError, match="color is 'red'; possible: gray, rgb"):
        ImageMaskFolder(str(tmp_path), color="red")  # type: ignore[arg-type]


def test_values_are_read_without_loss(tmp_path: Path) -> None:
    deep = colours((20, 24), high=60000)
    for name in ("a.png", "a.tif", "a.npy"):
        np.testing.assert_array_equal(read_image(saved(tmp_path / name, deep))[..., 0], deep)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "b.tif", colours(high=60000))), colours(high=60000))
    planes = np.moveaxis(colours(), 2, 0)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "p.tif"), colours())
    Image.fromarray(colours()).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_image(tmp_path / "lzw.tif"), colours())
    bits = Image.fromarray(masks_of() > 0)
    bits.save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[..., 0], masks_of() > 0)


def test_a_palettes_numbers_are_labels_and_its_colours_an_image(tmp_path: Path) -> None:
    picture = Image.fromarray(masks_of(), mode=None).convert("P")
    picture.putdata(masks_of().ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png")
    image, label = ImageMaskFolder(str(tmp_path), str(tmp_path))[0]
    np.testing.assert_array_equal(label, masks_of())
    np.testing.assert_array_equal(image[0], 255 * (masks_of() == 1))


def test_values_of_a_mask_become_classes(tmp_path: Path) -> None:
    values = np.array([0, 255, 128], dtype=np.uint8)[masks_of()]
    saved(tmp_path / "images/a.png", colours())
    mask = saved(tmp_path / "masks/a.png", values)
    folders = (f"{tmp_path}/images", f"{tmp_path}/masks")
    np.testing.assert_array_equal(ImageMaskFolder(*folders, mask_values=[0, 255, 128])[0][1], masks_of())
    ignored = ImageMaskFolder(*folders, mask_values=[0, 255], ignore_index=128, num_classes=2)[0][1]
    np.testing.assert_array_equal(ignored, np.where(values == 128, 128, masks_of()))
    with pytest.raises(ValueError, match=rf"{mask} holds the value 128, which is none of mask_values \[0, 255\]"):
        ImageMaskFolder(*folders, mask_values=[0, 255], in_memory=True)
    with pytest.raises(ValueError, match=rf"{mask} holds the label \d+ at \(\d+, \d+\); possible: 0 to 2"):
        ImageMaskFolder(*folders, num_classes=3)[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda root: (root / "masks/a.npy").unlink(),
            "no label for {root}/images/a.tif; a label is called as its image",
        ),
        (lambda root: (root / "images/b.npy").unlink(), "no image for {root}/masks/b.png"),
        (
            lambda root: saved(root / "masks/a.png", masks_of()),
            "{root}/masks/a.npy and {root}/masks/a.png have the same stem",
        ),
        (
            lambda root: saved(root / "masks/a.npy", masks_of((20, 25))),
            "a.tif has the extent (20, 24), its mask {root}/masks/a.npy (20, 25)",
        ),
        (lambda root: (root / "images/a.tif").write_bytes(b""), "{root}/images/a.tif cannot be read as an image"),
        (lambda root: (root / "images/c.png").write_text("no image"), "{root}/images/c.png cannot be read as an image"),
        (
            lambda root: saved(root / "images/a.tif", np.zeros((5, 20, 24), np.uint8)),
            "it is a stack of shape (5, 20, 24)",
        ),
        (
            lambda root: saved(root / "images/b.npy", np.zeros((2, 3, 4, 5))),
            "{root}/images/b.npy cannot be read as an image: its shape is (2, 3, 4, 5)",
        ),
        (lambda root: saved(root / "images/b.npy", np.array([["a"]])), "its type is <U1; expected numbers"),
        (
            lambda root: saved(root / "images/b.npy", np.array([[object()]])),
            "{root}/images/b.npy cannot be read as an image",
        ),
    ],
)
def test_bad_folders_are_refused_at_once(change: Any, text: str, root: Path) -> None:
    change(root)
    with pytest.raises(ValueError) as error:
        ImageMaskFolder(f"{root}/images", f"{root}/masks")
    assert text.format(root=root) in str(error.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: cut(root / "images/c.png"), "{root}/images/c.png cannot be read as an image: "),
        (
            lambda root: saved(root / "masks/b.png", colours()),
            "{root}/masks/b.png has 3 channels; expected a mask of one",
        ),
        (lambda root: saved(root / "masks/a.npy", np.full((20, 24), 0.5)), "{root}/masks/a.npy holds fractions"),
        (
            lambda root: saved(root / "images/b.npy", np.full((20, 24, 3), np.nan)),
            "{root}/images/b.npy holds nan at (0, 0, 0)",
        ),
    ],
)
@MEMORY
def test_bad_values_are_refused_when_they_are_read(in_memory: bool, change: Any, text: str, root: Path) -> None:
    change(root)
    with pytest.raises(ValueError) as error:
        dataset = ImageMaskFolder(f"{root}/images", f"{root}/masks", in_memory=in_memory)
        for index in range(len(dataset)):
            dataset[index]
    assert text.format(root=root) in str(error.value)


def test_a_png_that_would_be_read_with_loss_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / "a.png"
    saved(deep, colours())
    data = bytearray(deep.read_bytes())
    assert data[24] == 8  # the bits per colour, in the head
    data[24] = 16
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    deep.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: 16 bits per colour; save it as"):
        read_image(deep)


def test_folders_as_pytorch_3dunet_has_them(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    saved(other / "images/a.png", colours(seed=9))
    saved(other / "masks/a.png", masks_of(seed=9))
    with pytest.raises(ValueError, match="have the same stem"):
        ImageMaskFolder([f"{root}/images", f"{other}/images"], [f"{root}/masks", f"{other}/masks"])
    dataset = DSB2018Dataset([str(root), str(other)])
    stems = [f"{root.name}_images_{stem}" for stem in "abc"]
    assert [volume.name for volume in dataset.volumes] == [*stems, "other_images_a"]
    np.testing.assert_array_equal(dataset[3][1], masks_of(seed=9))
    (other / "masks/a.png").unlink()
    (other / "masks").rmdir()
    with pytest.raises(FileNotFoundError, match=f"{other} lacks the folder 'masks', which {root} has"):
        DSB2018Dataset([str(root), str(other)])
    assert torch.is_tensor(DSB2018Dataset(str(other))[0])
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {tmp_path}/none/images"):
        DSB2018Dataset(f"{tmp_path}/none")


def test_images_are_not_touched(root: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*.*")}
    for path in before:
        path.chmod(0o444)
    dataset = ImageMaskFolder(f"{root}/images", f"{root}/masks", global_normalization=True)
    for index in range(len(dataset)):
        dataset[index]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*.*")} == before


# NIfTI

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


def nifti(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number, ending in enumerate((".nii", ".nii.gz")):
        values = np.random.default_rng(number).random((8, 9, 10), dtype=np.float32)
        nifti(tmp_path / f"images/s{number}{ending}", values)
        nifti(tmp_path / f"labels/s{number}_seg.nii.gz", (values > 0.5).astype(np.float32))
    return tmp_path


@MEMORY
def test_nifti_keeps_the_files_axes_and_place(in_memory: bool, scans: Path) -> None:
    dataset = NiftiDataset(
        f"{scans}/images", f"{scans}/labels", "_seg", SliceBuilder([4, 5, 10]), in_memory=in_memory, num_classes=2
    )
    assert [volume.name for volume in dataset.volumes] == ["s0", "s1"]
    for index in range(len(dataset)):
        number, region = dataset.places[index]
        image, label = dataset[index]
        values = np.random.default_rng(number).random((8, 9, 10), dtype=np.float32)
        np.testing.assert_array_equal(image[0], values[region])
        np.testing.assert_array_equal(label, values[region] > 0.5)
        assert label.dtype == torch.int64
    for volume in dataset.volumes:
        np.testing.assert_array_equal(volume.affine, AFFINE)  # type: ignore[attr-defined]
        assert volume.header.get_zooms() == (2, 1.5, 3)  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[1][0], dataset[1][0])


@MEMORY
def test_nifti_is_scaled_and_its_fourth_axis_are_channels(in_memory: bool, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 100, (4, 5, 6, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii")
    expected = np.moveaxis(np.asanyarray(nibabel.load(tmp_path / "a.nii").dataobj), -1, 0)
    assert not np.array_equal(expected, np.moveaxis(stored, -1, 0))
    dataset = NiftiDataset(str(tmp_path), in_memory=in_memory)
    np.testing.assert_allclose(dataset[0], expected, rtol=1e-6)
    part = dataset.volumes[0].read((slice(-1, 2), slice(2, 7), slice(0, 6)))
    padded = np.pad(expected, [(0, 0), (1, 0), (0, 2), (0, 0)], mode="reflect")[:, :3, 2:7]
    np.testing.assert_allclose(part, padded, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda root: nifti(root / "labels/s0_seg.nii.gz", np.zeros((8, 9, 11))),
            "s0.nii has the extent (8, 9, 10), its label",
        ),
        (
            lambda root: nifti(root / "labels/s0_seg.nii.gz", np.zeros((8, 9, 10)), np.eye(4)),
            "their affines differ by up to",
        ),
        (
            lambda root: nifti(root / "labels/s0_seg.nii.gz", np.full((8, 9, 10), 0.5)),
            "s0_seg.nii.gz holds fractions such as 0.5",
        ),
        (
            lambda root: nifti(root / "labels/s0_seg.nii.gz", np.full((8, 9, 10), 2.0)),
            "s0_seg.nii.gz holds the label 2 at (0, 0, 0)",
        ),
        (
            lambda root: nifti(root / "images/s0.nii", np.full((8, 9, 10), np.nan)),
            "images/s0.nii holds nan at (0, 0, 0)",
        ),
        (lambda root: nifti(root / "images/s0.nii", np.zeros((2, 2, 2, 2, 2))), "s0.nii has the shape (2, 2, 2, 2, 2)"),
        (lambda root: (root / "images/s0.nii").write_text("x"), "images/s0.nii cannot be read as NIfTI"),
        (lambda root: cut(root / "images/s1.nii.gz"), "images/s1.nii.gz cannot be read"),
        (lambda root: cut(root / "images/s0.nii"), "images/s0.nii cannot be read"),
        (lambda root: (root / "labels/s1_seg.nii.gz").unlink(), "no label for"),
    ],
)
def test_bad_nifti_is_refused(change: Any, text: str, scans: Path) -> None:
    change(scans)
    with pytest.raises(ValueError) as error:
        NiftiDataset(f"{scans}/images", f"{scans}/labels", "_seg", num_classes=2)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_stems_may_have_two_endings() -> None:
    assert stem_of(Path("/a/x.y.nii.gz"), (".nii", ".nii.gz")) == "x.y"
    assert stem_of(Path("/a/x.nii"), (".nii", ".nii.gz")) == "x"
