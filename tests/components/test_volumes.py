"""HDF5 volumes: which patches there are, what is read of them, what is refused, and that the files stay as they are."""

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import RunCli
from torch.utils.data import DataLoader

from dtrain.components.datasets.files import found_files, unique_names
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset, StandardHDF5Dataset
from dtrain.components.datasets.patches import PatchDataset, resampled
from dtrain.components.datasets.slices import FilterSliceBuilder, Grid, SliceBuilder, Starts
from dtrain.components.datasets.statistics import Statistics, blocks
from dtrain.components.datasets.volumes import (
    FILES,
    KEPT_BYTES,
    OPEN_FILES,
    ArrayVolume,
    HDF5Volume,
    open_hdf5,
    read_region,
)
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.dataloader import get_train_loaders

SHAPE = (12, 14, 16)
BOTH = pytest.mark.parametrize("kind", [StandardHDF5Dataset, LazyHDF5Dataset])


def written(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values)
    return path


def numbers(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def classes(shape: tuple[int, ...] = SHAPE, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, shape, dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "a.h5", raw=numbers(), label=classes())


# Where the patches lie


@pytest.mark.parametrize(
    ("extent", "starts"), [(10, [0, 3, 6]), (11, [0, 3, 6, 7]), (4, [0]), (5, [0, 1]), (7, [0, 3]), (8, [0, 3, 4])]
)
def test_starts_are_a_grid_and_one_flush_with_the_end(extent: int, starts: list[int]) -> None:
    assert list(Starts(extent, 4, 3)) == starts


def test_a_grid_is_computed_and_covers_everything() -> None:
    grid = Grid((5, 9, 7), (2, 4, 3), (2, 3, 2))
    regions = list(grid)
    assert len(set(map(str, regions))) == len(grid) == len(regions) == 3 * 3 * 3
    assert regions[1][:2] == regions[0][:2], "the last axis is the fastest"
    assert grid[-1] == regions[-1] == (slice(3, 5), slice(5, 9), slice(4, 7))
    assert grid[3:5] == regions[3:5]
    seen = np.zeros((5, 9, 7), dtype=bool)
    for region in regions:
        seen[region] = True
    assert seen.all()
    with pytest.raises(IndexError):
        grid[len(grid)]


def test_a_grid_of_very_many_patches_takes_no_memory() -> None:
    grid = Grid((10**5, 10**5, 10**5), (8, 8, 8), (1, 1, 1))
    assert len(grid) == (10**5 - 7) ** 3
    assert grid[-1] == (slice(10**5 - 8, 10**5),) * 3
    assert len(pickle.dumps(grid)) < 1000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"patch_shape": [8, 8], "stride_shape": [8]}, "stride_shape is [8]; expected 2 whole numbers"),
        ({"patch_shape": [8, 0]}, "patch_shape is [8, 0]; expected 2 whole numbers, one per axis, 1 or more"),
        ({"patch_shape": []}, "patch_shape is []"),
        ({"patch_shape": [8, 8], "halo_shape": [-1, 2]}, "halo_shape is [-1, 2]"),
        ({"patch_shape": [80, 63, 64], "skip_shape_check": False}, "less than 64 voxels"),
    ],
)
def test_what_cannot_be_a_patch_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        SliceBuilder(**arguments)
    assert text in str(error.value)


def volume(label: np.ndarray) -> ArrayVolume:
    return ArrayVolume(Path("/v.h5"), np.zeros((1, *label.shape)), label)


def test_the_filter_keeps_what_is_labelled_enough() -> None:
    label = np.random.default_rng(0).integers(0, 4, (9, 10, 12)) * (np.arange(12) > 4)
    shape, stride = [3, 4, 5], [2, 3, 2]
    builder = FilterSliceBuilder(shape, stride, threshold=0.4, slack_acceptance=0, ignore_index=3)
    counts = (label != 0) & (label != 3)
    expected = [at for at in SliceBuilder(shape, stride).places(volume(label)) if counts[at].mean() > 0.4]
    assert 0 < len(expected) < len(SliceBuilder(shape, stride).places(volume(label)))
    assert list(builder.places(volume(label))) == expected


