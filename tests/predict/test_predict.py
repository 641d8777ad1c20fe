"""Prediction: every voxel once, whatever the patches, the slabs, the ranks and the interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import REPOSITORY, RunCli, StartCli
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn

from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume
from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.data.samplers import EvaluationShard
from dtrain.data.seeded_batches import batch_loader
from dtrain.dataloader import loader_settings
from dtrain.distributed.ranks import Ranks
from dtrain.modelloader import Forward
from dtrain.predict.inference import Inference, Result
from dtrain.predict.items import predict_items
from dtrain.predict.patches import Grid
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import logits, volumes
from dtrain.predict.segmentation import Agreement, Choice, instances
from dtrain.predict.stitching import Run, stitched
from dtrain.predict.work_folder import PredictionError, opened, read_parts, write_part
from dtrain.predict.writer import cut
from dtrain.reporting.line_progress import LineProgress
from dtrain.trainer import create_trainer

torch.set_num_threads(1)


# What the tests have in place of an engine


def random_volume(*shape: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((channels, *shape), dtype=np.float32)


def dataset_of(
    *images: np.ndarray,
    patch: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    label: Callable[[np.ndarray], np.ndarray] | None = None,
    **more: Any,
) -> PatchDataset:
    volumes = [
        ArrayVolume(Path(f"volume-{number}.h5"), image, label(image) if label else None)
        for number, image in enumerate(images)
    ]
    builder = SliceBuilder(list(patch), list(stride or patch), list(halo or [0] * len(patch))) if patch else None
    return PatchDataset(volumes, [], builder, **more)


def identity(images: Tensor) -> Tensor:
    return images


class Counted:
    """A model that counts its patches and may stop the work."""

    def __init__(self, model: Callable[[Tensor], Tensor] = identity, stop_after: int | None = None) -> None:
        self.model, self.patches, self.stop_after = model, 0, stop_after

    def __call__(self, images: Tensor) -> Tensor:
        self.patches += len(images)
        return self.model(images)

    def is_to_stop(self) -> bool:
        return self.stop_after is not None and self.patches >= self.stop_after


class Group(Ranks):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, world_size: int, table: dict[str, Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, rank, world_size, torch.device("cpu"))
        self.table, self.barrier = table, barrier

    def gather(self, value: Any) -> list[Any] | None:
        self.table[self.rank] = value  # type: ignore[index]
        self.barrier.wait()
        values = [self.table[rank] for rank in range(self.world_size)] if self.is_main else None  # type: ignore[index]
        self.barrier.wait()
        return values

    def broadcast(self, value: Any = None) -> Any:
        if self.is_main:
            self.table["value"] = value
        self.barrier.wait()
        value = self.table["value"]
        self.barrier.wait()
        return value


def inference(predictor: Predictor, model: Any = identity, ranks: Ranks | None = None, weights: str = "a") -> Inference:
    ranks = ranks or Ranks(0, 0, 1, torch.device("cpu"))
    asked_to_stop = getattr(model, "is_to_stop", lambda: False)
    forward = Forward(nn.Identity(), ranks.device)
    identity = {"weights": weights}
    return Inference(predictor, forward, model, ranks, LineProgress(), Path(), identity, asked_to_stop=asked_to_stop)


def predicted(
    folder: Path, dataset: PatchDataset, model: Any = identity, overwrite: bool = False, weights: str = "a", **keys: Any
) -> Result:
    predictor = Predictor(**{"activation": "none"} | keys)
    surroundings = inference(predictor, model, weights=weights)
    return volumes(surroundings, dataset, predictor.batch_size or 2, folder, overwrite)


def predicted_by(world_size: int, folder: Path, dataset: PatchDataset, models: Sequence[Any], **keys: Any) -> Result:
    """The same by several ranks."""
    table: dict[str, Any] = {}
    barrier = threading.Barrier(world_size, timeout=60)
    results: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        try:
            group = Group(rank, world_size, table, barrier)
            predictor = Predictor(**{"activation": "none"} | keys)
            results[rank] = volumes(inference(predictor, models[rank], group), dataset, 2, folder, False)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0]


def read(path: Path, name: str = "predictions") -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[name])


# The grid


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, patch, stride, halo."""
    dims = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    patch = tuple(draw(st.integers(1, 10)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, length)) for length in patch)
    return shape, patch, stride, tuple(draw(st.integers(0, 3)) for _ in range(dims))


@given(grids(), st.sampled_from(["gaussian", "constant"]))
@settings(max_examples=60, deadline=None)
def test_the_patches_of_a_voxel_share_it_whole(sizes: Any, blend: Any) -> None:
    shape, patch, stride, _ = sizes
    grid = Grid(shape, patch, stride, blend)
    total, most = np.zeros(shape), np.zeros(shape, int)
    for index in range(len(grid)):
        weight = grid.weight(index)
        assert (weight > 0).all()
        place = tuple(slice(at, at + side) for at, side in zip(grid.corner(index), weight.shape, strict=True))
        total[place] += weight
        most[place] += 1
    assert np.allclose(total, 1, atol=1e-14)
    assert (most.max() > 1) == grid.overlaps


