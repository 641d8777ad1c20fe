"""TiffStackDataset: stacks of every form, mapped or unpacked page by page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.tiff_stack import TiffStackDataset, TiffVolume, _stack

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 1000, (7, 20, 30)).astype(np.uint16)
TWO = RNG.integers(0, 1000, (7, 2, 20, 30)).astype(np.uint16)  # (Z, C, Y, X)
COLOURS = RNG.integers(0, 255, (7, 20, 30, 3)).astype(np.uint8)

FORMS: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray, bool]] = {
    "plain": (STACK, {}, STACK[None], True),
    "packed": (STACK, {"compression": "zlib"}, STACK[None], False),
    "tiled": (STACK, {"compression": "zlib", "tile": (16, 16)}, STACK[None], False),
    "big-endian": (STACK, {"byteorder": ">"}, STACK[None], True),
    "imagej": (STACK, {"imagej": True, "metadata": {"axes": "ZYX"}}, STACK[None], True),
    "imagej-2": (TWO, {"imagej": True, "metadata": {"axes": "ZCYX"}}, TWO.swapaxes(0, 1), True),
    "a.ome": (TWO.swapaxes(0, 1), {"metadata": {"axes": "CZYX"}}, TWO.swapaxes(0, 1), True),
    "b.ome": (TWO, {"metadata": {"axes": "ZCYX"}, "compression": "zlib"}, TWO.swapaxes(0, 1), False),
    "rgb": (COLOURS, {"photometric": "rgb"}, np.moveaxis(COLOURS, -1, 0), True),
    "rgb-packed": (COLOURS, {"photometric": "rgb", "compression": "zlib"}, np.moveaxis(COLOURS, -1, 0), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, tmp_path: Path) -> None:
    values, options, expected, is_mapped = FORMS[form]
    path = tmp_path / f"{form}.tif"
    tifffile.imwrite(path, values, **options)
    before = path.read_bytes(), path.stat().st_mtime_ns
    volume = TiffVolume(path)
    assert (volume.shape, volume.channels) == ((7, 20, 30), len(expected))
    assert (volume._array(str(path)).mapped is not None) == is_mapped
    inner = volume.read((slice(2, 5), slice(3, 17), slice(0, 30)))
    assert inner.dtype == np.float32
    assert np.array_equal(inner, expected[:, 2:5, 3:17])
    outside = volume.read((slice(-1, 2), slice(15, 22), slice(4, 9)))  # reflected
    assert np.array_equal(outside, expected[:, [1, 0, 1]][:, :, [15, 16, 17, 18, 19, 18, 17], 4:9])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_pages_written_one_by_one_are_a_stack(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in STACK:
            file.write(page, contiguous=False)
    assert np.array_equal(TiffStackDataset(str(tmp_path))[0].numpy(), STACK[None].astype(np.float32))


def test_pages_that_a_patch_does_not_touch_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib")
    data = TiffStackDataset(str(tmp_path), slice_builder=SliceBuilder([2, 10, 30]))
    unpacked = []
    asarray = tifffile.TiffPage.asarray
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: unpacked.append(page.index) or asarray(page))
    monkeypatch.setattr(tifffile.TiffFrame, "asarray", lambda page: unpacked.append(page.index) or asarray(page))
    assert np.array_equal(data[2].numpy(), STACK[None, 2:4, :10].astype(np.float32))
    assert np.array_equal(data[3].numpy(), STACK[None, 2:4, 10:].astype(np.float32))
    assert unpacked == [2, 3]


def test_labels_and_mistakes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", STACK, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "a_mask.tif", (STACK % 3).astype(np.uint8), compression="zlib")
    image, label = TiffStackDataset(str(tmp_path), str(tmp_path), "_mask", num_classes=3)[0]
    assert np.array_equal(image.numpy(), STACK[None].astype(np.float32))
    assert np.array_equal(label.numpy(), STACK % 3)
    with pytest.raises(ValueError, match="holds the label 2 at"):
        TiffStackDataset(str(tmp_path), str(tmp_path), "_mask", num_classes=2)[0]
    tifffile.imwrite(tmp_path / "t.tif", STACK, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(ValueError, match=r"t.tif has the shape \(7, 20, 30\) and the axes TYX; expected ZYX"):
        TiffStackDataset(str(tmp_path / "t.tif"))
    assert TiffStackDataset(str(tmp_path / "t.tif"), axes="ZYX").volumes[0].shape == (7, 20, 30)
    (tmp_path / "no.tif").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no\.tif cannot be read as TIFF"):
        TiffStackDataset(str(tmp_path / "no.tif"))
    tifffile.imwrite(tmp_path / "small_mask.tif", STACK[:5].astype(np.uint8))
    (tmp_path / "small.tif").write_bytes((tmp_path / "a.ome.tif").read_bytes())
    with pytest.raises(ValueError, match=r"small_mask\.tif' has the shape \(5, 20, 30\)"):
        TiffStackDataset(str(tmp_path / "small.tif"), str(tmp_path / "small_mask.tif"), "_mask")
    assert _stack.cache_info().maxsize == 64