def test_the_filter_accepts_others_by_its_seed_alone() -> None:
    label = np.zeros((40, 40), dtype=int)
    first, again, other = (
        [
            str(at)
            for at in FilterSliceBuilder([4, 4], threshold=0.5, slack_acceptance=0.3, seed=seed).places(volume(label))
        ]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert 10 < len(first) < 50


def test_a_filter_that_leaves_nothing_says_how_much_is_labelled() -> None:
    label = np.zeros((8, 8), dtype=int)
    label[0, :2] = 1
    builder = FilterSliceBuilder([4, 4], threshold=0.5, slack_acceptance=0)
    with pytest.raises(ValueError, match=r"keeps none of 8 patches: at most 12\.50% of a patch is labelled"):
        builder.places_of([volume(np.zeros((8, 8), dtype=int)), volume(label)])
    label[:4, :4] = 1
    assert builder.places_of([volume(np.zeros((8, 8), dtype=int)), volume(label)])[0] == (1, (slice(0, 4),) * 2)


# What is read


def test_what_lies_outside_is_reflected_as_numpy_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(int(extent) for extent in rng.integers(1, 7, 2))
        values = rng.random((2, *shape))
        low, high = rng.integers(0, 12, (2, 2)).tolist()
        region = tuple(slice(-a, extent + b) for a, extent, b in zip(low, shape, high, strict=True))
        expected = np.pad(values, [(0, 0), *zip(low, high, strict=True)], mode="reflect")
        np.testing.assert_array_equal(read_region(values.__getitem__, shape, region, 1), expected)


def test_only_the_part_inside_is_read() -> None:
    asked = []
    values = numbers((20,))

    def source(region: tuple[slice, ...]) -> np.ndarray:
        asked.append(region)
        return values[region]

    read_region(source, (20,), (slice(-2, 5),), 0)
    read_region(source, (20,), (slice(17, 22),), 0)
    assert asked == [(slice(0, 5),), (slice(17, 20),)]


@BOTH
def test_items_are_the_patches_in_order(kind: type[PatchDataset], file: Path) -> None:
    other = written(file.with_name("b.h5"), raw=numbers((6, 8, 8)), label=classes((6, 8, 8)))
    dataset = kind([str(other), str(file)], slice_builder=SliceBuilder([6, 7, 8], [3, 7, 8]))
    assert len(dataset) == 2 + 3 * 2 * 2
    assert [item.name for item in dataset.volumes] == ["b", "a"]
    assert dataset.files == (other, file)
    assert dataset.patch_shape == (6, 7, 8) and dataset.stride_shape == (3, 7, 8) and dataset.halo_shape == (0, 0, 0)
    assert not dataset.random
    seen = set()
    for index in range(len(dataset)):
        number, region = dataset.places[index]
        image, label = dataset[index]
        values = [(numbers((6, 8, 8)), classes((6, 8, 8))), (numbers(), classes())][number]
        assert image.dtype == torch.float32 and label.dtype == torch.int64
        np.testing.assert_array_equal(image[0], values[0][region])
        np.testing.assert_array_equal(label, values[1][region])
        seen.add((number, str(region)))
    assert len(seen) == len(dataset)


@BOTH
def test_without_a_slice_builder_a_file_is_an_item(kind: type[PatchDataset], file: Path) -> None:
    dataset = kind(str(file), label_internal_path=None)
    assert dataset.patch_shape is None
    image = dataset[0]
    np.testing.assert_array_equal(image, numbers()[None])


@BOTH
def test_channels_are_stacked(kind: type[PatchDataset], tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.h5",
        one=numbers(),
        two=numbers((2, *SHAPE), 5),
        l1=classes(),
        l2=classes(seed=7),
        w=numbers(seed=9),
    )
    dataset = kind(str(path), ["two", "one"], ["l1", "l2"], "w", SliceBuilder([4, 5, 6]))
    region = dataset.places[3][1]
    image, (label, weight) = dataset[3]
    assert dataset.volumes[0].channels == 3
    np.testing.assert_array_equal(
        image, np.concatenate([numbers((2, *SHAPE), 5), numbers()[None]])[(slice(None), *region)]
    )
    np.testing.assert_array_equal(label, np.stack([classes(), classes(seed=7)])[(slice(None), *region)])
    np.testing.assert_array_equal(weight, numbers(seed=9)[region])
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "<f2", ">f4", "f8", "?"])
@BOTH
def test_any_numbers_become_float32_and_labels_int64(kind: type[PatchDataset], dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, (1, 6, 6)).astype(dtype)
    path = written(tmp_path / "a.h5", raw=values, label=values)
    image, label = kind(str(path))[0]
    np.testing.assert_array_equal(image[0], values.astype(np.float32))
    assert image.dtype == torch.float32
    assert label.dtype == (torch.float32 if "f" in dtype else torch.int64)
    assert kind(str(path), num_classes=2)[0][1].dtype == torch.int64