@given(grids(), st.data())
@settings(max_examples=30, deadline=None)
def test_touching_names_the_patches_of_some_planes_and_no_others(sizes: Any, data: st.DataObject) -> None:
    shape, patch, stride, _ = sizes
    grid = Grid(shape, patch, stride, "constant")
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    reaches = [index for index in range(len(grid)) if grid.corner(index)[0] < end]
    reaches = [index for index in reaches if grid.corner(index)[0] + patch[0] > begin]
    assert list(grid.touching(begin, end)) == reaches


@given(grids(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_slabs_cover_the_volume_once(sizes: Any, least: int) -> None:
    shape, patch, stride, _ = sizes
    slabs = Grid(shape, patch, stride, "constant").slabs(least)
    assert [plane for begin, end in slabs for plane in range(begin, end)] == list(range(shape[0]))
    assert len(slabs) == 1 or min(end - begin for begin, end in slabs) >= least


def test_the_gaussian_is_the_published_one() -> None:
    weights = [Grid((32,), (16,), (8,), "gaussian").weight(index) for index in range(3)]
    ratio = weights[0][11] / weights[1][3]  # voxel 11: 3.5 from the first patch's middle, 4.5 from the second's
    assert ratio == pytest.approx(np.exp(-0.5 * (3.5**2 - 4.5**2) / 2**2))


# Stitching


@given(grids(), st.sampled_from(["gaussian", "constant"]), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_what_the_model_passes_on_comes_out_exactly(sizes: Any, blend: Any, batch_size: int, channels: int) -> None:
    shape, patch, stride, halo = sizes
    image = random_volume(*shape, channels=channels)
    predictor = Predictor(
        patch_shape=list(patch), stride_shape=list(stride), halo_shape=list(halo), blend=blend, batch_size=batch_size
    )
    source = predictor.source(dataset_of(image))
    parts = [
        (low, chunk.copy())
        for _, planes in stitched(source, [Run(0, 0, shape[0])], inference(predictor), batch_size)
        for low, chunk in planes
    ]
    assert [low for low, _ in parts] == [sum(chunk.shape[1] for _, chunk in parts[:k]) for k in range(len(parts))]
    assert np.array_equal(np.concatenate([chunk for _, chunk in parts], axis=1), image)


@given(grids(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_run_is_the_same_as_those_planes_of_the_whole(sizes: Any, data: st.DataObject) -> None:
    """Bit for bit: the model's answer here depends on what else is in its batch."""
    shape, patch, stride, halo = sizes
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    predictor = Predictor(patch_shape=list(patch), stride_shape=list(stride), halo_shape=list(halo))
    source = predictor.source(dataset_of(random_volume(*shape)))
    model = inference(predictor, lambda x: x + x.mean() * x.std(0, correction=0).sum())

    def planes(run: Run) -> np.ndarray:
        chunks = [part.copy() for _, all_ in stitched(source, [run], model, 3) for _, part in all_]
        return np.concatenate(chunks, axis=1)

    assert np.array_equal(planes(Run(0, begin, end)), planes(Run(0, 0, shape[0]))[:, begin:end])


def convolutions(seed: int = 0, dims: int = 3, out: int = 2) -> nn.Module:
    """Sees 2 voxels around each."""
    torch.manual_seed(seed)
    conv: Any = nn.Conv3d if dims == 3 else nn.Conv2d
    return nn.Sequential(conv(1, 4, 3, padding="same"), nn.Tanh(), conv(4, out, 3, padding="same")).eval()


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_with_halo_enough_patches_give_what_the_whole_volume_gives(tmp_path: Path, blend: str) -> None:
    model, image = convolutions(), random_volume(20, 24, 28)
    data = dataset_of(image, patch=[8, 10, 12], stride=[6, 10, 7], halo=[2, 2, 2])
    predicted(tmp_path, data, model, blend=blend)
    reflected = np.pad(image, [(0, 0), (2, 2), (2, 2), (2, 2)], mode="reflect")
    with torch.inference_mode():
        whole = model(torch.from_numpy(reflected)[None])[0, :, 2:-2, 2:-2, 2:-2].numpy()
    assert np.abs(read(tmp_path / "volume-0_predictions.h5") - whole).max() < 1e-5


def test_overlaps_are_averaged_by_weight_and_not_overwritten(tmp_path: Path) -> None:
    """Each patch answers with a number of its own."""
    numbers = iter(range(1, 4))

    def model(images: Tensor) -> Tensor:
        return torch.stack([torch.full_like(image, float(next(numbers))) for image in images])

    data = dataset_of(random_volume(1, 8), patch=[1, 4], stride=[1, 2])
    predicted(tmp_path, data, model, blend="constant")
    found = read(tmp_path / "volume-0_predictions.h5")
    assert found.tolist() == [[[1, 1, 1.5, 1.5, 2.5, 2.5, 3, 3]]]


def test_small_images_go_to_the_model_several_at_once(tmp_path: Path) -> None:
    sizes = []

    def model(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape))
        return images

    images = [random_volume(6, 7, seed=k) for k in range(5)] + [random_volume(8, 7, seed=9)]
    predicted(tmp_path, dataset_of(*images), model, batch_size=4)
    assert sizes == [(4, 1, 6, 7), (1, 1, 6, 7), (1, 1, 8, 7)]
    for number, image in enumerate(images):
        assert np.array_equal(read(tmp_path / f"volume-{number}_predictions.h5"), image)


def test_the_transforms_of_the_dataset_come_first_and_the_random_ones_not(tmp_path: Path) -> None:
    from dtrain.components.transforms.geometry import RandomFlip
    from dtrain.components.transforms.normalize import Standardize

    image = random_volume(6, 6, 6) * 3 + 5
    data = dataset_of(image, transforms=[Standardize(), RandomFlip()], global_normalization=True)
    predicted(tmp_path, data)
    expected = (image - image.mean()) / image.std()
    assert np.allclose(read(tmp_path / "volume-0_predictions.h5"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "activation", "expected"),
    [
        (identity, None, lambda x: 1 / (1 + np.exp(-x))),
        (
            lambda x: torch.cat([x, 2 * x], 1),
            None,
            lambda x: np.exp([x[0], 2 * x[0]]) / np.exp([x[0], 2 * x[0]]).sum(0),
        ),
        (lambda x: torch.cat([x, 2 * x], 1), "sigmoid", lambda x: 1 / (1 + np.exp([-x[0], -2 * x[0]]))),
        (identity, "none", lambda x: x),
        (lambda x: {"out": x, "other": None}["out"], "none", lambda x: x),
    ],
)
def test_activations(tmp_path: Path, model: Any, activation: Any, expected: Any) -> None:
    image = random_volume(4, 5, 6)
    predicted(tmp_path, dataset_of(image), model, activation=activation)
    assert np.allclose(read(tmp_path / "volume-0_predictions.h5"), expected(image), atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (
            {"patch_shape": [4, 4]},
            r"predictor.patch_shape: \[4, 4\] does not fit volume-0.h5 of \(6, 6, 6\); expected 3",
        ),
        ({"patch_shape": [4, 4, 4], "stride_shape": [5, 4, 4]}, "larger than the patch"),
        ({"halo_shape": [-1, 0, 0]}, "expected 3 integers of at least 0"),
        ({"format": "png"}, r"png holds one plane, volume-0.h5 is \(6, 6, 6\)"),
        ({"format": "csv"}, "csv is for datasets without volumes"),
        ({"prediction_channel": 3}, "prediction_channel is 3, but the model has 1 channel"),
        ({"save_segmentation": True, "dtype": "float32"}, "labels need an integer type"),
        ({"dtype": "uint8"}, "an integer type can hold probabilities"),
        ({"instances": "foreground", "performance_metric": "dice"}, "not numbered instances"),
        ({"compression": "lzf", "format": "tiff"}, "lzf is for HDF5 only"),
        ({"performance_metric": "dice"}, "volume-0.h5 is read without labels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        predicted(tmp_path, dataset_of(random_volume(6, 6, 6)), **keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.*"))[1:]  # the hidden folder at most


def test_a_model_that_changes_the_extent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"volume-0.h5: the model made \(1, 1, 3, 3, 3\) of patches \(1, 1, 6, 6, 6\)"):
        predicted(tmp_path, dataset_of(random_volume(6, 6, 6)), lambda x: x[..., ::2, ::2, ::2])


# Ranks, slabs, interruptions


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("slab_planes", [None, 4])
def test_ranks_and_slabs_change_no_bit(tmp_path: Path, world_size: int, slab_planes: int | None) -> None:
    images = [random_volume(30, 9, 8, seed=1), random_volume(11, 9, 8, seed=2)]
    data = dataset_of(*images, patch=[5, 6, 5], stride=[3, 4, 4], halo=[1, 1, 1])
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    predicted(alone, data, convolutions())
    models = [Counted(convolutions()) for _ in range(world_size)]
    result = predicted_by(world_size, shared, data, models, slab_planes=slab_planes)
    assert [file.name for file in result.files] == ["volume-0_predictions.h5", "volume-1_predictions.h5"]
    for file in result.files:
        assert np.array_equal(read(file), read(alone / file.name))
    assert not list(shared.glob(".dtrain/*.parts"))
    if slab_planes:
        assert min(model.patches for model in models) > sum(model.patches for model in models) / world_size / 2


def test_one_process_evaluates_no_patch_twice(tmp_path: Path) -> None:
    data = dataset_of(random_volume(30, 9, 8), patch=[5, 6, 5], stride=[3, 4, 4])
    model = Counted()
    predicted(tmp_path, data, model, slab_planes=3)
    assert model.patches == len(data)


def test_what_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    data = dataset_of(random_volume(30, 9, 8), random_volume(6, 6, 6, seed=3), patch=[5, 6, 5], stride=[3, 4, 4])
    once, again = tmp_path / "once", tmp_path / "again"
    keys = {"slab_planes": 3}
    predicted(once, data, convolutions(), **keys)
    patches = []
    for _ in range(40):
        model = Counted(convolutions(), stop_after=18)
        result = predicted(again, data, model, **keys)
        patches.append(model.patches)
        if not result.stopped:
            break
        assert not (again / "volume-1_predictions.h5").exists()
    assert 2 < len(patches) < 12
    assert sum(patches) < 2 * len(data)
    for file in result.files:
        assert np.array_equal(read(file), read(once / file.name))
    assert not [path for path in again.rglob("*") if "parts" in path.name or path.name.startswith(".2")]


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    data = dataset_of(random_volume(6, 6, 6))
    assert predicted(tmp_path, data).made == 1
    before = (tmp_path / "volume-0_predictions.h5").stat()
    model = Counted()
    result = predicted(tmp_path, data, model)
    assert (result.made, model.patches, result.files) == (0, 0, [tmp_path / "volume-0_predictions.h5"])
    assert (tmp_path / "volume-0_predictions.h5").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("change", "told"),
    [({"weights": "b"}, "weights"), ({"threshold": 0.7}, "what is kept"), ({"dtype": "float16"}, "file")],
)
def test_what_was_made_otherwise_is_overwritten_on_demand_only(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    data = dataset_of(random_volume(6, 6, 6))
    predicted(tmp_path, data)
    file = tmp_path / "volume-0_predictions.h5"
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=rf"holds predictions made otherwise: volume-0_predictions.h5 \({told}\)"):
        predicted(tmp_path, data, lambda x: x + 1, **change)
    assert file.read_bytes() == before
    assert predicted(tmp_path, data, lambda x: x + 1, overwrite=True, **change).made == 1
    assert np.allclose(read(file), data.volumes[0].image + 1, atol=1e-2)


def test_a_file_that_somebody_else_put_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "volume-0_predictions.h5").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="of unknown origin"):
        predicted(tmp_path, dataset_of(random_volume(6, 6, 6)))
    assert (tmp_path / "volume-0_predictions.h5").read_bytes() == b"precious"


