"""axis: slices of volumes as samples for a 2-D network, and their predictions as volumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from predicting import convolutions, inference, predicted, random_volume, read

from dtrain.components.datasets.hdf5 import LazyHDF5Dataset
from dtrain.components.datasets.nifti import NiftiDataset
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import logits

SHAPE = (5, 12, 14)
IMAGE = random_volume(*SHAPE, channels=2, seed=1)
LABEL = np.random.default_rng(2).integers(0, 3, SHAPE).astype(np.uint8)


def sliced(axis: Any, **more: Any) -> PatchDataset:
    return PatchDataset([ArrayVolume(Path("a.h5"), IMAGE, LABEL, LABEL / np.float32(2))], [], axis=axis, **more)


@pytest.mark.parametrize(("axis", "number"), [("z", 0), ("y", 1), ("x", 2)])
def test_an_item_is_a_slice(axis: str, number: int) -> None:
    data = sliced(axis)
    assert len(data) == SHAPE[number]
    for index in (0, 3):
        image, (label, weight) = data[index]
        assert np.array_equal(image.numpy(), IMAGE.take(index, number + 1))
        assert np.array_equal(label.numpy(), LABEL.take(index, number))
        assert np.array_equal(weight.numpy(), LABEL.take(index, number) / np.float32(2))


def test_patches_of_slices_and_a_change_of_their_scale() -> None:
    data = sliced("y", slice_builder=SliceBuilder([4, 7], [1, 7]))
    assert len(data) == 12 * 2 * 2
    image, _ = data[12 * 2 - 1]  # the last slice of the first start along z, and the second along x
    assert np.array_equal(image.numpy(), IMAGE[:, 0:4, 11, 7:14])
    scaled = sliced("y", slice_builder=SliceBuilder([4, 7]), random_scale=2, random_scale_probability=1.0)
    torch.manual_seed(0)
    shapes = {tuple(scaled[0][0].shape) for _ in range(5)}
    assert shapes == {(2, 4, 7)}


def test_transforms_get_slices() -> None:
    seen: list[Any] = []

    class Note:
        def __call__(self, sample: dict[str, Any], rng: Any = None) -> dict[str, Any]:
            seen.append({key: sample[key].shape for key in ("image", "label") if key in sample})
            return sample

    data = sliced("x")
    data.pipeline = data.still = lambda sample, rng: Note()(sample)  # type: ignore[assignment]
    data[0]
    assert seen == [{"image": (2, 5, 12), "label": (5, 12)}]


def test_nifti_has_its_own_axes_and_keeps_its_place(tmp_path: Path) -> None:
    affine = np.array([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(IMAGE[0], affine), tmp_path / "a.nii.gz")
    data = NiftiDataset(str(tmp_path), axis="z")
    assert len(data) == 14  # (x, y, z) in the file
    assert np.array_equal(data[3].numpy(), IMAGE[:1, :, :, 3])
    found = data.sample(0, (slice(1, 5), slice(2, 12), slice(3, 4)))["affine"]
    # Row 0, column 0 of that slice is the voxel (1, 2, 3).
    assert np.allclose(found @ [0, 0, 0, 1], affine @ [1, 2, 3, 1])
    assert np.allclose(found @ [1, 1, 0, 1], affine @ [2, 3, 3, 1])


@pytest.mark.parametrize(
    ("axis", "patch", "overlaps"), [("z", (4, 5), False), ("y", (3, 6), True), ("x", (5, 2), True)]
)
def test_predictions_are_volumes(tmp_path: Path, axis: str, patch: tuple[int, int], overlaps: bool) -> None:
    number = "zyx".index(axis)
    stride = [max(1, side // 2) for side in patch] if overlaps else list(patch)
    data = PatchDataset(
        [ArrayVolume(Path("a.h5"), IMAGE[:1])],
        [],
        SliceBuilder(list(patch), stride, [2, 2]),
        axis=axis,  # type: ignore[arg-type]
    )
    predicted(tmp_path, data, convolutions(dims=2))
    # The model sees 2 voxels around each, which the halo gives, reflected: so patches leave no trace.
    model = convolutions(dims=2)
    model[0].padding = model[2].padding = (0, 0)
    sides = [[0, 0], [2, 2], [2, 2], [2, 2]]
    sides[number + 1] = [0, 0]
    padded = torch.from_numpy(np.pad(IMAGE[:1], sides, mode="reflect"))
    with torch.inference_mode():
        expected = torch.stack([model(part[None])[0] for part in padded.unbind(number + 1)], number + 1).numpy()
    assert np.abs(read(tmp_path / "a_predictions.h5") - expected).max() < 1e-5


def test_whole_slices_are_predicted_and_tested(tmp_path: Path) -> None:
    predicted(tmp_path, sliced("y"), lambda images: images.cumsum(2))
    assert np.allclose(read(tmp_path / "a_predictions.h5"), IMAGE.cumsum(1), atol=1e-5)  # along z, rows of a slice
    loader = SimpleNamespace(dataset=SimpleNamespace(dataset=sliced("y")), batch_sampler=SimpleNamespace(batch_size=2))
    ((number, output, (label, weight)),) = logits(inference(Predictor(), lambda images: 2 * images), loader)
    assert number == 0
    assert np.allclose(output[0].numpy(), 2 * IMAGE)
    assert np.array_equal(label[0].numpy(), LABEL)
    assert np.array_equal(weight[0].numpy(), LABEL / np.float32(2))


def test_mistakes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"], file["flat"] = IMAGE[0], IMAGE[0, 0]
    path = str(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"patch_shape is \[1, 4, 4\]; with axis, a patch has the two numbers"):
        LazyHDF5Dataset(path, label_internal_path=None, axis="z", slice_builder=SliceBuilder([1, 4, 4]))
    with pytest.raises(ValueError, match=r"axis is z, and .* has the extent \(12, 14\); expected three axes"):
        LazyHDF5Dataset(path, "flat", None, axis="z")
    with pytest.raises(ValueError, match="axis is w; possible: z, y, x"):
        LazyHDF5Dataset(path, label_internal_path=None, axis="w")  # type: ignore[arg-type]
