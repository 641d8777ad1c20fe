"""Patches put together give what the whole volume gives, bit for bit where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predicting import (
    convolutions,
    dataset_of,
    grids,
    identity,
    inference,
    predicted,
    random_volume,
    read,
)
from torch import Tensor

from dtrain.config.errors import ConfigError
from dtrain.predict.predictor import Predictor
from dtrain.predict.stitching import Run, stitched


@given(grids(), st.sampled_from(["gaussian", "constant", "last"]), st.integers(1, 5), st.integers(1, 3))
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


@pytest.mark.parametrize("blend", ["gaussian", "constant", "last"])
def test_with_halo_enough_patches_give_what_the_whole_volume_gives(tmp_path: Path, blend: str) -> None:
    model, image = convolutions(), random_volume(20, 24, 28)
    data = dataset_of(image, patch=[8, 10, 12], stride=[6, 10, 7], halo=[2, 2, 2])
    predicted(tmp_path, data, model, blend=blend)
    reflected = np.pad(image, [(0, 0), (2, 2), (2, 2), (2, 2)], mode="reflect")
    with torch.inference_mode():
        whole = model(torch.from_numpy(reflected)[None])[0, :, 2:-2, 2:-2, 2:-2].numpy()
    assert np.abs(read(tmp_path / "volume-0_predictions.h5") - whole).max() < 1e-5


@pytest.mark.parametrize(
    ("blend", "expected"),
    [("constant", [1, 1, 1.5, 1.5, 2.5, 2.5, 3, 3]), ("last", [1, 1, 2, 2, 3, 3, 3, 3])],
)
def test_overlaps_are_averaged_by_weight_or_the_last_one_wins(
    tmp_path: Path, blend: str, expected: list[float]
) -> None:
    """Each patch answers with a number of its own."""
    numbers = iter(range(1, 4))

    def model(images: Tensor) -> Tensor:
        return torch.stack([torch.full_like(image, float(next(numbers))) for image in images])

    data = dataset_of(random_volume(1, 8), patch=[1, 4], stride=[1, 2])
    predicted(tmp_path, data, model, blend=blend)
    assert read(tmp_path / "volume-0_predictions.h5").tolist() == [[expected]]


def test_logits_are_averaged_and_then_activated(tmp_path: Path) -> None:
    numbers = iter([-2.0, 6.0])

    def model(images: Tensor) -> Tensor:
        return torch.stack([torch.full_like(image, next(numbers)) for image in images])

    data = dataset_of(random_volume(1, 6), patch=[1, 4], stride=[1, 2])
    predicted(tmp_path, data, model, blend="constant", activation="sigmoid")
    expected = 1 / (1 + np.exp(-np.array([-2, -2, 2, 2, 6, 6])))  # not (0.12 + 0.998) / 2 in the middle
    assert np.allclose(read(tmp_path / "volume-0_predictions.h5"), expected, atol=1e-6)


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
    with pytest.raises(
        ValueError, match=r"volume-0.h5: the model returned \(1, 1, 3, 3, 3\) for patches \(1, 1, 6, 6, 6\)"
    ):
        predicted(tmp_path, dataset_of(random_volume(6, 6, 6)), lambda x: x[..., ::2, ::2, ::2])
