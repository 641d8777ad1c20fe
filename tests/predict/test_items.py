"""Items of a dataset without volumes come once and in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import (
    Counted,
    batches_of,
    identity,
    inference,
    on_ranks,
    read,
)

from dtrain.distributed.ranks import Ranks
from dtrain.predict.inference import Result
from dtrain.predict.items import predict_items
from dtrain.predict.predictor import Predictor


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
    def one(ranks: Ranks) -> Result:
        loader = batches_of(data, ranks.rank, world_size)
        return predict_items(inference(Predictor(**keys), model, ranks), loader, folder, False)

    return on_ranks(world_size, one)


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
