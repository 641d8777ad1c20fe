"""What is kept of a prediction: classes, masks, numbered instances, and their agreement with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predicting import (
    dataset_of,
    identity,
    predicted,
    predicted_by,
    random_volume,
    read,
)
from scipy import ndimage

from dtrain.predict.segmentation import Agreement, Choice, instances


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
        found = np.concatenate(list(instances(pieces, connectivity, min_size, tmp_path / "scratch")))
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
