"""The files of predictions hold what was predicted, in each format."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
from predicting import (
    dataset_of,
    predicted,
    random_volume,
    read,
)

from dtrain.config.errors import ConfigError


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


def scan(path: Path, image: np.ndarray, kind: Any = None) -> Any:
    """A NIfTI file whose header says more than where it lies; as nibabel reads it."""
    import nibabel

    kind = kind or nibabel.Nifti1Image
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -5], [0, 0, 4, 7], [0, 0, 0, 1]])
    other = affine.copy()
    other[:3, 3] = 11, 12, 13
    made = kind(image, affine)
    made.set_sform(affine, "mni")
    made.set_qform(other, "scanner")
    made.header["descrip"] = b"subject 7, T1"
    made.header.set_xyzt_units("mm", "msec")
    made.header.set_intent("z score", (), "z")
    made.header.set_data_dtype(np.int16)  # with a scale, as the values are fractions
    made.header["cal_max"], made.header["aux_file"] = 900, b"colours.lut"
    nibabel.save(made, path)
    return nibabel.load(path)


@pytest.mark.parametrize("version", [1, 2])
def test_nifti_keeps_the_place_in_space_and_what_is_true_of_the_result(tmp_path: Path, version: int) -> None:
    import nibabel

    from dtrain.components.datasets.nifti import NiftiDataset

    image = random_volume(5, 6, 7, channels=2)
    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    source = scan(tmp_path / "scan.nii.gz", np.moveaxis(image, 0, -1), kind)
    source_values = source.get_fdata()
    assert source.dataobj.slope != 1
    data = NiftiDataset(str(tmp_path / "scan.nii.gz"))
    predicted(tmp_path / "maps", data)
    predicted(tmp_path / "one", data, prediction_channel=1)
    predicted(tmp_path / "labels", data, save_segmentation=True)
    predicted(tmp_path / "small", data, activation="softmax", dtype="uint8")
    for folder, values in {
        "maps": source_values.astype(np.float32),
        "one": source_values.astype(np.float32)[..., 1],
        "labels": source_values.argmax(-1),
        "small": np.rint(255 / (1 + np.exp(source_values[..., ::-1] - source_values))),
    }.items():
        found = nibabel.load(tmp_path / folder / "scan_predictions.nii.gz")
        header = found.header
        assert type(found) is kind
        assert np.allclose(np.asarray(found.dataobj), values, atol=1e-6), folder
        assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)
        assert np.array_equal(found.affine, source.affine)
        assert np.allclose(header.get_qform(), source.header.get_qform(), atol=1e-6)
        assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 1)
        assert header.get_xyzt_units() == ("mm", "msec")
        assert header["descrip"].item() == b"subject 7, T1"
        assert header.get_intent()[0] == ("label" if folder == "labels" else "none")
        assert header["cal_max"] == 0 and header["aux_file"].item() == b""
        assert header.get_zooms()[:3] == source.header.get_zooms()[:3]
    assert nibabel.load(tmp_path / "labels" / "scan_predictions.nii.gz").get_data_dtype() == np.uint8


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (0, 2), (3, 0), (2, 2)])
def test_nifti_keeps_codes_that_say_nothing(tmp_path: Path, sform: int, qform: int) -> None:
    import nibabel

    from dtrain.components.datasets.nifti import NiftiDataset

    image = random_volume(5, 6, 7)[0]
    made = nibabel.Nifti1Image(image, np.diag([-2.0, 3, 4, 1]))
    made.set_qform(made.affine, 1)
    content = bytearray(made.to_bytes())
    struct.pack_into("<hh", content, 252, qform, sform)  # nibabel itself would not write (0, 0)
    (tmp_path / "scan.nii").write_bytes(content)
    source = nibabel.load(tmp_path / "scan.nii")
    predicted(tmp_path / "maps", NiftiDataset(str(tmp_path / "scan.nii")), lambda x: torch.cat([x, x], 1))
    found = nibabel.load(tmp_path / "maps" / "scan_predictions.nii.gz")
    assert found.shape == (5, 6, 7, 2)
    codes = [(int(one.header["sform_code"]), int(one.header["qform_code"])) for one in (source, found)]
    assert codes == [(sform, qform)] * 2
    assert np.array_equal(found.affine, source.affine)


def test_nifti_of_a_plane_has_its_channels_behind_three_axes_of_space(tmp_path: Path) -> None:
    import nibabel

    from dtrain.components.datasets.nifti import NiftiDataset

    plane = random_volume(6, 7)[0]
    nibabel.save(nibabel.Nifti1Image(plane, np.diag([2.0, 3, 4, 1])), tmp_path / "plane.nii")
    predicted(tmp_path / "maps", NiftiDataset(str(tmp_path / "plane.nii")), lambda x: torch.cat([x, 2 * x], 1))
    found = nibabel.load(tmp_path / "maps" / "plane_predictions.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), np.stack([plane, 2 * plane], -1)[:, :, None])
    assert found.header.get_zooms() == (2, 3, 4, 1)


def test_nifti_has_no_float16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predictor.dtype: NIfTI has no float16; possible: float32, and uint8"):
        predicted(tmp_path, dataset_of(random_volume(4, 5, 6)), format="nifti", dtype="float16")