def test_parts_made_with_other_weights_are_not_used(tmp_path: Path) -> None:
    data = dataset_of(random_volume(30, 6, 6), patch=[5, 6, 6])
    predicted(tmp_path, data, Counted(stop_after=4), slab_planes=5)
    assert len(list(tmp_path.glob(".dtrain/*/*/*.npy"))) >= 2
    predicted(tmp_path, data, lambda x: x + 1, weights="b", slab_planes=5)
    assert np.array_equal(read(tmp_path / "volume-0_predictions.h5"), data.volumes[0].image + 1)


def test_a_folder_belongs_to_one_prediction(tmp_path: Path) -> None:
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    with opened(tmp_path, ranks, bool), pytest.raises(ConfigError, match="being written by another prediction"):
        predicted(tmp_path, dataset_of(random_volume(6, 6, 6)))


def test_a_disk_that_is_full_costs_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    data = dataset_of(random_volume(30, 40, 40))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        for keys in ({}, {"format": "tiff"}, {"format": "npy"}, {"slab_planes": 5, "patch_shape": [5, 40, 40]}):
            with pytest.raises(PredictionError, match=r"volume-0_predictions\.\w+ was not written: .*nothing of it"):
                predicted(tmp_path, data, **keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.parent.parent.name for path in left} == {"volume-0_predictions.h5.parts"}  # whole parts, to go on from
    assert {len(np.load(path)) for path in left} == {5}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/out cannot be written: Not a directory"):
        predicted(tmp_path / "file" / "out", dataset_of(random_volume(6, 6, 6)))


