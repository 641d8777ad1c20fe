"""Where voxels lie in space: MONAI's transforms are given a NIfTI file's affine, and what they make of it is kept."""

from pathlib import Path
from typing import Any

import monai.transforms as monai
import nibabel
import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from whole_runs import figures

from dtrain.components.datasets.nifti import NiftiDataset
from dtrain.components.datasets.patches import resampled
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume
from dtrain.components.transforms.geometry import CropToFixed, RandomFlip
from dtrain.components.transforms.pipeline import Pipeline

KEYS = ["image", "label"]
SPACING = np.array([2.0, 2.0, 4.0])
MODE = ("bilinear", "nearest")


def written(folder: Path, shape: tuple[int, ...] = (40, 41, 25), flips: tuple[int, ...] = (1, 1, 1)) -> dict[str, str]:
    """An image whose values are the places in millimetres along its axes, summed with weights, and a label of it."""
    grid = np.indices(shape).astype(np.float64)
    affine = np.diag([*(SPACING * flips), 1.0])
    affine[:3, 3] = (5, -7, 11)
    place = [affine[axis, axis] * grid[axis] + affine[axis, 3] for axis in range(len(shape))]
    image = sum(weight * part for weight, part in zip((1.0, 0.1, 0.01), place, strict=False))
    paths = {"images": str(folder / "a.nii.gz"), "labels": str(folder / "l" / "a.nii.gz")}
    (folder / "l").mkdir(parents=True)
    arrays = (image.astype(np.float32), (image > image.mean()).astype(np.uint8))
    for path, array in zip(paths.values(), arrays, strict=True):
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return paths


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value that `written` gives to each voxel, from where an affine says that it lies."""
    grid = np.indices(shape).reshape(len(shape), -1)
    at = affine[:3, :3] @ np.pad(grid, ((0, 3 - len(shape)), (0, 0))) + affine[:3, 3:]
    return (np.array([1.0, 0.1, 0.01][: len(shape)]) @ at[: len(shape)]).reshape(shape)


@pytest.mark.parametrize("in_memory", [True, False])
def test_spacing_counts_in_the_files_millimetres(tmp_path: Path, in_memory: bool) -> None:
    spacing = monai.Spacingd(keys=KEYS, pixdim=(2, 2, 2), mode=MODE)
    data = NiftiDataset(**written(tmp_path), transforms=[spacing], in_memory=in_memory)
    image, label = data[0]
    assert image.shape == (1, 40, 41, 49) and label.shape == (40, 41, 49)
    assert (type(image), image.dtype, type(label), label.dtype) == (
        *(torch.Tensor, torch.float32),
        *(torch.Tensor, torch.int64),
    )
    sample = data.pipeline(data.sample(0, data.places[0][1]), np.random.default_rng(0))
    assert np.allclose(np.diag(sample["affine"]), [2, 2, 2, 1])
    # Linear values stay linear: every voxel holds where it lies.
    assert np.allclose(image[0], places(sample["affine"], (40, 41, 49)), atol=1e-3)


@pytest.mark.parametrize("flips", [(-1, -1, 1), (-1, 1, 1), (1, -1, -1)])
def test_orientation_turns_the_axes_and_every_voxel_stays_where_it_is(tmp_path: Path, flips: tuple[int, ...]) -> None:
    orient = monai.Orientationd(keys=KEYS, axcodes="PRS")
    data = NiftiDataset(**written(tmp_path, (6, 7, 5), flips), transforms=[orient])
    image, label = data[0]
    before = data.volumes[0].read(data.places[0][1])[0]
    # By hand: P runs against y, R against x... of what nibabel calls them, a positive x is towards the right.
    expected = before[:: flips[0], :: flips[1], :: flips[2]].transpose(1, 0, 2)[::-1]
    assert np.array_equal(image[0], expected)
    assert np.array_equal(label, expected > before.mean())
    sample = data.pipeline(data.sample(0, data.places[0][1]), np.random.default_rng(0))
    assert nibabel.aff2axcodes(sample["affine"]) == ("P", "R", "S")
    assert np.allclose(expected, places(sample["affine"], expected.shape), atol=1e-3)


def test_it_is_what_monai_does_of_the_file_itself(tmp_path: Path) -> None:
    files = written(tmp_path, (12, 10, 8), (-1, 1, -1))
    steps = [
        lambda: monai.Orientationd(keys=KEYS, axcodes="RAS"),
        lambda: monai.Spacingd(keys=KEYS, pixdim=(1.5, 3, 2), mode=MODE),
        lambda: monai.ScaleIntensityd(keys=["image"]),
    ]
    data = NiftiDataset(**files, transforms=[step() for step in steps])
    image, label = data[0]
    load = [monai.LoadImaged(keys=KEYS), monai.EnsureChannelFirstd(keys=KEYS), *(step() for step in steps)]
    theirs: Any = monai.Compose(load)({"image": files["images"], "label": files["labels"]})
    assert isinstance(theirs["image"], MetaTensor)
    torch.testing.assert_close(image, theirs["image"].as_tensor().float())
    torch.testing.assert_close(label, theirs["label"].as_tensor()[0].long())
    sample = data.pipeline(data.sample(0, data.places[0][1]), np.random.default_rng(0))
    assert np.allclose(sample["affine"], theirs["image"].affine)


def test_a_patch_lies_where_it_lies(tmp_path: Path) -> None:
    data = NiftiDataset(**written(tmp_path, (12, 10, 8)), slice_builder=SliceBuilder([5, 4, 3], [3, 3, 3]))
    for number, region in data.places:
        sample = data.sample(number, region)
        assert np.allclose(sample["image"][0], places(sample["affine"], (5, 4, 3)), atol=1e-4)
    larger = resampled(sample, (10, 12, 9))
    inside = (slice(1, -1),) * 3  # at the rim values are repeated
    assert np.allclose(larger["image"][0][inside], places(larger["affine"], (10, 12, 9))[inside], atol=1e-3)


def test_an_image_of_two_dimensions_has_its_place_too(tmp_path: Path) -> None:
    spacing = monai.Spacingd(keys=KEYS, pixdim=(1, 1), mode=MODE)
    image, label = NiftiDataset(**written(tmp_path, (10, 12)), transforms=[spacing])[0]
    assert image.shape == (1, 19, 23) and label.shape == (19, 23)


def test_other_transforms_of_monai_keep_giving_what_they_gave(tmp_path: Path) -> None:
    flip = monai.RandFlipd(keys=KEYS, prob=1, spatial_axis=0)
    data = NiftiDataset(**written(tmp_path, (6, 7, 5)), transforms=[flip, monai.Orientationd(keys=KEYS, axcodes="RAS")])
    before = data.volumes[0].read(data.places[0][1])
    assert np.array_equal(data[0][0], before)  # the flip was told, so it is taken back
    without = {"image": before, "label": data.volumes[0].read_label(data.places[0][1])}
    assert np.array_equal(Pipeline([flip])(without, np.random.default_rng(0))["image"], before[:, ::-1])


def test_what_cannot_know_where_voxels_lie_is_refused(tmp_path: Path) -> None:
    rng, sample = np.random.default_rng(0), {"image": np.zeros((1, 4, 4, 4), np.float32)}
    for step in (
        monai.Spacingd(keys=["image"], pixdim=(2, 2, 2)),
        monai.OneOf([monai.Orientationd(keys=["image"], axcodes="RAS")]),
    ):
        with pytest.raises(ValueError, match=r"(Spacingd|OneOf) must know where .* only NIfTI files say so"):
            Pipeline([step])(sample, rng)
    files = written(tmp_path, (6, 7, 5))
    orient = monai.Orientationd(keys=KEYS, axcodes="LPS")
    with pytest.raises(ValueError, match=r"Orientationd must know where .* moved them: put it in front"):
        NiftiDataset(**files, transforms=[RandomFlip(axis_prob=1), orient])[0]
    NiftiDataset(**files, transforms=[orient, RandomFlip(axis_prob=1)])[0]
    one = monai.Orientationd(keys=["image"], axcodes="LPS")
    with pytest.raises(ValueError, match=r"Orientationd moved the image and the label differently; .*\[image, label\]"):
        NiftiDataset(**files, transforms=[one])[0]


def test_a_prediction_is_refused_where_transforms_move_voxels(tmp_path: Path) -> None:
    files = written(tmp_path, (6, 6, 6))
    del files["labels"]
    for step, moves in (
        (monai.Orientationd(keys=["image"], axcodes="LPS"), True),
        (monai.Orientationd(keys=["image"], axcodes="RAS"), False),  # it lies so already
        (CropToFixed(size=[6, 6, 6], centered=True), False),
        (monai.ScaleIntensityd(keys=["image"]), False),
        (monai.Lambdad(keys=["image"], func=lambda array: array.as_tensor() * 2), False),
        (monai.Lambdad(keys=["image"], func=lambda array: array.numpy()[:, 1:]), True),
    ):
        data = NiftiDataset(**files, transforms=[step])
        sample = data.sample(0, data.places[0][1], only_image=True)
        if moves:
            with pytest.raises(ValueError, match=r"the transforms move the voxels .*leave such transforms out"):
                data.prepared(sample)
        else:
            assert data.prepared(sample)["image"].shape == (1, 6, 6, 6)


def test_data_without_a_place_are_given_to_monai_as_before() -> None:
    volume = ArrayVolume(Path("a.h5"), np.ones((1, 4, 4), np.float32))
    assert not hasattr(volume, "affine")
    seen = []
    look = monai.Lambdad(keys=["image"], func=lambda array: seen.append(type(array)) or array)
    Pipeline([look])({"image": np.ones((1, 4, 4), np.float32)}, np.random.default_rng(0))
    assert seen == [np.ndarray]


MINE = """
def voxels(output, target):
    assert output.shape[2:] == target.shape[1:]
    return 0 * output.mean() + target.numel()
