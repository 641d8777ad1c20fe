"""The files of predictions hold what was predicted, in each format."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from predicting import (
    dataset_of,
    predicted,
    random_volume,
    read,
)

from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.volumes import ArrayVolume


def test_hdf5_has_the_dataset_and_the_compression_that_were_asked_for(tmp_path: Path) -> None:
    image = random_volume(5, 6, 7, channels=2)
    predicted(tmp_path, dataset_of(image), output_dataset="exported/maps", compression="gzip", dtype="float16")
    with h5py.File(tmp_path / "volume-0_predictions.h5") as file:
        assert file["exported/maps"].compression == "gzip"
        assert file["exported/maps"].dtype == np.float16
        assert file["exported/maps"].chunks == (1, 1, 6, 7)
        assert np.allclose(file["exported/maps"], image, atol=1e-2)


def test_probabilities_as_whole_numbers(tmp_path: Path) -> None:
    image = random_volume(5, 6, 7)
    predicted(tmp_path, dataset_of(image), activation="sigmoid", dtype="uint8")
    assert np.array_equal(read(tmp_path / "volume-0_predictions.h5"), np.rint(255 / (1 + np.exp(-image))))


@pytest.mark.parametrize("slab_planes", [None, 5])
def test_tiff(tmp_path: Path, slab_planes: int | None) -> None:
    image = random_volume(20, 6, 7, channels=2)
    data = dataset_of(image, patch=[5, 6, 7])
    predicted(tmp_path, data, format="tiff", slab_planes=slab_planes)
    with tifffile.TiffFile(tmp_path / "volume-0_predictions.tif") as file:
        assert file.series[0].axes == "ZCYX"
        assert np.array_equal(file.asarray(), image.swapaxes(0, 1))
    predicted(tmp_path / "labels", data, format="tiff", save_segmentation=True, compression="gzip")
    assert np.array_equal(tifffile.imread(tmp_path / "labels" / "volume-0_predictions.tif"), image.argmax(0))


def test_tiff_of_an_image(tmp_path: Path) -> None:
    image = random_volume(20, 7, channels=2)
    predicted(tmp_path, dataset_of(image, patch=[6, 4]), format="tiff")
    assert np.array_equal(tifffile.imread(tmp_path / "volume-0_predictions.tif"), image)


def test_png(tmp_path: Path) -> None:
    from PIL import Image

    image = random_volume(20, 17, channels=3)
    predicted(tmp_path, dataset_of(image, patch=[6, 6]), format="png", save_segmentation=True)
    with Image.open(tmp_path / "volume-0_predictions.png") as file:
        assert np.array_equal(np.asarray(file), image.argmax(0))
    plane = random_volume(1, 20, 17)
    predicted(tmp_path / "flat", dataset_of(plane), format="png", activation="sigmoid")
    with Image.open(tmp_path / "flat" / "volume-0_predictions.png") as file:
        assert np.array_equal(np.asarray(file), np.rint(255 / (1 + np.exp(-plane[0, 0]))))
    many = np.arange(400, dtype=np.float32).reshape(20, 20) % 2
    many[::2] = 0
    predicted(tmp_path / "many", dataset_of(many[None]), format="png", instances="foreground", dtype="uint16")
    with Image.open(tmp_path / "many" / "volume-0_predictions.png") as file:
        assert np.asarray(file).max() == 100


@pytest.mark.parametrize("slab_planes", [None, 5])
def test_npy(tmp_path: Path, slab_planes: int | None) -> None:
    image = random_volume(20, 6, 7, channels=2)
    data = dataset_of(image, patch=[5, 6, 7])
    predicted(tmp_path, data, format="npy", slab_planes=slab_planes)
    assert np.array_equal(np.load(tmp_path / "volume-0_predictions.npy"), image)
    predicted(tmp_path / "labels", data, format="npy", save_segmentation=True)
    assert np.array_equal(np.load(tmp_path / "labels" / "volume-0_predictions.npy"), image.argmax(0))


def test_nifti_keeps_the_place_in_space(tmp_path: Path) -> None:
    import nibabel

    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [5, 6, 7]
    image = random_volume(5, 6, 7, channels=2)
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image[0], affine), source)
    data = PatchDataset([ArrayVolume(source, image, name="scan")], [])
    predicted(tmp_path / "maps", data)
    found = nibabel.load(tmp_path / "maps" / "scan_predictions.nii.gz")
    assert np.array_equal(found.affine, affine)
    assert np.array_equal(found.get_fdata(), np.moveaxis(image, 0, -1))
    predicted(tmp_path / "labels", data, save_segmentation=True)
    found = nibabel.load(tmp_path / "labels" / "scan_predictions.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), image.argmax(0))