def test_parts_are_cut_at_the_borders_of_slabs(tmp_path: Path) -> None:
    planes = np.arange(40).reshape(10, 2, 2)
    chunks = [(0, planes[:4]), (4, planes[4:5]), (5, planes[5:])]
    slabs = [(0, 3), (3, 5), (5, 6), (6, 10)]
    paths = [tmp_path / f"{begin}.npy" for begin, _ in slabs]
    for path, (begin, end), of_slab in zip(paths, slabs, cut(iter(chunks), slabs), strict=True):
        write_part(path, of_slab, end - begin)
        assert np.array_equal(np.load(path), planes[begin:end])
    assert np.array_equal(np.concatenate(list(read_parts(paths, chunk_bytes=40))), planes)


# What is kept


def blobs(*shape: int, seed: int = 0) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return (smooth / smooth.std()).astype(np.float32)[None]


@pytest.mark.parametrize(("classes", "dtype"), [(1, np.uint8), (3, np.uint8), (300, np.uint16)])
def test_segmentation(tmp_path: Path, classes: int, dtype: Any) -> None:
    image = random_volume(5, 6, 7, channels=classes)
    predicted(tmp_path, dataset_of(image), activation=None, save_segmentation=True)
    expected = image.argmax(0) if classes > 1 else image[0] > 0
    found = read(tmp_path / "volume-0_predictions.h5")
    assert found.dtype == dtype
    assert np.array_equal(found, expected)