"""
CONFIG = """
modules: [mine]
model: {name: Conv3d, in_channels: 1, out_channels: 1, kernel_size: 1}
loaders:
  name: NiftiDataset
  batch_size: 1
  images: a.nii.gz
  train: {labels: l}
  predict: {}
  transforms:
    - {name: Spacingd, keys: [image, label], pixdim: [2, 2, 2], mode: [bilinear, nearest], allow_missing_keys: true}
loss: {name: voxels}
optimizer: {name: SGD, lr: 0}
trainer: {max_steps: 1, checkpoint_dir: run}
predictor: {output_dir: out}
mlflow: {exit_timeout_seconds: 0}
"""


def test_a_training_sees_the_spacing_and_a_prediction_refuses_it(run_cli: Any, tmp_path: Path) -> None:
    written(tmp_path, (6, 7, 5))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "c.yaml").write_text(CONFIG)
    trained = run_cli(["c.yaml"])
    assert trained.rc == 0, trained.text
    assert figures(tmp_path / "run")["train/loss"] == {1: 6 * 7 * 9}  # 4 mm along z became 2
    predicted = run_cli(["predict", "c.yaml"])
    assert predicted.rc == 1 and "the transforms move the voxels in space" in predicted.text, predicted.text
    assert not list(tmp_path.glob("out/*.nii*"))
