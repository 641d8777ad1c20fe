"""DSB2018Dataset on the raw files: one mask file for each nucleus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.components.datasets.nuclei import DSB2018Dataset


def raw(root: Path, name: str, masks: list[np.ndarray] | None, shape: tuple[int, int] = (8, 10)) -> None:
    for folder in ("images", *(["masks"] if masks is not None else [])):
        (root / name / folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 4), np.uint8)
    Image.fromarray(pixels).save(root / name / "images" / f"{name}.png")
    for number, mask in enumerate(masks or []):
        Image.fromarray(mask).save(root / name / "masks" / f"{number:02d}.png")


def blob(rows: slice, columns: slice, shape: tuple[int, int] = (8, 10)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[rows, columns] = 255
    return mask


def test_masks_are_put_together(tmp_path: Path) -> None:
    raw(tmp_path, "b", [blob(slice(0, 2), slice(0, 3)), blob(slice(1, 4), slice(2, 5))])
    raw(tmp_path, "a", [])
    with_alpha = np.dstack([blob(slice(5, 7), slice(5, 8))] * 3 + [np.full((8, 10), 255, np.uint8)])
    raw(tmp_path, "c", [with_alpha])
    data = DSB2018Dataset(str(tmp_path), color="rgb")
    assert [volume.name for volume in data.volumes] == ["a", "b", "c"]
    assert data[0][0].shape == (3, 8, 10)
    assert not data[0][1].any()  # an image without any nucleus
    expected = np.zeros((8, 10), np.int64)
    expected[0:2, 0:3] = 1
    expected[1:4, 2:5] = 2  # the later one's where they overlap
    assert data[1][1].dtype == torch.int64
    assert np.array_equal(data[1][1].numpy(), expected)
    assert data[2][1].sum() == 6
    foreground = DSB2018Dataset([str(tmp_path / "b")], objects="foreground", in_memory=False, num_classes=2)
    assert np.array_equal(foreground[0][1].numpy(), expected > 0)
    assert len(foreground.files) == 3


def test_mistakes(tmp_path: Path) -> None:
    raw(tmp_path, "a", [blob(slice(0, 2), slice(0, 3), (8, 9))])
    with pytest.raises(ValueError, match=r"has the extent \(8, 10\), its mask .*00\.png \(8, 9\)"):
        DSB2018Dataset(str(tmp_path))
    raw(tmp_path / "test", "x", None)
    assert DSB2018Dataset(str(tmp_path / "test"))[0].shape == (4, 8, 10)
    raw(tmp_path / "test", "y", [])
    with pytest.raises(FileNotFoundError, match="lacks the folder 'masks'"):
        DSB2018Dataset(str(tmp_path / "test"))
    with pytest.raises(ValueError, match="objects is 'both'; possible: instances, foreground"):
        DSB2018Dataset(str(tmp_path / "test" / "y"), objects="both")  # type: ignore[arg-type]