def test_one_channel_and_a_threshold(tmp_path: Path) -> None:
    image = random_volume(5, 6, 7, channels=3)
    data = dataset_of(image)
    predicted(tmp_path / "a", data, prediction_channel=1)
    assert np.array_equal(read(tmp_path / "a" / "volume-0_predictions.h5"), image[1:2])
    predicted(tmp_path / "b", data, prediction_channel=1, save_segmentation=True, threshold=0.9, dtype="uint16")
    found = read(tmp_path / "b" / "volume-0_predictions.h5")
    assert found.dtype == np.uint16
    assert np.array_equal(found, image[1] > 0.9)


@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("min_size", [0, 5])
@pytest.mark.parametrize("shape", [(12, 14, 13), (20, 24)])
def test_instances_are_the_connected_components(
    tmp_path: Path, connectivity: int, min_size: int, shape: tuple[int, ...]
) -> None:
    connectivity = min(connectivity, len(shape))
    mask = blobs(*shape)[0] > 0.4
    expected, count = ndimage.label(mask, ndimage.generate_binary_structure(len(shape), connectivity))
    sizes = np.bincount(expected.ravel())
    kept = [label for label in range(1, count + 1) if sizes[label] >= min_size]
    for chunk in (1, 3, 100):
        pieces = (mask[low : low + chunk] for low in range(0, shape[0], chunk))
        found = np.concatenate(list(instances(pieces, shape[0], connectivity, min_size, tmp_path / "scratch")))
        assert not (tmp_path / "scratch").exists()
        pairs = {(int(a), int(b)) for a, b in zip(expected.ravel(), found.ravel(), strict=True) if a in kept or b}
        assert len(pairs) == len(kept) == found.max()  # one to one
        assert found.dtype == (np.uint8 if len(kept) < 256 else np.uint16)


def test_instances_are_one_over_the_borders_of_slabs_and_ranks(tmp_path: Path) -> None:
    data = dataset_of(blobs(30, 12, 12), patch=[5, 12, 12])
    keys = {"instances": "foreground", "threshold": 0.4, "connectivity": 2}
    predicted(tmp_path / "whole", data, **keys)
    predicted_by(2, tmp_path / "parts", data, [identity, identity], slab_planes=5, **keys)
    whole, parts = (read(tmp_path / name / "volume-0_predictions.h5") for name in ("whole", "parts"))
    assert np.array_equal(whole, parts)
    assert whole.max() > 3


def test_instances_of_what_is_no_boundary(tmp_path: Path) -> None:
    """Two rooms and the wall between them."""
    wall = np.zeros((1, 4, 5, 9), np.float32)
    wall[..., 4] = 1
    predicted(tmp_path, dataset_of(wall), instances="inverted")
    assert np.unique(read(tmp_path / "volume-0_predictions.h5"), return_counts=True)[1].tolist() == [20, 80, 80]


def test_no_instance_at_all(tmp_path: Path) -> None:
    predicted(tmp_path, dataset_of(np.zeros((1, 4, 5, 6), np.float32)), instances="foreground")
    assert not read(tmp_path / "volume-0_predictions.h5").any()


@pytest.mark.parametrize("metric", ["dice", "mean_iou"])
def test_agreement_with_the_label(tmp_path: Path, metric: str) -> None:
    image = random_volume(20, 6, 7, channels=3)
    truth = np.random.default_rng(5).integers(-1, 3, (20, 6, 7))
    data = dataset_of(image, patch=[5, 6, 7], label=lambda _: truth)
    for folder, keys in (("whole", {}), ("parts", {"slab_planes": 5}), ("labels", {"save_segmentation": True})):
        result = predicted(tmp_path / folder, data, performance_metric=metric, **keys)
        found, counts = image.argmax(0), truth >= 0
        expected = []
        for kind in (1, 2):
            a, b = (found == kind) & counts, truth == kind
            both = (a & b).sum()
            expected.append(2 * both / (a.sum() + b.sum()) if metric == "dice" else both / (a | b).sum())
        assert result.scores["volume-0_predictions.h5"] == pytest.approx(expected)
        again = predicted(tmp_path / folder, data, performance_metric=metric, **keys)
        assert (again.made, again.scores) == (0, result.scores)


def test_agreement_with_a_label_of_several_channels() -> None:
    agreement = Agreement("dice", Choice(threshold=0.5))
    kept, label = np.random.default_rng(0).random((4, 2, 5)), np.random.default_rng(1).integers(0, 2, (2, 4, 5))
    agreement.add(kept, label)
    masks = np.swapaxes(kept, 0, 1) > 0.5
    expected = [2 * (a & (b > 0)).sum() / (a.sum() + b.sum()) for a, b in zip(masks, label, strict=True)]
    assert agreement.values() == pytest.approx(expected)


