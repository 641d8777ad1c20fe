"""Test-time mirroring: the mean over all mirror images, for volumes, images, and items without volumes."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import batches_of, convolutions, dataset_of, inference, loader_of, predicted, random_volume, read
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.predict.items import predict_items
from dtrain.predict.mirror import mirrored
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import logits


def by_hand(model: Any, image: np.ndarray, axes: list[int]) -> np.ndarray:
    """The mean of logits over all mirror images of a whole image (C, *spatial), with numpy's flip."""
    outputs = []
    for choice in product([False, True], repeat=len(axes)):
        flipped = [axis + 1 for axis, is_flipped in zip(axes, choice, strict=True) if is_flipped]
        with torch.no_grad():
            output = model(torch.from_numpy(np.flip(image, flipped).copy())[None])[0].numpy()
        outputs.append(np.flip(output, flipped))
    assert len(outputs) == 2 ** len(axes)
    return np.mean(outputs, axis=0)


@pytest.mark.parametrize(("shape", "axes"), [((6, 7, 8), [0, 1, 2]), ((6, 7, 8), [1]), ((9, 8), [1, 0])])
def test_the_mean_of_logits_over_all_mirror_images(tmp_path: Path, shape: tuple[int, ...], axes: list[int]) -> None:
    model, image = convolutions(dims=len(shape)), random_volume(*shape)
    predicted(tmp_path, dataset_of(image), model, mirror=axes, activation="softmax")
    found = read(tmp_path / "volume-0_predictions.h5")
    mean = by_hand(model, image, axes)
    expected = np.exp(mean) / np.exp(mean).sum(0)
    assert np.abs(found - expected).max() < 1e-6
    with torch.no_grad():
        plain = model(torch.from_numpy(image)[None]).softmax(1)[0].numpy()
    assert np.abs(expected - plain).max() > 1e-3, "the model does not know mirror images"
    whole = next(
        logits(inference(Predictor(mirror=axes), model), loader_of(dataset_of(image, label=lambda x: x[0] > 0)))
    )
    assert np.abs(whole[1][0].numpy() - mean).max() < 1e-6, "a test of whole volumes, too"


def test_patches_with_halos_are_mirrored_each_for_itself(tmp_path: Path) -> None:
    model, image = convolutions(), random_volume(12, 10, 8)
    data = dataset_of(image, patch=[6, 5, 8], stride=[6, 5, 8], halo=[2, 2, 2])
    predicted(tmp_path, data, model, mirror=[0, 1, 2])
    around = np.pad(image, [(0, 0), (2, 2), (2, 2), (2, 2)], mode="reflect")
    expected = np.zeros((2, 12, 10, 8), np.float32)
    for z, y in product((0, 6), (0, 5)):
        patch = around[:, z : z + 10, y : y + 9]
        expected[:, z : z + 6, y : y + 5] = by_hand(model, patch, [0, 1, 2])[:, 2:-2, 2:-2, 2:-2]
    assert np.abs(read(tmp_path / "volume-0_predictions.h5") - expected).max() < 1e-6


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = convolutions(1, dims=2), convolutions(2, dims=2, out=3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "other": self.other(x)}


def test_of_several_outputs_the_one_that_is_asked_for(tmp_path: Path) -> None:
    from dataclasses import replace

    from dtrain.predict.run import volumes

    model, image = Heads(), random_volume(7, 9)
    surroundings = inference(Predictor(mirror=[0, 1], activation="none"), model)
    surroundings = replace(surroundings, forward=replace(surroundings.forward, output_key="other"))
    volumes(surroundings, dataset_of(image), 2, tmp_path, False)
    expected = by_hand(model.other, image, [0, 1])
    assert np.abs(read(tmp_path / "volume-0_predictions.h5") - expected).max() < 1e-6


def test_items_without_volumes_are_mirrored(tmp_path: Path) -> None:
    images = torch.from_numpy(np.stack([random_volume(6, 6, seed=number) for number in range(5)]))
    torch.manual_seed(0)
    for number, model in enumerate((convolutions(dims=2), nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))):
        loader = batches_of(TensorDataset(images), batch_size=2)
        surroundings = inference(Predictor(mirror=[0, 1], activation="none"), model)
        with torch.no_grad():
            result = predict_items(surroundings, loader, tmp_path / str(number), False)
            # A classifier's output has nothing to mirror back.
            flips = [[], [2], [3], [2, 3]]
            outputs = [model(images.flip(axes)) if axes else model(images) for axes in flips]
            backs = [one.flip(axes) if one.dim() == 4 else one for one, axes in zip(outputs, flips, strict=True)]
        assert np.abs(read(result.files[0]) - torch.stack(backs).mean(0).numpy()).max() < 1e-6


def test_a_file_made_without_it_is_another(tmp_path: Path) -> None:
    data = dataset_of(random_volume(4, 4))
    predicted(tmp_path, data)
    predicted(tmp_path, data)
    with pytest.raises(ConfigError, match="mirror"):
        predicted(tmp_path, data, mirror=[0])


@pytest.mark.parametrize(
    ("mirror", "text"),
    [
        ([0, 0], r"must be different axes, counted from 0 on, such as \[0, 1, 2\], found \[0, 0\]"),
        ([-1], "must be different axes"),
    ],
)
def test_axes_that_are_none_are_refused(mirror: list[int], text: str) -> None:
    with pytest.raises(ConfigError, match=f"predictor.mirror: {text}"):
        Predictor(mirror=mirror)


def test_axes_that_the_data_lack_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predictor.mirror: \[0, 3\]: the axes of volume-0.h5 are 0, 1, 2"):
        predicted(tmp_path, dataset_of(random_volume(4, 4, 4)), mirror=[0, 3])
    with pytest.raises(ConfigError, match=r"predictor.mirror: \[2\]: the images have the axes 0, 1"):
        mirrored(lambda x: x, torch.zeros(1, 1, 4, 4), [2])
    with pytest.raises(ConfigError, match=r"the model's input is a dict of 2"):
        mirrored(lambda x: x, {"a": 1, "b": 2}, [0])
    with pytest.raises(ConfigError, match=r"output \(1, 1, 4\) for images \(1, 1, 4, 4\) cannot be mirrored back"):
        mirrored(lambda x: x[..., 0], torch.zeros(1, 1, 4, 4), [0])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[1, 1]", "must be different axes, counted from 0 on, such as [0, 1, 2], found [1, 1]"),
        ("[-1, 0]", "must be different axes"),
        ("[0, 2]", "must be axes of a patch, which are 0, 1, found [0, 2]"),
        ("true", "expected list[int] or null"),
        ("[0, a]", "expected list[int] or null"),
    ],
)
def test_wrong_axes_are_mistakes_of_the_config_with_their_place(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {name: Conv2d, in_channels: 1, out_channels: 1, kernel_size: 1}\n"
        "loaders: {name: ImageMaskFolder, slice_builder: {name: SliceBuilder, patch_shape: [8, 8]},"
        " predict: {images: x}}\n"
        f"predictor:\n  mirror: {line}\n"
    )
    with pytest.raises(ConfigError) as caught:
        check(load_config(tmp_path / "c.yaml"), "predict")
    (only,) = caught.value.mistakes
    assert only.text.startswith("predictor.mirror") and text in only.text, only.text
    assert str(only.place).endswith("c.yaml:4:3"), only.place