def test_memory_holds_what_the_file_holds(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", raw=(numbers() * 255).astype(np.uint8), label=classes())
    volume = StandardHDF5Dataset(str(path)).volumes[0]
    assert isinstance(volume, ArrayVolume)
    assert volume.image.dtype == np.uint8


@BOTH
def test_what_is_returned_is_no_part_of_the_volume(kind: type[PatchDataset], file: Path) -> None:
    dataset = kind(str(file))
    for part in dataset[0]:
        part.zero_()
    image, label = dataset[0]
    assert image.any() and label.any()


def test_patches_of_two_dimensions(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", raw=numbers((20, 30)), label=classes((20, 30)))
    image, label = LazyHDF5Dataset(str(path), slice_builder=SliceBuilder([8, 10]))[4]
    assert image.shape == (1, 8, 10) and label.shape == (8, 10)


# Lazily, from several processes


def test_the_lazy_dataset_reads_regions_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = h5py.Dataset.__getitem__

    def spied(self: h5py.Dataset, *args: Any) -> Any:
        result = real(self, *args)
        sizes.append(np.size(result))
        return result

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spied)
    dataset = LazyHDF5Dataset(str(file), slice_builder=SliceBuilder([4, 4, 4]))
    for index in range(len(dataset)):
        dataset[index]
    assert len(sizes) == 2 * len(dataset)
    assert max(sizes) == 64


def test_an_open_file_is_neither_pickled_nor_used_after_a_fork(file: Path) -> None:
    dataset = LazyHDF5Dataset(str(file), slice_builder=SliceBuilder([4, 4, 4]))
    expected = dataset[0][0]
    assert len(pickle.dumps(dataset)) < 10_000
    torch.testing.assert_close(pickle.loads(pickle.dumps(dataset))[0][0], expected)
    parents = FILES.files[file][0]
    reads, writes = os.pipe()
    if not (child := os.fork()):
        try:
            same = torch.equal(dataset[0][0], expected)
            os.write(
                writes,
                b"yes" if same and FILES.files[file][0] is not parents and FILES.process == os.getpid() else b"no",
            )
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reads, 10) == b"yes"
    os.close(reads)
    os.close(writes)
    torch.testing.assert_close(dataset[0][0], expected)


def test_workers_read_the_same(file: Path) -> None:
    dataset = LazyHDF5Dataset(str(file), slice_builder=SliceBuilder([6, 7, 8]))
    expected = [dataset[index] for index in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=1, num_workers=2)
    for (image, label), (wanted, also) in zip(loader, expected, strict=True):
        assert torch.equal(image[0], wanted) and torch.equal(label[0], also)


