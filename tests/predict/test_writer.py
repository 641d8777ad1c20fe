"""Ranks, slabs and interruptions change no bit, and files are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import (
    Counted,
    convolutions,
    dataset_of,
    predicted,
    predicted_by,
    random_volume,
    read,
)

from dtrain.config.errors import ConfigError
from dtrain.distributed.ranks import Ranks
from dtrain.predict.work_folder import PredictionError, opened, read_parts, write_part
from dtrain.predict.writer import cut


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


def test_a_stopped_prediction_continues_where_it_was(tmp_path: Path) -> None:
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
    ("change", "difference"),
    [({"weights": "b"}, "weights"), ({"threshold": 0.7}, "what is kept"), ({"dtype": "float16"}, "file")],
)
def test_what_was_made_otherwise_is_overwritten_on_demand_only(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    data = dataset_of(random_volume(6, 6, 6))
    predicted(tmp_path, data)
    file = tmp_path / "volume-0_predictions.h5"
    before = file.read_bytes()
    with pytest.raises(
        ConfigError, match=rf"holds predictions made differently: volume-0_predictions.h5 \({difference}\)"
    ):
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