def test_a_class_that_is_nowhere_has_no_agreement() -> None:
    agreement = Agreement("mean_iou", Choice(True))
    agreement.add(np.array([0, 2, 2]), np.array([0, 2, 0]))
    assert str(agreement.values()) == "[nan, 0.5]"


# Files


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


# Whole volumes for metrics


def loader_of(dataset: Any) -> Any:
    """What is read of a loader where its dataset has volumes."""
    return SimpleNamespace(dataset=SimpleNamespace(dataset=dataset), batch_sampler=SimpleNamespace(batch_size=2))


def test_logits_of_whole_volumes_are_dealt_out(tmp_path: Path) -> None:
    images = [random_volume(7 + k, 6, 5, seed=k) for k in range(5)]
    data = dataset_of(*images, patch=[5, 4, 5], stride=[3, 4, 2], label=lambda image: (image[0] > 0).astype(np.uint8))
    seen = []
    for rank in range(3):
        ranks = Ranks(rank, rank, 3, torch.device("cpu"))
        for number, output, label in logits(inference(Predictor(), ranks=ranks), loader_of(data)):
            assert np.array_equal(output[0].numpy(), images[number])
            assert label.dtype == torch.int64
            assert np.array_equal(label[0].numpy(), images[number][0] > 0)
            seen.append((rank, number))
    assert sorted(seen) == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2)]


def test_a_volume_without_label_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match=r"volume-0.h5 has no label"):
        list(logits(inference(Predictor()), loader_of(dataset_of(random_volume(6, 6, 6)))))


# Datasets without volumes


class Vectors(torch.utils.data.Dataset[Any]):
    random = False

    def __init__(self, size: int, form: str = "pair") -> None:
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
        self.form = form

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"pair": (self.x[index], index), "alone": self.x[index], "dict": {"image": self.x[index]}}[self.form]


def items(folder: Path, data: Any, world_size: int = 1, model: Any = identity, **keys: Any) -> list[Result]:
    table: dict[str, Any] = {}
    barrier = threading.Barrier(world_size, timeout=60)
    results: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        options = loader_settings() | {"batch_size": None, "global_batch_size": None}
        options = {
            k: v for k, v in options.items() if k not in ("batch_size", "global_batch_size", "shuffle", "drop_last")
        }
        loader = batch_loader(data, 0, EvaluationShard(len(data), rank, world_size, 4), options | {"pin_memory": False})
        predictor = Predictor(**keys)
        own = inference(predictor, model, Group(rank, world_size, table, barrier))
        results[rank] = predict_items(own, loader, folder, False)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("form", ["pair", "alone", "dict"])
@pytest.mark.parametrize("size", [3, 21])
def test_items_come_once_and_in_order(tmp_path: Path, world_size: int, form: str, size: int) -> None:
    data = Vectors(size, form)
    result = items(tmp_path, data, world_size)[0]
    assert result.files == [tmp_path / "predictions.h5"]
    assert np.allclose(read(tmp_path / "predictions.h5"), data.x.softmax(1), atol=1e-6)
    model = Counted()
    assert items(tmp_path, data, 1, model)[0].made == 0
    assert model.patches == 0
    assert not list(tmp_path.glob(".dtrain/*.parts"))


def test_items_as_a_table(tmp_path: Path) -> None:
    data = Vectors(9)
    items(tmp_path, data, 2, format="csv")
    header, *rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert header == "index,class,p0,p1,p2"
    values = np.array([row.split(",") for row in rows], float)
    assert values[:, 0].tolist() == list(range(9))
    assert values[:, 1].tolist() == data.x.argmax(1).tolist()
    assert np.array_equal(values[:, 2:].astype(np.float32), data.x.softmax(1).numpy())


def test_items_as_classes(tmp_path: Path) -> None:
    data = Vectors(9)
    items(tmp_path, data, format="npy", save_segmentation=True)
    assert np.load(tmp_path / "predictions.npy").tolist() == data.x.argmax(1).tolist()


def test_items_of_images_keep_their_extent(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(5, 2, 6, 7))
    items(tmp_path, data, activation="none")
    assert np.array_equal(read(tmp_path / "predictions.h5"), data.tensors[0])


# Settings and the command line


