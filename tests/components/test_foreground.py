"""Patches that hold foreground, and those of volumes that are smaller than a patch."""

import os
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from predicting import predicted, read
from torch import Tensor

from dtrain.components.datasets import foreground
from dtrain.components.datasets.foreground import ForegroundSlices, find
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset, StandardHDF5Dataset
from dtrain.components.datasets.nifti import NiftiDataset
from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import FilterSliceBuilder, SliceBuilder
from dtrain.components.datasets.volumes import FILES, ArrayVolume, padded
from dtrain.data import rng as generators

SHAPE = (20, 24, 28)
PATCH = [5, 7, 9]


def labelled(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Three sparse classes of very different size and some void, so far inside that a patch around them fits."""
    label = np.zeros(shape, dtype=np.uint8)
    label[4:8, 6:12, 8:16] = 1  # 192 voxels
    label[10, 12:15, 10:12] = 2  # 6
    label[12, 8, 20] = 3
    label[14:17, 14:18, 12:20] = 255
    return label


def volume(label: np.ndarray, name: str = "v") -> ArrayVolume:
    return ArrayVolume(Path(f"/{name}.h5"), np.random.default_rng(0).random((1, *label.shape), np.float32), label)


def labels_drawn(dataset: PatchDataset, epochs: int, seed: int = 3) -> np.ndarray:
    """The labels of all patches of some epochs, each drawn as the loaders have it."""
    labels = []
    with generators.untouched():
        for epoch in range(epochs):
            for index in range(len(dataset)):
                generators.seed_sample(seed, epoch, index)
                labels.append(dataset[index][1].numpy())
    return np.stack(labels)


def has_foreground(label: np.ndarray) -> np.ndarray:
    return ((label != 0) & (label != 255)).reshape(len(label), -1).any(axis=1)


@pytest.mark.slow
def test_the_share_of_patches_with_foreground_is_the_one_asked_for() -> None:
    label = labelled()
    dataset = PatchDataset([volume(label)], [], ForegroundSlices(PATCH, 1000, 0.3, ignore_index=255))
    assert len(dataset) == 1000 and dataset.random
    windows = np.lib.stride_tricks.sliding_window_view((label != 0) & (label != 255), PATCH)
    by_chance = windows.any(axis=(3, 4, 5)).mean()
    assert 0.1 < by_chance < 0.4
    expected = 0.3 + 0.7 * by_chance
    found = has_foreground(labels_drawn(dataset, 4)).mean()
    assert abs(found - expected) < 3 * np.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("balanced", [True, False])
def test_each_class_is_as_likely_or_each_voxel(balanced: bool) -> None:
    label = labelled()
    builder = ForegroundSlices(PATCH, 1500, 1.0, class_balanced=balanced, ignore_index=255)
    drawn = labels_drawn(PatchDataset([volume(label)], [], builder), 2)
    centres = drawn[:, 2, 3, 4]  # of the voxel drawn: all of them lie inside far enough
    counts = np.array([(centres == name).sum() for name in range(256)])
    assert counts[[1, 2, 3]].sum() == 3000, "neither background nor void"
    shares = np.full(3, 1 / 3) if balanced else np.array([192, 6, 1]) / 199
    assert (np.abs(counts[1:4] / 3000 - shares) < 3.5 * np.sqrt(shares * (1 - shares) / 3000)).all()


def test_places_depend_on_seed_epoch_and_index_alone() -> None:
    dataset = PatchDataset([volume(labelled())], [], ForegroundSlices(PATCH, 40, ignore_index=255))
    first, other_epoch, other_seed = (
        labels_drawn(dataset, 2),
        labels_drawn(dataset, 2)[40:],
        labels_drawn(dataset, 1, 4),
    )
    assert np.array_equal(first, labels_drawn(dataset, 2))
    assert not np.array_equal(first[:40], other_epoch) and not np.array_equal(first[:40], other_seed)
    generators.seed_sample(3, 1, 17)
    assert np.array_equal(dataset[17][1], first[40 + 17])


def test_a_patch_at_the_border_is_moved_inside() -> None:
    label = np.zeros((6, 8), dtype=np.uint8)
    label[0, 7] = 1
    dataset = PatchDataset([volume(label)], [], ForegroundSlices([4, 4], 20, 1.0))
    assert all(np.array_equal(item, label[:4, 4:]) for item in labels_drawn(dataset, 1))


def test_all_voxels_are_found_across_blocks_and_large_classes_evenly_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "BLOCK", 500)
    label = labelled()
    found = find(volume(label), 255)
    assert found.classes.tolist() == [1, 2, 3] and found.counts.tolist() == [192, 6, 1]
    assert found.ends.tolist() == [192, 198, 199]
    for name, voxels in zip((1, 2, 3), np.split(found.voxels, found.ends[:-1]), strict=True):
        assert np.array_equal(voxels, np.flatnonzero(label == name))
    monkeypatch.setattr(foreground, "MOST", 50)
    some = find(volume(np.ones((10, 10, 100), np.int32)), None)
    assert some.counts.tolist() == [10000] and len(set(some.voxels.tolist())) == 50
    assert 3500 < some.voxels.mean() < 6500
    assert np.array_equal(some.voxels, find(volume(np.ones((10, 10, 100), np.int32)), None).voxels)


def test_channels_are_classes_and_fractions_are_one() -> None:
    channels = np.zeros((2, 4, 4), np.uint8)
    channels[0, 1, 1], channels[1, 2:, 2:] = 7, 1
    found = find(ArrayVolume(Path("/v"), np.zeros((1, 4, 4)), channels), None)
    assert found.classes.tolist() == [0, 1] and found.counts.tolist() == [1, 4]
    assert find(volume(np.array([[0, 0.5], [0.25, 1]], np.float32)), None).classes.tolist() == [1]


def test_volumes_without_foreground_have_patches_anywhere_and_are_named() -> None:
    void = np.where(labelled() == 255, 255, 0)
    volumes = [volume(labelled(), "full"), volume(np.zeros(SHAPE, np.uint8), "empty"), volume(void, "void")]
    places = ForegroundSlices(PATCH, 50, 1.0, ignore_index=255).places_of(volumes)
    assert places.notes == ["no foreground in empty.h5, void.h5: patches of these lie anywhere"]
    starts = {str(places.parts[1].draw(np.random.default_rng(seed))) for seed in range(200)}  # type: ignore[attr-defined]
    assert len(starts) > 150
    assert ForegroundSlices(PATCH, foreground_share=0.0).places_of(volumes).notes == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"foreground_share": 1.5}, "foreground_share is 1.5; possible: 0 to 1"),
        ({"patches_per_volume": 0}, "patches_per_volume is 0; expected 1 or more"),
        ({"pad": "zeros"}, "pad is 'zeros'; possible: reflect, edge, constant, or a number"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ForegroundSlices(PATCH, **arguments)


def test_labels_are_needed() -> None:
    with pytest.raises(ValueError, match=r"ForegroundSlices needs labels, and /v.h5 is read without; use SliceBuilder"):
        ForegroundSlices(PATCH).places(ArrayVolume(Path("/v.h5"), np.zeros((1, *SHAPE))))


# What is kept beside a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as out:
        out["raw"], out["label"] = np.zeros(SHAPE, np.float32), labelled()
    return tmp_path / "a.h5"


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.foreground.npz"))


def read_labels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The dimensions of each volume that is searched from now on."""
    seen: list[int] = []
    real = foreground.find
    monkeypatch.setattr(foreground, "find", lambda item, void: (seen.append(len(item.shape)), real(item, void))[1])
    return seen


@pytest.mark.parametrize("kind", [LazyHDF5Dataset, StandardHDF5Dataset])
def test_labels_are_searched_once_per_file(kind: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = read_labels(monkeypatch)

    def drawn(**more: Any) -> np.ndarray:
        return labels_drawn(
            kind(str(file), slice_builder=ForegroundSlices(PATCH, 30, 1.0, **more), ignore_index=255), 1
        )

    first = drawn()
    assert set(np.unique(first[:, 2, 3, 4])) == {1, 2, 3}, "the dataset's ignore_index does not count"
    assert np.array_equal(drawn(), first) and len(seen) == 1
    assert len(kept(file.parent)) == 1 and sorted(file.parent.iterdir()) == [*kept(file.parent), file]
    drawn(ignore_index=3)  # another question, another file
    assert len(seen) == 2 and len(kept(file.parent)) == 2
    kept(file.parent)[0].write_bytes(kept(file.parent)[0].read_bytes()[:100])
    kept(file.parent)[1].write_bytes(b"")
    assert np.array_equal(drawn(), first) and len(seen) == 3
    FILES.close()
    with h5py.File(file, "a") as out:
        out["label"][...] = np.roll(labelled(), 1, axis=0)
    assert np.array_equal(drawn()[:, 2, 3, 4], first[:, 2, 3, 4]) and len(seen) == 4
    drawn(cache=False)
    assert len(seen) == 5 and len(kept(file.parent)) == 2


def test_a_folder_that_cannot_be_written_is_told_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(file.with_name("b.h5"), "w") as out:
        out["raw"], out["label"] = np.zeros(SHAPE, np.float32), labelled()
    real = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if ".foreground.npz" in path.name:
            raise OSError(30, "Read-only file system")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    dataset = LazyHDF5Dataset(str(file.parent), slice_builder=ForegroundSlices(PATCH, 5, 1.0, ignore_index=255))
    text = f"where the foreground lies is kept in memory alone: {file.parent} cannot be written (Read-only file system)"
    assert dataset.places.notes == [text]
    assert has_foreground(labels_drawn(dataset, 1)).all()
    assert sorted(item.name for item in file.parent.iterdir()) == ["a.h5", "b.h5"], "nothing half-written"


def test_processes_that_begin_together_search_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = foreground.find

    def slowly(*arguments: Any) -> Any:
        with file.with_name("searches").open("a") as out:
            out.write("x")
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(foreground, "find", slowly)
    both = []
    for _ in range(2):
        if not (child := os.fork()):
            try:
                LazyHDF5Dataset(str(file), slice_builder=ForegroundSlices(PATCH))
            finally:
                os._exit(0)
        both.append(child)
    for child in both:
        os.waitpid(child, 0)
    assert file.with_name("searches").read_text() == "x" and len(kept(file.parent)) == 1


def test_nifti_labels_keep_their_own(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    for folder, values in (("images", np.zeros(SHAPE, np.float32)), ("labels", labelled())):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / folder / "a.nii.gz")
    for in_memory in (True, False):
        dataset = NiftiDataset(
            str(tmp_path / "images"), str(tmp_path / "labels"), in_memory=in_memory, ignore_index=255,
            slice_builder=ForegroundSlices(PATCH, 30, 1.0),
        )  # fmt: skip
        assert has_foreground(labels_drawn(dataset, 1)).all()
    assert not kept(tmp_path / "images") and len(kept(tmp_path / "labels")) == 1


# Volumes smaller than a patch

SMALL = np.arange(24, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize(
    ("pad", "keys"),
    [
        ("reflect", {"mode": "reflect"}),
        ("edge", {"mode": "edge"}),
        ("constant", {"mode": "constant"}),
        (-100, {"mode": "constant", "constant_values": -100}),
        (None, {"mode": "reflect"}),
    ],
)
def test_what_is_missing_is_filled_as_numpy_does(pad: Any, keys: dict[str, Any]) -> None:
    source = ArrayVolume(Path("/v"), SMALL[None])
    region = (slice(-1, 9), slice(2, 8))
    expected = np.pad(SMALL.astype(int), [(1, 5), (0, 2)], **keys)[:, 2:]
    assert np.array_equal(padded(source.read, region, SMALL.shape, pad)[0], expected)
    labels = ArrayVolume(Path("/v"), SMALL[None], SMALL)
    assert np.array_equal(padded(labels.read_label, region, SMALL.shape, pad), expected), "no number overflows"


@pytest.mark.parametrize(
    ("pad", "ignore_index", "image", "label", "weight"),
    [
        ("reflect", None, "reflect", "reflect", "reflect"),
        ("edge", None, "edge", "edge", "edge"),
        ("reflect", 255, "reflect", 255, 0),
        (-7.5, None, -7.5, 0, 0),
        ("constant", -100, 0, -100, 0),
    ],
)
@pytest.mark.parametrize("kind", [SliceBuilder, FilterSliceBuilder, ForegroundSlices])
def test_a_small_volume_is_padded_behind_its_end(
    kind: Any, pad: Any, ignore_index: int | None, image: Any, label: Any, weight: Any
) -> None:
    def filled(values: np.ndarray, how: Any) -> np.ndarray:
        keys = {"mode": how} if isinstance(how, str) else {"constant_values": how}
        return np.pad(values.astype(float), [(0, 4), (0, 0)], **keys)

    classes, weights = SMALL % 3, np.full(SMALL.shape, 2.0)
    source = ArrayVolume(Path("/v"), SMALL[None], classes, weights)
    more = {"threshold": 0.1, "ignore_index": ignore_index} if kind is FilterSliceBuilder else {}
    more |= {"ignore_index": ignore_index} if kind is ForegroundSlices else {}
    builder = kind([8, 6], pad=pad, **more)
    if kind is SliceBuilder and ignore_index is not None:
        source.checks = type(source.checks)(ignore_index=ignore_index)  # the dataset's
    dataset = PatchDataset([source], [], builder)
    assert len(dataset) == 1
    found, (target, weighed) = dataset[0]
    assert np.array_equal(found[0], filled(SMALL, image))
    assert np.array_equal(target, filled(classes, label))
    assert np.array_equal(weighed, filled(weights, weight))


def test_padded_labels_are_not_counted_by_a_filter() -> None:
    label = np.ones((4, 6), np.uint8)
    builder = FilterSliceBuilder([8, 6], threshold=0.5, slack_acceptance=0, pad="reflect")
    assert len(builder.places(volume(label))) == 0
    builder = FilterSliceBuilder([8, 6], threshold=0.49, slack_acceptance=0, pad="reflect")
    assert len(builder.places(volume(label))) == 1


@pytest.mark.parametrize("kind", [SliceBuilder, FilterSliceBuilder, ForegroundSlices])
def test_without_the_key_a_small_volume_is_refused_and_the_key_named(kind: Any) -> None:
    text = (
        r"patch_shape \(8, 6\) is larger than /v.h5, whose extent is \(4, 6\); "
        r"pad \(reflect, edge or a number\) in the slice_builder fills what is missing"
    )
    with pytest.raises(ValueError, match=text):
        PatchDataset([volume(SMALL)], [], kind([8, 6]))


def test_a_random_scale_takes_nothing_from_what_is_padded() -> None:
    dataset = PatchDataset(
        [volume(np.ones((4, 20), np.uint8))], [], SliceBuilder([8, 8], pad="constant"),
        random_scale=[2, 2], random_scale_probability=1.0,
    )  # fmt: skip
    counts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, label = dataset[seed % len(dataset)]
        assert image.shape == (1, 8, 8) and label.shape == (8, 8)
        counts.add(int(label[:, 0].sum()))
    assert counts == {4, 5}, "the volume is half of the patch, or 4 of 7 or of 6 voxels"


def test_predictions_of_padded_volumes_are_cut_back(tmp_path: Path) -> None:
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return images

    label = np.zeros((4, 6, 5), np.uint8)
    dataset = PatchDataset(
        [volume(label), volume(np.zeros((10, 7, 9), np.uint8), "w")], [], SliceBuilder([8, 6, 8], pad=3)
    )
    predicted(tmp_path, dataset, model)
    for name, item in zip("vw", dataset.volumes, strict=True):
        assert np.array_equal(
            read(tmp_path / f"{name}_predictions.h5"), item.read(tuple(map(slice, [0] * 3, item.shape)))
        )
    expected = np.pad(dataset.volumes[0].image, [(0, 0), (0, 4), (0, 0), (0, 3)], constant_values=3)  # type: ignore[attr-defined]
    assert np.array_equal(seen[0][0], expected)


def test_other_formats_and_slices_of_volumes(tmp_path: Path) -> None:
    tifffile, zarr = pytest.importorskip("tifffile"), pytest.importorskip("zarr")
    from dtrain.components.datasets.tiff_stack import TiffStackDataset
    from dtrain.components.datasets.zarr_store import ZarrDataset

    for folder, values in (("images", np.zeros(SHAPE, np.float32)), ("labels", labelled())):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", values, metadata={"axes": "ZYX"})
    builder = ForegroundSlices(PATCH, 20, 1.0)
    stack = TiffStackDataset(
        str(tmp_path / "images"), str(tmp_path / "labels"), slice_builder=builder, ignore_index=255
    )
    assert has_foreground(labels_drawn(stack, 1)).all()
    assert [path.parent.name for path in tmp_path.rglob(".*.npz")] == ["labels"], "beside what it is found in"
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    for name, values in (("raw", np.zeros(SHAPE, np.float32)), ("label", labelled())):
        group.create_array(name, shape=SHAPE, dtype=values.dtype)[...] = values
    store = ZarrDataset(str(tmp_path / "a.zarr"), "raw", "label", slice_builder=builder, ignore_index=255)
    assert has_foreground(labels_drawn(store, 1)).all()
    assert len(list(tmp_path.rglob(".*.npz"))) == 1, "a store's versions cannot be told"
    slices = TiffStackDataset(
        str(tmp_path / "images"), str(tmp_path / "labels"), slice_builder=ForegroundSlices([7, 9], 20, 1.0),
        ignore_index=255, axis="z",
    )  # fmt: skip
    drawn = labels_drawn(slices, 1)
    assert drawn.shape == (20, 7, 9) and has_foreground(drawn).all()
