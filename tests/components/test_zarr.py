"""ZarrDataset: plain stores and OME-Zarr of both versions, read chunk by chunk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from predicting import Counted, batches_of, inference, predicted
from torch.utils.data import TensorDataset
from whole_runs import Place, close, equal, figures, last

from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.zarr_store import ZarrDataset, ZarrVolume
from dtrain.components.models.unet import UNet2D
from dtrain.config.errors import ConfigError
from dtrain.predict.formats import FileSpec, write
from dtrain.predict.items import predict_items
from dtrain.predict.predictor import Predictor

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 1000, (2, 12, 20, 24)).astype(np.uint16)  # (C, Z, Y, X)
CELLS = RNG.integers(0, 4, (12, 20, 24)).astype(np.uint8)
MICRO = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]


def plain(path: Path, version: Any = 3, **arrays: np.ndarray) -> Path:
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    for name, values in arrays.items():
        chunks = (*(1,) * (values.ndim - 3), 4, 10, 12)
        group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)[:] = values
    return path


def ome(path: Path, version: Any) -> Path:
    """(T, C, Z, Y, X) of two resolutions and two points in time, with labels, as OME-NGFF 0.4 or 0.5 has it."""
    group = zarr.open_group(str(path), mode="w", zarr_format=version)

    def image(of: Any, levels: list[np.ndarray], axes: list[dict[str, str]], front: int) -> None:
        datasets = []
        for number, values in enumerate(levels):
            chunks = (*(1,) * front, 4, 5, 6)
            of.create_array(f"s{number}", shape=values.shape, chunks=chunks, dtype=values.dtype)[:] = values
            own = [1.0] * front + [2.0, 0.5 * 2**number, 0.5 * 2**number]
            shift = [0.0] * (front + 1) + [0.25 * number] * 2
            changes = [{"type": "scale", "scale": own}, {"type": "translation", "translation": shift}]
            datasets.append({"path": f"s{number}", "coordinateTransformations": changes})
        content = {"axes": axes, "datasets": datasets}
        if version == 2:
            of.attrs["multiscales"] = [{"version": "0.4", **content}]
        else:
            of.attrs["ome"] = {"version": "0.5", "multiscales": [content]}

    both = np.stack([IMAGE, IMAGE[::-1]])
    tc = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    image(group, [both, both[..., ::2, ::2]], tc + MICRO, 2)
    image(group.create_group("labels").create_group("cells"), [CELLS, CELLS[:, ::2, ::2]], MICRO, 0)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_plain_stores(version: int, tmp_path: Path) -> None:
    one = plain(tmp_path / "one.zarr", version, raw=IMAGE, label=CELLS, weight=CELLS / np.float32(4))
    builder = SliceBuilder([4, 10, 12], [3, 5, 6])
    data = ZarrDataset(str(tmp_path), "raw", "label", "weight", slice_builder=builder, num_classes=4)
    assert [volume.name for volume in data.volumes] == ["one"]
    assert data.files == (one.resolve(),)
    assert len(data) == 4 * 3 * 3  # starts 0, 3, 6, 8; 0, 5, 10; 0, 6, 12
    image, (label, weight) = data[3 * 9 + 3 + 1]
    region = (slice(8, 12), slice(5, 15), slice(6, 18))
    assert np.array_equal(image.numpy(), IMAGE[(slice(None), *region)].astype(np.float32))
    assert (label.dtype, image.dtype) == (torch.int64, torch.float32)
    assert np.array_equal(label.numpy(), CELLS[region])
    assert np.array_equal(weight.numpy(), CELLS[region] / np.float32(4))
    outside = data.sample(0, (slice(-2, 2), slice(0, 3), slice(0, 3)))
    assert np.array_equal(outside["image"], IMAGE[:, [2, 1, 0, 1], :3, :3])  # reflected
    loaded = ZarrDataset(str(one), "raw", "label", slice_builder=builder, in_memory=True)
    assert torch.equal(loaded[5][0], data[5][0])


def test_a_store_that_is_one_array_and_several_as_channels(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "a.zarr"), shape=CELLS.shape, chunks=(4, 5, 6), dtype="uint8")[:] = CELLS
    assert np.array_equal(ZarrDataset(str(tmp_path / "a.zarr"))[0].numpy(), CELLS[None].astype(np.float32))
    plain(tmp_path / "b.zarr", red=IMAGE[0], green=IMAGE[1])
    both = ZarrDataset(str(tmp_path / "b.zarr"), ["red", "green"])[0]
    assert np.array_equal(both.numpy(), IMAGE.astype(np.float32))


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(version: int, tmp_path: Path) -> None:
    ome(tmp_path / "scan.ome.zarr", version)
    options: dict[str, Any] = {"label_internal_path": "labels/cells", "timepoint": 1}
    full = ZarrDataset(str(tmp_path), **options)
    half = ZarrDataset(str(tmp_path), level="s1", **options)
    assert full.volumes[0].name == "scan"
    image, label = full[0]
    assert np.array_equal(image.numpy(), IMAGE[::-1].astype(np.float32))
    assert np.array_equal(label.numpy(), CELLS)
    image, label = half[0]
    assert np.array_equal(image.numpy(), IMAGE[::-1, :, ::2, ::2].astype(np.float32))
    assert np.array_equal(label.numpy(), CELLS[:, ::2, ::2])
    assert torch.equal(ZarrDataset(str(tmp_path), level=1, **options)[0][0], image)
    volume: Any = half.volumes[0]
    assert [axis["scale"] for axis in volume.space] == [2.0, 1.0, 1.0]
    # A voxel's z, y, x become millimetres of z, y, x: the world's third, second and first axis.
    assert np.allclose(volume.affine @ [3, 2, 1, 1], [(1 * 1 + 0.25) / 1e3, (2 * 1 + 0.25) / 1e3, 3 * 2 / 1e3, 1])


def test_only_the_chunks_that_a_patch_touches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ome(tmp_path / "scan.ome.zarr", 3)
    data = ZarrDataset(str(tmp_path), None, "labels/cells", timepoint=0, slice_builder=SliceBuilder([4, 5, 12]))
    read: list[str] = []
    get = zarr.storage.LocalStore.get

    async def counted(self: Any, key: str, *more: Any, **options: Any) -> Any:
        read.append(key)
        return await get(self, key, *more, **options)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
    assert len(data) == 3 * 4 * 2
    data[0]
    chunks = [key for key in read if "/c/" in key or key.startswith("c/")]
    # Chunks of (1, 1, 4, 5, 6): two channels times two along x, and two of the label.
    assert len(chunks) == len(set(chunks)) == 4 + 2
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    data[5]
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))


def test_a_fork_reads_what_its_parent_has_read(tmp_path: Path) -> None:
    plain(tmp_path / "a.zarr", raw=IMAGE)
    volume = ZarrVolume(tmp_path / "a.zarr")
    region = (slice(1, 3), slice(0, 4), slice(2, 9))
    expected = volume.read(region)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, volume.read(region).tobytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == expected.tobytes()
    os.waitpid(child, 0)


def test_mistakes(tmp_path: Path) -> None:
    one = plain(tmp_path / "one.zarr", raw=IMAGE, small=CELLS[:3], nan=np.full((4, 4, 4), np.nan))
    scan = ome(tmp_path / "scan.zarr", 3)
    (tmp_path / "no.zarr").mkdir()

    def refusal(*arguments: Any, **options: Any) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            ZarrDataset(*map(str, arguments), **options)[0]
        return str(error.value)

    found = refusal(one, "cells")
    assert "one.zarr has no array 'cells'; there are: " in found
    assert "raw (2, 12, 20, 24)" in found
    assert "array 'small' has the shape (3, 20, 24), 'raw' the extent (12, 20, 24)" in refusal(one, "raw", "small")
    assert "array 'nan' holds nan at (0, 0, 0)" in refusal(one, "nan")
    assert refusal(scan).startswith("timepoint is not given") and "possible: 0 to 1" in refusal(scan)
    assert "level is 2, which" in refusal(scan, level=2, timepoint=0)
    assert "possible: 0 to 1, or by name s0, s1" in refusal(scan, level=2, timepoint=0)
    assert "there is no file or folder" in refusal(tmp_path / "none.zarr")
    assert "no Zarr store in the folder" in refusal(tmp_path / "no.zarr")


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_is_read_back(version: int, compression: str | None, tmp_path: Path) -> None:
    source = plain(tmp_path / "source.zarr", version, raw=CELLS)
    values = RNG.random((3, 37, 30, 300), dtype=np.float32)

    def chunks() -> Any:
        for low in range(0, 37, 5):
            yield np.swapaxes(values[:, low : low + 5], 0, 1)

    space = [{"name": "z", "unit": "micrometer", "scale": 2.0, "translation": 3.0}]
    space += [{"name": name, "unit": "micrometer", "scale": 0.5} for name in "yx"]
    spec = FileSpec(tmp_path / "p", (37, 30, 300), True, compression=compression, source=source, space=space)
    write(tmp_path / "p.ome.zarr", "ome-zarr", chunks(), spec)
    write(tmp_path / "p.zarr", "zarr", chunks(), spec)
    for store, name in ((tmp_path / "p.ome.zarr", "0"), (tmp_path / "p.zarr", "predictions")):
        found: Any = zarr.open(str(store), mode="r")
        assert found.metadata.zarr_format == version
        assert np.array_equal(found[name][:], values)
        assert found[name].chunks == (1, 16, 30, 256)
    group: Any = zarr.open(str(tmp_path / "p.ome.zarr"), mode="r")
    image = (group.attrs if version == 2 else group.attrs["ome"])["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["c", "z", "y", "x"]
    assert [axis.get("unit") for axis in image["axes"]] == [None, *["micrometer"] * 3]
    assert image["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 2.0, 0.5, 0.5]},
        {"type": "translation", "translation": [0.0, 3.0, 0.0, 0.0]},
    ]
    back: Any = ZarrVolume(tmp_path / "p.ome.zarr")
    assert [axis["scale"] for axis in back.space] == [2.0, 0.5, 0.5]


def test_predictions_are_stores_whole_or_not_at_all(tmp_path: Path) -> None:
    ome(tmp_path / "in" / "scan.ome.zarr", 2)
    data = ZarrDataset(str(tmp_path / "in"), timepoint=0, level=1, slice_builder=SliceBuilder([4, 5, 6]))
    folder, kept = tmp_path / "out", tmp_path / "out" / "scan_predictions.ome.zarr"

    def fails(images: torch.Tensor) -> torch.Tensor:
        if images.max() >= data[8][0].max():
            raise KeyError("not this one")
        return images

    with pytest.raises(KeyError):
        predicted(folder, data, fails, slab_planes=12)
    assert [path.name for path in folder.iterdir()] == [".dtrain"]
    predicted(folder, data)
    found: Any = zarr.open(str(kept), mode="r")
    assert np.array_equal(found["0"][:], IMAGE[..., ::2, ::2].astype(np.float32))
    assert found.attrs["multiscales"][0]["version"] == "0.4"
    changes = found.attrs["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert changes[0]["scale"] == [1.0, 2.0, 1.0, 1.0]
    again = Counted()
    assert predicted(folder, data, again).made == 0
    assert again.patches == 0
    next(path for path in kept.rglob("*") if path.is_file() and path.name.isdigit()).write_bytes(b"less")
    with pytest.raises(ConfigError, match=r"scan_predictions\.ome\.zarr \(of unknown origin\)"):
        predicted(folder, data)
    predicted(folder, data, lambda images: 2 * images, overwrite=True)
    found = zarr.open(str(kept), mode="r")
    assert np.array_equal(found["0"][:], 2 * IMAGE[..., ::2, ::2].astype(np.float32))
    assert sorted(path.name for path in folder.iterdir()) == [".dtrain", kept.name]


def test_items_of_a_dataset_without_volumes(tmp_path: Path) -> None:
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    source = inference(Predictor(activation="none", format="zarr"))
    predict_items(source, batches_of(TensorDataset(rows)), tmp_path, False)
    found: Any = zarr.open(str(tmp_path / "predictions.zarr"), mode="r")
    assert np.array_equal(found["predictions"][:], rows.numpy())


@pytest.mark.slow
def test_a_2d_network_on_slices_of_stores(place: Place) -> None:
    for name in ("a", "b"):
        ome(place.folder / "stores" / f"{name}.ome.zarr", 3)
    shared = {
        "name": "ZarrDataset",
        "timepoint": 0,
        "label_internal_path": "labels/cells",
        "axis": "z",
        "batch_size": 2,
    }
    first, second = (str(place.folder / "stores" / f"{name}.ome.zarr") for name in ("a", "b"))
    builder = {"name": "SliceBuilder", "patch_shape": [16, 16], "stride_shape": [4, 8]}
    own = {"batch_size": 2, "num_workers": 2, "slice_builder": builder}
    config = place.config(
        "zarr-slices",
        model={"name": "UNet2D", "in_channels": 2, "out_channels": 4, "f_maps": 8, "num_levels": 2},
        loaders=shared | own | {"train": {"file_paths": first}, "val": {"file_paths": second}},
        metrics=None,
        trainer={"max_steps": 8, "checkpoint_dir": "run-zarr-slices", "log_every_steps": 1},
        predictor={"activation": "softmax"},
    )
    place.run(config)
    place.run(config, "trainer.checkpoint_dir=run-zarr-halves", "trainer.max_steps=3")
    place.run(config, "trainer.checkpoint_dir=run-zarr-halves")
    whole = last(place.path("zarr-slices")).weights
    assert equal(whole, last(place.path("zarr-halves")).weights)
    place.run(config, "trainer.checkpoint_dir=run-zarr-two", "loaders.batch_size=1", ranks=2)
    close(figures(place.path("zarr-two")), figures(place.path("zarr-slices")))

    data = [f"loaders.predict={{file_paths: {second}, label_internal_path: null}}"]
    place.run("predict", config, "--checkpoint", "run-zarr-slices/checkpoints/last", *data, ranks=2)
    found: Any = zarr.open(str(place.path("zarr-slices") / "predictions/b_predictions.ome.zarr"), mode="r")
    assert found["0"].shape == (4, 12, 20, 24)
    scale = found.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == [1.0, 2.0, 0.5, 0.5]
    model = UNet2D(2, 4, f_maps=8, num_levels=2)
    model.load_state_dict(whole)
    model.eval()
    with torch.no_grad():  # rows 0 to 3, columns 0 to 7 are in the first patch of a slice alone
        images = torch.from_numpy(IMAGE[:, 5, :16, :16].astype(np.float32))
        expected = model(images[None])[0].softmax(0)[:, :4, :8].numpy()
    assert np.abs(found["0"][:, 5, :4, :8] - expected).max() < 1e-5