CONFIG = """
modules: [slow]
model: {{name: Slow}}
loaders:
  name: LazyHDF5Dataset
  raw_internal_path: raw
  batch_size: 2
  slice_builder: {{name: SliceBuilder, patch_shape: [8, 16, 16], stride_shape: [4, 8, 8], halo_shape: [2, 2, 2]}}
  predict: {{file_paths: [{files}], label_internal_path: null}}
predictor: {{slab_planes: 4, activation: none}}
trainer: {{checkpoint_dir: run}}
"""
SLOW = """
import os, time
import torch

class Slow(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x):
        with open(f"calls-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(f"{len(x)}\\n")
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().forward(x)
"""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with two volumes, a config and weights."""
    for number, depth in enumerate((40, 22)):
        with h5py.File(tmp_path / f"cells{number}.h5", "w") as file:
            file["raw"] = random_volume(depth, 24, 24, seed=number)[0]
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "predict.yaml").write_text(CONFIG.format(files="cells0.h5, cells1.h5"))
    torch.manual_seed(0)
    torch.save(nn.Conv3d(1, 1, 3, padding=1).state_dict(), tmp_path / "weights.pt")
    return tmp_path


COMMAND = ["predict", "predict.yaml", "--checkpoint", "weights.pt"]


def calls(folder: Path) -> int:
    return sum(int(line) for path in folder.glob("calls-*") for line in path.read_text().split())


def expected(folder: Path, number: int) -> np.ndarray:
    model = nn.Conv3d(1, 1, 3, padding=0)
    model.load_state_dict(torch.load(folder / "weights.pt"))
    with h5py.File(folder / f"cells{number}.h5") as file, torch.inference_mode():
        image = np.pad(file["raw"], 1, mode="reflect")
        return model(torch.from_numpy(image)[None, None])[0].numpy()


def test_the_command_on_one_process_and_on_two_ranks(desk: Path, run_cli: RunCli) -> None:
    inputs = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in desk.glob("*.h5")}
    done = run_cli(COMMAND)
    assert done.rc == 0, done.text
    assert "predictions: 2 files in run/predictions" in done.stdout
    patches = calls(desk)
    assert patches == 9 * 4 + 5 * 4
    for number in range(2):
        found = read(desk / f"run/predictions/cells{number}_predictions.h5")
        assert np.abs(found - expected(desk, number)).max() < 1e-5
    done = run_cli([*COMMAND, "--output-dir", "shared"], nproc=2)
    assert done.rc == 0, done.text
    assert calls(desk) - patches <= patches + 8
    assert min(calls(path.parent) and len(path.read_text()) for path in desk.glob("calls-*")) > 20
    for number in range(2):
        name = f"cells{number}_predictions.h5"
        assert np.array_equal(read(desk / "shared" / name), read(desk / "run/predictions" / name))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in inputs} == inputs


def test_killed_and_stopped_predictions_go_on(desk: Path, start_cli: StartCli, run_cli: RunCli) -> None:
    output = desk / "run" / "predictions"

    def interrupted(parts: int, number: signal.Signals) -> int:
        running = start_cli(COMMAND, env={"SLOW": "0.1"})
        end = time.monotonic() + 60
        while len(list(output.glob(".dtrain/*/*/*.npy"))) < parts and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(running.pid, number)
        return running.result(60).rc

    assert interrupted(2, signal.SIGKILL) == -signal.SIGKILL
    first = calls(desk)
    assert interrupted(5, signal.SIGTERM) == 75
    assert not list(output.glob("*.h5"))
    done = run_cli(COMMAND)
    assert done.rc == 0, done.text
    assert calls(desk) < 64 + 2 * 24  # what straddles, what was under way; not everything anew
    assert first < 40
    for number in range(2):
        assert np.abs(read(output / f"cells{number}_predictions.h5") - expected(desk, number)).max() < 1e-5
    assert sorted(path.name for path in (output / ".dtrain").iterdir()) == [
        *("cells0_predictions.h5.json", "cells1_predictions.h5.json", "lock")
    ]
    again = run_cli([*COMMAND, "predictor.blend=constant"])
    assert again.rc == 2
    assert "predictions made otherwise: cells0_predictions.h5 (patches)" in again.stderr
    assert len(again.stderr.splitlines()) == 1


MODEL = "model: {name: Linear, in_features: 1, out_features: 1}\n"


def told(text: str, folder: Path, purpose: str) -> list[str]:
    file = folder / "c.yaml"
    file.write_text(text)
    try:
        check(load_config(file), purpose)
    except ConfigError as error:
        return [str(item.text) for item in error.mistakes]
    return []


@pytest.mark.parametrize(
    ("text", "purpose", "lines"),
    [
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}",
            "predict",
            [],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, test: {}}",
            "predict",
            [],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, train: {}}",
            "predict",
            ["loaders: has no 'predict' and no 'test', so there is nothing to predict"],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}",
            "test",
            [
                "loaders: has no 'test', so there is nothing to test on",
                "loss: missing, such as loss: {name: CrossEntropyLoss}",
            ],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}\n"
            "predictor: {name: StandardPredictor, patch_shap: [1], batch_size: 0, blend: mean}",
            "predict",
            [
                "predictor.batch_size: must be at least 1, found 0",
                "predictor.blend: expected one of 'gaussian', 'constant', found string 'mean'",
                "predictor.patch_shap: predictor got an unexpected argument 'patch_shap'; did you mean 'patch_shape'",
            ],
        ),
    ],
)
def test_what_a_config_must_have_depends_on_its_use(tmp_path: Path, text: str, purpose: str, lines: list[str]) -> None:
    found = sorted(told(text, tmp_path, purpose))
    assert len(found) == len(lines), found
    assert all(one.startswith(line) for one, line in zip(found, lines, strict=True)), found


def test_no_checkpoint_and_weights_that_do_not_fit_are_one_line(desk: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    config = load_config(desk / "predict.yaml")
    with pytest.raises(ConfigError, match="holds no checkpoint; train first, or name one: --checkpoint"):
        create_trainer(config, purpose="predict").predict()
    torch.save(nn.Conv3d(1, 2, 3).state_dict(), desk / "other.pt")
    with pytest.raises(ConfigError, match=r"other.pt does not fit the model: other shape: weight is \(2, 1, 3, 3, 3\)"):
        create_trainer(config, purpose="predict").predict("other.pt")
    with pytest.raises(ConfigError, match="nothing to train on"):
        create_trainer(config, purpose="predict").fit()


def test_a_test_measures_whole_volumes_where_there_is_a_predictor(desk: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    for number in range(2):
        with h5py.File(desk / f"cells{number}.h5", "a") as file:
            file["label"] = (expected(desk, number)[0] > 0.1).astype(np.uint8)
    changes = [
        "loaders.test={file_paths: [cells0.h5, cells1.h5], label_internal_path: label}",
        "loss.name=BCEWithLogitsLoss",
    ]
    changes += ["metrics.name=BinaryIoU"]
    whole = create_trainer(load_config(desk / "predict.yaml", changes), purpose="test").test(desk / "weights.pt")
    both, either = 0, 0
    for number in range(2):
        a, b = expected(desk, number)[0] > 0, expected(desk, number)[0] > 0.1
        both, either = both + (a & b).sum(), either + (a | b).sum()
    assert whole == {"test/BinaryIoU": pytest.approx(both / either, abs=1e-3)}


class Viewer(nn.Conv2d):
    """Cannot bear a layout with its channels last."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(len(x), -1).view(x.shape)