def test_no_more_files_stay_open_than_may(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{number:03}.h5", raw=numbers((2, 3, 4), number)) for number in range(OPEN_FILES + 5)]
    dataset = LazyHDF5Dataset(str(tmp_path), label_internal_path=None)
    for _ in range(2):
        for number in range(len(files)):
            np.testing.assert_array_equal(dataset[number][0], numbers((2, 3, 4), number))
    assert len(FILES.files) == OPEN_FILES
    FILES.close()


def test_chunks_are_kept_of_one_file_at_a_time(tmp_path: Path) -> None:
    FILES.close()
    volumes = [HDF5Volume(written(tmp_path / f"{number}.h5", raw=numbers((2, 3, 4), number))) for number in range(3)]
    region = (slice(0, 2), slice(1, 3), slice(0, 4))
    volumes[0].read(region)  # not kept yet
    for volume in volumes[:2]:
        volume.reads_in_order = True

    def kept() -> dict[str, int]:
        for number, volume in enumerate(volumes):
            np.testing.assert_array_equal(volume.read(region)[0], numbers((2, 3, 4), number)[:, 1:])
        names = {path.stem: datasets["raw"] for path, (_, datasets) in FILES.files.items()}
        return {name: dataset.file.id.get_access_plist().get_cache()[2] for name, dataset in names.items()}

    for _ in range(2):
        found = kept()
        assert found.keys() == {"1", "2"} and found["1"] == KEPT_BYTES and found["2"] < KEPT_BYTES
    FILES.close()


@BOTH
def test_inputs_are_not_touched(kind: type[PatchDataset], file: Path) -> None:
    before = file.read_bytes(), file.stat().st_mtime_ns
    file.chmod(0o444)
    file.parent.chmod(0o555)
    try:
        dataset = kind(
            str(file), slice_builder=SliceBuilder([4, 4, 4], halo_shape=[2, 2, 2]), global_normalization=True
        )
        for index in range(len(dataset)):
            dataset[index]
        dataset.volumes[0].read((slice(-3, 8),) * 3)
        FILES.close()
        assert list(file.parent.iterdir()) == [file]
    finally:
        file.parent.chmod(0o755)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


# Random numbers, statistics, transforms


class Shift:
    """Adds a drawn number."""

    random = True

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return sample | {"image": sample["image"] + np.float32(rng.random())}


class ByStats:
    """What a normalizing transform does with the file's figures."""

    random = False

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return sample | {"image": sample["image"] - np.float32(sample["stats"]["mean"])}


def test_items_follow_torchs_generator(file: Path) -> None:
    dataset = StandardHDF5Dataset(str(file), transforms=[Shift()], slice_builder=SliceBuilder([4, 4, 4]))
    assert dataset.random
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(dataset[0][0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@BOTH
def test_a_files_statistics_reach_the_transforms(kind: type[PatchDataset], tmp_path: Path) -> None:
    written(tmp_path / "a.h5", raw=numbers())
    written(tmp_path / "b.h5", raw=numbers() + 5)
    dataset = kind(
        str(tmp_path), label_internal_path=None, transforms=[Shift(), ByStats()], global_normalization=True,
        slice_builder=SliceBuilder([4, 4, 4]),
    )  # fmt: skip
    for index in (0, -1):
        number, region = dataset.places[index]
        values = numbers() + 5 * number
        sample = dataset.prepared(dataset.sample(number, region, only_image=True))
        np.testing.assert_allclose(sample["image"][0], values[region] - values.mean(), atol=1e-5)


def test_statistics_are_those_of_the_whole() -> None:
    values = np.stack([numbers((130, 140, 150)), numbers((130, 140, 150), 3) * 4])
    found = Statistics(ArrayVolume(Path("/v"), values))
    exact = {"mean": values.mean(dtype=float), "std": values.std(dtype=float), "min": values.min(), "max": values.max()}
    assert dict(found) == pytest.approx(exact, rel=1e-5)
    for percent in (0, 1, 25, 50, 99.6, 100):
        assert found.percentile(percent) == pytest.approx(np.percentile(values, percent), abs=0.01)
    small = numbers()
    for percent in (0.5, 37.3, 99.9):
        exactly = Statistics(ArrayVolume(Path("/v"), small[None])).percentile(percent)
        assert exactly == pytest.approx(np.percentile(small, percent), abs=1e-4)


@pytest.mark.parametrize("voxels", [1, 7, 16, 100, 10**6])
def test_blocks_cover_everything_once(voxels: int) -> None:
    seen = np.zeros((5, 6, 7), dtype=int)
    for region in blocks((5, 6, 7), voxels):
        seen[region] += 1
        assert seen[region].size <= max(voxels, 1)
    assert (seen == 1).all()


def test_resampling_keeps_labels_and_places() -> None:
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32), (1, 6, 8, 12)).copy()
    sample = {"image": ramp, "label": np.round(ramp[0]).astype(np.uint8), "weight": ramp[0]}
    small = resampled(sample, (3, 4, 6))
    np.testing.assert_allclose(small["image"][0, 0, 0], np.arange(6) * 2 + 0.5)
    np.testing.assert_allclose(small["weight"], small["image"][0])
    assert small["label"].dtype == np.uint8
    assert set(small["label"].ravel().tolist()) <= set(range(12))
    assert np.abs(small["label"] - small["image"][0]).max() <= 0.5
    assert resampled(sample, (6, 8, 12)) is sample


def test_a_random_scale_changes_the_extent_that_a_patch_shows(file: Path) -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (20, 20, 40))
    path = written(file.with_name("ramp.h5"), raw=ramp, label=ramp.astype(np.uint8))
    dataset = StandardHDF5Dataset(
        str(path), slice_builder=SliceBuilder([8, 8, 16]), random_scale=[0, 2, 6], random_scale_probability=1.0
    )
    assert dataset.random
    steps = set()
    for index in range(len(dataset)):
        image, label = dataset[index]
        assert image.shape == (1, 8, 8, 16) and label.shape == (8, 8, 16)
        steps.add(round(float(image[0, 0, 0, 9] - image[0, 0, 0, 8]), 4))
        assert float((image[0] - label).abs().max()) <= 1
    assert len(steps) > 3
    assert steps <= {round(extent / 16, 4) for extent in range(10, 23)}
    never = StandardHDF5Dataset(
        str(path), slice_builder=SliceBuilder([8, 8, 16]), random_scale=4, random_scale_probability=0
    )
    assert not never.random


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"random_scale": 3}, "random_scale needs patches"),
        ({"random_scale": 4, "slice_builder": SliceBuilder([4, 8, 8])}, "random_scale is 4 and patch_shape (4, 8, 8)"),
        ({"random_scale": [1, 1], "slice_builder": SliceBuilder([4, 8, 8])}, "random_scale is [1, 1]"),
        ({"random_scale_probability": 2.0}, "random_scale_probability is 2.0"),
        ({"raw_internal_path": []}, "raw_internal_path is empty"),
        ({"label_internal_path": None, "weight_internal_path": "raw"}, "needs a label_internal_path"),
        (
            {"slice_builder": FilterSliceBuilder([4, 8, 8]), "label_internal_path": None},
            "FilterSliceBuilder needs labels",
        ),
        ({"slice_builder": SliceBuilder([4, 8])}, "a.h5 3 spatial dimensions: (12, 14, 16)"),
        ({"slice_builder": SliceBuilder([4, 15, 16])}, "patch_shape (4, 15, 16) is larger than"),
    ],
)
@BOTH
def test_wrong_arguments_are_refused(
    kind: type[PatchDataset], arguments: dict[str, Any], text: str, file: Path
) -> None:
    with pytest.raises(ValueError) as error:
        kind(str(file), **arguments)
    assert text in str(error.value)


