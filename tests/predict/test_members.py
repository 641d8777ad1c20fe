"""Ensembles and folds: several checkpoints that predict one after another, stopped, resumed and shared by ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import (
    Counted,
    batches_of,
    convolutions,
    dataset_of,
    inference,
    loader_of,
    on_ranks,
    predicted,
    random_volume,
    read,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dtrain.config.errors import ConfigError
from dtrain.predict.items import predict_items
from dtrain.predict.members import Ensemble, Members, checkpoints_of
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import logits, volumes

VOLUMES = [random_volume(depth, 9, 8, seed=depth) for depth in (11, 4, 6)]
PATCHES: dict[str, Any] = {"patch": (4, 5, 5), "stride": (2, 4, 4)}


class Loaded:
    """A model of which a member's weights are loaded."""

    def __init__(self, models: Sequence[Any]) -> None:
        self.models, self.number, self.loads = models, 0, 0

    def load(self, number: int) -> None:
        self.number, self.loads = number, self.loads + 1

    def __call__(self, images: Tensor) -> Tensor:
        return self.models[self.number](images)


MODELS = [convolutions(seed) for seed in range(3)]
WEIGHTS = ["a", "b", "c"]


def by(
    folder: Path, ranks: Any = None, folds: Any = None, stop_after: int | None = None, **keys: Any
) -> tuple[Any, Counted]:
    loaded = Loaded(MODELS)
    model = Counted(loaded, stop_after)
    predictor = Predictor(**{"activation": "softmax", "slab_planes": 3} | keys)
    members = Members(WEIGHTS, loaded.load, folds)
    source = inference(predictor, model, ranks, weights="")
    return volumes(source, dataset_of(*VOLUMES, **PATCHES), 2, folder, False, members), model


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(0))
    return shifted / shifted.sum(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[list[np.ndarray]]:
    """What each member alone gives for each volume, as probabilities by numpy."""
    found = []
    for number, model in enumerate(MODELS):
        folder = tmp_path_factory.mktemp(f"member{number}")
        predicted(folder, dataset_of(*VOLUMES, **PATCHES), model, activation="none")
        found.append([softmax(read(folder / f"volume-{each}_predictions.h5")) for each in range(3)])
    return found


def test_the_mean_of_the_members_files(files: list[list[np.ndarray]], tmp_path: Path) -> None:
    by(tmp_path / "one")
    on_ranks(2, lambda ranks: by(tmp_path / "two", ranks)[0])
    for number in range(3):
        name = f"volume-{number}_predictions.h5"
        mean = np.mean([member[number] for member in files], axis=0)
        assert np.abs(read(tmp_path / "one" / name) - mean).max() < 1e-6
        assert np.array_equal(read(tmp_path / "one" / name), read(tmp_path / "two" / name))
    assert not list(tmp_path.glob("*/.dtrain/*.parts"))


def test_classes_are_those_of_the_mean(files: list[list[np.ndarray]], tmp_path: Path) -> None:
    by(tmp_path, save_segmentation=True)
    for number in range(3):
        mean = np.mean([member[number] for member in files], axis=0)
        assert np.array_equal(read(tmp_path / f"volume-{number}_predictions.h5"), mean.argmax(0))


def test_stopped_and_resumed_with_nothing_done_twice(tmp_path: Path) -> None:
    _, whole = by(tmp_path / "whole")
    patches, starts = 0, 0
    while True:
        result, model = by(tmp_path / "parts", stop_after=25)
        patches, starts = patches + model.patches, starts + 1
        if not result.stopped:
            break
        assert starts < 40
    assert starts > 4
    assert patches < 2 * whole.patches  # batches that were under way, and patches on the border of slabs
    for number in range(3):
        name = f"volume-{number}_predictions.h5"
        assert np.array_equal(read(tmp_path / "parts" / name), read(tmp_path / "whole" / name))
    again, model = by(tmp_path / "parts")
    assert (again.made, model.patches) == (0, 0)


def test_each_volume_by_the_member_of_its_fold(files: list[list[np.ndarray]], tmp_path: Path) -> None:
    _, model = by(tmp_path, folds=[2, 0, 1])
    _, all_three = by(tmp_path / "all")
    assert 3 * model.patches == all_three.patches
    for number, member in enumerate((2, 0, 1)):
        found = read(tmp_path / f"volume-{number}_predictions.h5")
        assert np.abs(found - files[member][number]).max() < 1e-6


def test_other_members_are_told(tmp_path: Path) -> None:
    by(tmp_path)
    loaded = Loaded(MODELS)
    members = Members(["a", "b", "d"], loaded.load)
    source = inference(Predictor(activation="softmax", slab_planes=3), loaded, weights="")
    with pytest.raises(ConfigError, match=r"made differently: volume-0_predictions\.h5 \(weights\)"):
        volumes(source, dataset_of(*VOLUMES, **PATCHES), 2, tmp_path, False, members)


ITEMS = TensorDataset(torch.randn(11, 4, generator=torch.Generator().manual_seed(0)))
LINEARS = [nn.Linear(4, 3) for _ in range(3)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("folds", [None, [0, 1, 2, 0, 1, 2, 2, 2, 1, 0, 0]])
def test_items(folds: list[int] | None, world_size: int, tmp_path: Path) -> None:
    def one(ranks: Any) -> Any:
        loaded = Loaded(LINEARS)
        source = inference(Predictor(activation="softmax"), loaded, ranks, weights="")
        batches = batches_of(ITEMS, ranks.rank, ranks.world_size)
        return predict_items(source, batches, tmp_path, False, Members(WEIGHTS, loaded.load, folds))

    on_ranks(world_size, one)
    with torch.no_grad():
        each = np.stack([softmax(model(ITEMS.tensors[0]).numpy().T).T for model in LINEARS])
    expected = each.mean(0) if folds is None else each[folds, range(11)]
    assert np.abs(read(tmp_path / "predictions.h5") - expected).max() < 1e-6


def test_items_are_resumed_with_the_member_that_was_reached(tmp_path: Path) -> None:
    loads, starts = [], 0
    while True:
        loaded = Loaded(LINEARS)
        model = Counted(loaded, 11 + 4)  # the first member's items, and a batch of the next one's
        source = inference(Predictor(activation="softmax"), model, weights="")
        result = predict_items(source, batches_of(ITEMS), tmp_path, False, Members(WEIGHTS, loaded.load))
        loads.append(loaded.loads)
        starts += 1
        if not result.stopped:
            break
        assert starts < 5
    assert loads == [2, 2, 1]
    with torch.no_grad():
        each = np.stack([softmax(model(ITEMS.tensors[0]).numpy().T).T for model in LINEARS])
    assert np.abs(read(tmp_path / "predictions.h5") - each.mean(0)).max() < 1e-6


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_an_ensemble_gives_the_logits_of_the_mean(activation: Any) -> None:
    states = [{key: value.clone() for key, value in model.state_dict().items()} for model in LINEARS]
    ensemble = Ensemble(nn.Linear(4, 3), states, Predictor(activation=activation))
    images = ITEMS.tensors[0]
    with torch.no_grad():
        outputs = [model(images).double() for model in LINEARS]
        found = ensemble(images).double()
    of = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "none": lambda x: x}[activation]
    assert torch.allclose(of(found), torch.stack([of(output) for output in outputs]).mean(0), atol=1e-6)
    with pytest.raises(ConfigError, match="an ensemble needs one output; the model returns a tuple"):
        Ensemble(Two(), [{}, {}], Predictor())(images)


class Two(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_a_test_of_whole_volumes_measures_the_same(files: list[list[np.ndarray]]) -> None:
    states = [{key: value.clone() for key, value in model.state_dict().items()} for model in MODELS]
    predictor = Predictor(activation="softmax")
    ensemble = Ensemble(convolutions(), states, predictor)
    data = dataset_of(*VOLUMES, label=lambda image: image[0] > 0, **PATCHES)
    for number, output, _ in logits(inference(predictor, ensemble), loader_of(data)):
        mean = np.mean([member[number] for member in files], axis=0)
        assert np.abs(output.softmax(1)[0].numpy() - mean).max() < 1e-6


def test_which_checkpoints_are_meant(tmp_path: Path) -> None:
    for name in ("w1.pt", "w2.pt"):
        torch.save({}, tmp_path / name)
    assert checkpoints_of([tmp_path / "w2.pt", f"{tmp_path}/w?.pt"]) == [
        *(tmp_path / "w2.pt", tmp_path / "w1.pt", tmp_path / "w2.pt")
    ]
    with pytest.raises(ConfigError, match=r"nothing fits the pattern .*x\*"):
        checkpoints_of([f"{tmp_path}/x*"])
    with pytest.raises(ConfigError, match=r"^--checkpoint .*/gone\.pt: there is no such file or folder$"):
        checkpoints_of([tmp_path / "gone.pt"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(ConfigError, match="run/checkpoints holds no checkpoint"):
        checkpoints_of([tmp_path])