def test_a_model_that_needs_its_own_layout_has_it() -> None:
    model = Viewer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = Forward(model, torch.device("cpu"))
    viewer = Inference(Predictor(), forward, model, Ranks(0, 0, 1, torch.device("cpu")), LineProgress(), Path(), {})
    image = torch.randn(2, 2, 8, 8)
    with torch.inference_mode():
        expected = model(image)
        with viewer.channels_last():
            assert not model.weight.is_contiguous()
            assert torch.equal(viewer.output(image), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.weight.is_contiguous()


# Memory

MEASURE = """
import resource, sys
from pathlib import Path
import h5py, torch
sys.path.insert(0, {tests!r})
from test_predict import predicted
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset
from dtrain.components.datasets.slices import SliceBuilder

def peak(folder, depth):
    with h5py.File(f"{{folder}}.h5", "w") as file:
        file.create_dataset("raw", (depth, 256, 256), "f4", chunks=(16, 64, 64))  # nothing is stored: it reads as zeros
    builder = SliceBuilder([16, 128, 128], [12, 96, 96], [2, 8, 8])
    data = LazyHDF5Dataset([f"{{folder}}.h5"], label_internal_path=None, slice_builder=builder)
    predicted(Path(folder), data, **{keys!r})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

small = peak("small", 48)
print(small, peak("large", 512))
"""


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"save_segmentation": True}, {"instances": "inverted"}])
def test_memory_does_not_grow_with_the_volume(tmp_path: Path, keys: dict[str, Any]) -> None:
    """A volume of 128 MB: what is held is of the size of some patches and planes."""
    script = MEASURE.format(tests=str(REPOSITORY / "tests" / "predict"), keys=keys)
    python_path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert large - small < 48, done.stdout


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_4_gb_are_predicted_in_less_than_1_gb(tmp_path: Path, run_cli: RunCli) -> None:
    with h5py.File(tmp_path / "large.h5", "w") as file:
        raw = file.create_dataset("raw", (1024, 1024, 1024), "f4", chunks=(16, 128, 128))
        for low in range(0, 1024, 16):
            raw[low : low + 16] = random_volume(16, 1024, 1024, seed=low)[0]
    (tmp_path / "slow.py").write_text(SLOW + "\nimport atexit, resource\natexit.register(lambda: print('PEAK', "
                                      "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))\n")  # fmt: skip
    config = CONFIG.format(files="large.h5").replace("[8, 16, 16], stride_shape: [4, 8, 8]",
                                                     "[32, 128, 128], stride_shape: [28, 112, 112]")  # fmt: skip
    (tmp_path / "predict.yaml").write_text(config.replace("slab_planes: 4", "slab_planes: null"))
    torch.save(nn.Conv3d(1, 1, 3, padding=1).state_dict(), tmp_path / "weights.pt")
    done = run_cli(COMMAND, timeout=3000)
    assert done.rc == 0, done.text
    assert int(done.stdout.rpartition("PEAK ")[2].split()[0]) < 1000, done.stdout