# Which files


def test_folders_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("b.hdf5", "c.HDF", "a.h5", "d.hd5", "e.txt", ".hidden.h5"):
        (tmp_path / name).touch()
    kinds = (".h5", ".hdf", ".hdf5", ".hd5")
    found = found_files(str(tmp_path), kinds, "file_paths", "HDF5 file")
    assert [path.name for path in found] == ["a.h5", "b.hdf5", "c.HDF", "d.hd5"]
    pattern = [f"{tmp_path}/d*", f"{tmp_path}/[ab].*"]
    assert [path.name for path in found_files(pattern, kinds, "file_paths", "")] == ["d.hd5", "a.h5", "b.hdf5"]


def test_files_that_are_not_there_are_told(tmp_path: Path, file: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wish, text in (
        (f"{tmp_path}/empty", f"no HDF5 file in the folder {tmp_path}/empty; endings: .h5, .hdf, .hdf5, .hd5"),
        (f"{tmp_path}/x.h5", f"there is no file or folder {tmp_path}/x.h5"),
        (f"{tmp_path}/x*.h5", f"no file fits the pattern {tmp_path}/x*.h5"),
    ):
        with pytest.raises(FileNotFoundError, match=text.replace("*", r"\*")):
            LazyHDF5Dataset([wish])
    (tmp_path / "link.h5").symlink_to(file)
    with pytest.raises(ValueError, match=r"a\.h5 is meant more than once"):
        LazyHDF5Dataset([str(file), str(tmp_path / "link.h5")])
    with pytest.raises(ValueError, match="file_paths is empty"):
        LazyHDF5Dataset([])


def test_names_for_outputs_are_unique() -> None:
    paths = [Path(path) for path in ("/d/x/a.h5", "/d/y/a.h5", "/d/y/b.h5")]
    assert unique_names(paths, ["a", "a", "b"]) == ["x_a", "y_a", "y_b"]
    assert unique_names(paths[1:], ["a", "b"]) == ["a", "b"]
    assert unique_names([Path("/d/a.h5"), Path("/d/a.hdf")], ["a", "a"]) == ["a_0", "a_1"]


# What is wrong with a file


def spoiled(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        written(path, **{"raw": numbers(), "label": classes()} | changes)

    return spoil


def cut(path: Path) -> None:
    written(path, raw=numbers(), label=classes())
    path.write_bytes(path.read_bytes()[:2000])


def group(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["raw/inner"] = numbers()
        file["label"] = classes()


AT_ONCE = [
    (spoiled(raw=numbers((14,))), "dataset 'raw' has the shape (14,); expected (H, W), (D, H, W) or (C, D, H, W)"),
    (spoiled(raw=numbers((2, 1, 3, 4, 5))), "dataset 'raw' has the shape (2, 1, 3, 4, 5)"),
    (spoiled(raw=np.zeros((0, 4, 5))), "dataset 'raw' is empty, its shape is (0, 4, 5)"),
    (spoiled(raw=h5py.Empty("f4")), "dataset 'raw' is empty"),
    (spoiled(raw="text"), "dataset 'raw' has the type object; expected numbers"),
    (spoiled(raw=np.zeros((3, 4, 5), dtype=complex)), "dataset 'raw' has the type complex128"),
    (spoiled(label=classes((12, 14, 15))), "dataset 'label' has the shape (12, 14, 15), 'raw' the extent (12, 14, 16)"),
    (spoiled(label=classes((2, 2, *SHAPE))), "dataset 'label' has the shape (2, 2, 12, 14, 16)"),
    (group, "has no dataset 'raw'; there are: label (12, 14, 16), raw/inner (12, 14, 16)"),
    (lambda path: path.touch(), "cannot be read as HDF5: it is empty, 0 bytes"),
    (lambda path: path.write_text("no HDF5" * 1000), "cannot be read as HDF5: "),
    (cut, "cannot be read as HDF5: "),
]
RAW_NAN = numbers()
RAW_NAN[3, 4, 5] = np.nan
BAD_LABEL = classes()
BAD_LABEL[5, 6, 7] = 9
WHEN_READ = [
    (spoiled(raw=RAW_NAN), {}, "dataset 'raw' holds nan at (3, 4, 5); check_finite: false lets it pass"),
    (spoiled(raw=np.where(np.isnan(RAW_NAN), -np.inf, RAW_NAN)), {}, "dataset 'raw' holds -inf at (3, 4, 5)"),
    (spoiled(label=RAW_NAN), {}, "dataset 'label' holds nan at (3, 4, 5)"),
    (spoiled(label=BAD_LABEL), {"num_classes": 3}, "dataset 'label' holds the label 9 at (5, 6, 7); possible: 0 to 2"),
    (spoiled(label=BAD_LABEL), {"num_classes": 3, "ignore_index": 8}, "possible: 0 to 2 and 8 (ignore_index)"),
    (spoiled(label=numbers()), {"num_classes": 3}, "dataset 'label' holds the label 0."),
]


@pytest.mark.parametrize(("spoil", "text"), AT_ONCE)
@BOTH
def test_a_bad_file_is_refused_at_once(
    kind: type[PatchDataset], spoil: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    spoil(tmp_path / "bad.h5")
    with pytest.raises(ValueError) as error:
        kind(str(tmp_path), slice_builder=SliceBuilder([1, 2, 2]))
    assert str(tmp_path / "bad.h5") in str(error.value)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spoil", "arguments", "text"), WHEN_READ)
def test_a_bad_value_is_refused_when_it_is_read(
    spoil: Callable[[Path], None], arguments: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.h5"
    spoil(path)
    with pytest.raises(ValueError) as error:
        StandardHDF5Dataset(str(path), **arguments)
    assert text in str(error.value) and str(path) in str(error.value)
    dataset = LazyHDF5Dataset(str(path), slice_builder=SliceBuilder([3, 3, 3]), **arguments)
    with pytest.raises(ValueError) as error:
        for index in range(len(dataset)):
            dataset[index]
    assert text.partition(" at (")[0] in str(error.value) and str(path) in str(error.value)


def test_values_that_are_allowed_pass(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", raw=RAW_NAN, label=BAD_LABEL)
    image, label = StandardHDF5Dataset(str(path), num_classes=3, ignore_index=9, check_finite=False)[0]
    assert math.isnan(image[0, 3, 4, 5]) and label[5, 6, 7] == 9
    huge = written(tmp_path / "b.h5", raw=np.full(SHAPE, 3e38, dtype=np.float32), label=classes())
    assert StandardHDF5Dataset(str(huge))[0][0].isfinite().all(), "a sum that overflows is no value that is infinite"


def test_a_chunk_that_cannot_be_unpacked_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", data=numbers((32, 32, 32)), chunks=(32, 32, 32), compression="gzip")
        place = file["raw"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[place.byte_offset + 100 : place.byte_offset + 5000] = bytes(4900)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.h5: dataset 'raw' cannot be read"):
        LazyHDF5Dataset(str(path), label_internal_path=None)[0]


def test_files_of_one_dataset_agree(file: Path) -> None:
    written(file.with_name("b.h5"), raw=numbers((2, *SHAPE)), label=classes())
    with pytest.raises(ValueError, match=r"b\.h5 has 2 channels, .*a\.h5 1; all files"):
        LazyHDF5Dataset(str(file.parent))
    written(file.with_name("b.h5"), raw=numbers((5, 5)), label=classes((5, 5)))
    with pytest.raises(ValueError, match=r"b\.h5 has 2 spatial dimensions, .*a\.h5 3"):
        LazyHDF5Dataset(str(file.parent))


def test_arrays_must_fit() -> None:
    with pytest.raises(ValueError, match=r"/v\.h5: the weight has the shape \(1, 4, 5\)"):
        ArrayVolume(Path("/v.h5"), np.zeros((1, 4, 5)), weight=np.zeros((1, 4, 5)))


def test_a_volume_by_itself(file: Path) -> None:
    volume = HDF5Volume(file)
    assert (volume.name, volume.shape, volume.channels, volume.has_label) == ("a", SHAPE, 1, False)
    region = (slice(-2, 3), slice(0, 4), slice(10, 18))
    expected = np.pad(numbers(), [(2, 0), (0, 0), (0, 2)], mode="reflect")[0:5, 0:4, 10:18]
    np.testing.assert_array_equal(volume.read(region)[0], expected)
    with pytest.raises(FileNotFoundError):
        open_hdf5(file.with_name("nothing.h5"))


# Through the engine

CONFIG = """
model: {name: UNet3D, in_channels: 1, out_channels: 3, f_maps: 4, num_levels: 2, num_groups: 2}
loaders:
  name: LazyHDF5Dataset
  batch_size: 2
  num_workers: 2
  num_classes: 3
  slice_builder: {name: SliceBuilder, patch_shape: [6, 14, 16]}
  train:
    file_paths: [data/a.h5]
    random_scale: [2, 4, 4]
  val: {file_paths: [data/b.h5]}
loss: {name: CrossEntropyLoss}
optimizer: {name: AdamW, lr: 1e-3}
trainer: {max_steps: 2, checkpoint_dir: run}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and volumes, which is the current one."""
    (tmp_path / "data").mkdir()
    for name in "ab":
        written(tmp_path / f"data/{name}.h5", raw=numbers(seed=ord(name)), label=classes())
    written(tmp_path / "data/nan.h5", raw=RAW_NAN, label=classes())
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("other", ["data/a.h5", "data/../data/a.h5", "link.h5", "folder", "link*"])
def test_a_file_in_train_and_val_is_refused(other: str, place: Path) -> None:
    (place / "link.h5").symlink_to("data/a.h5")
    (place / "folder").symlink_to("data")
    config = load_config("c.yaml", [f"loaders.val.file_paths=[{other}]", "loaders.train.num_workers=0"])
    with pytest.raises(ConfigError) as error:
        get_train_loaders(config, 0, 1, 0)
    (mistake,) = error.value.mistakes
    assert str(mistake) == f"c.yaml:12:3: loaders.val: {place}/data/a.h5 is also in train; no file may be in both"


def test_other_files_and_foreign_attributes_pass(place: Path) -> None:
    loaders = get_train_loaders(load_config("c.yaml"), 0, 1, 0)
    assert loaders.train is not None and loaders.val is not None
    dataset = loaders.val.dataset.dataset  # type: ignore[attr-defined]
    assert dataset.files == (place / "data/b.h5",)


def test_what_is_known_at_once_is_one_mistake_with_its_place(place: Path) -> None:
    config = load_config("c.yaml", ["loaders.slice_builder.patch_shape=[6,14,17]"])
    with pytest.raises(ConfigError) as error:
        get_train_loaders(config, 0, 1, 0)
    (mistake,) = error.value.mistakes
    start, end = (
        "c.yaml:9:3: loaders.train: LazyHDF5Dataset",
        f"larger than {place}/data/a.h5, whose extent is (12, 14, 16)",
    )
    assert str(mistake).startswith(start) and end in str(mistake)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_volumes_train_from_the_command_line(place: Path, run_cli: RunCli) -> None:
    done = run_cli(["c.yaml"], timeout=300)
    assert done.rc == 0, done.text
    assert "train 2, val 2 samples" in done.text
    assert any((place / "run/checkpoints").iterdir())


def test_what_is_known_at_once_ends_with_status_2(place: Path, run_cli: RunCli) -> None:
    done = run_cli(["c.yaml", "loaders.name=StandardHDF5Dataset", "loaders.train.file_paths=[data/nan.h5]"])
    assert done.rc == 2, done.text
    (line,) = [line for line in done.stderr.splitlines() if "loaders" in line]
    assert line.startswith("c.yaml:9:3: loaders.train: StandardHDF5Dataset(") and ") raised ValueError: " in line
    assert f"{place}/data/nan.h5: dataset 'raw' holds nan at (3, 4, 5)" in line
    assert "Traceback" not in done.text
    assert not (place / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_found_while_reading_ends_with_status_1(place: Path, run_cli: RunCli) -> None:
    overrides = ["loaders.train.file_paths=[data/nan.h5]", "loaders.train.random_scale=null"]
    done = run_cli(["c.yaml", *overrides], timeout=300)
    assert done.rc == 1, done.text
    assert f"{place}/data/nan.h5: dataset 'raw' holds nan at (3, 4, 5)" in done.text
