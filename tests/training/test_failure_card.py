"""What a failure card says of the usual mistakes: the cure, and the parameters' names, also where some were frozen."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Place

pytestmark = pytest.mark.timeout(600)

WRONG = '''
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import MLP, Points


class Wrong(Points):
    """Points whose inputs or targets are not what the model or the loss takes."""

    def __init__(self, size, x="float32", y="int64", shape=(), width=8, uneven=False, seed=0):
        super().__init__(size, seed)
        self.x = self.x[:, :width].to(getattr(torch, x))
        self.y = self.y.clamp(max=1).to(getattr(torch, y)).reshape(-1, *shape)
        self.uneven = uneven

    def __getitem__(self, index):
        return self.x[index][: 3 + index % 4] if self.uneven else self.x[index], self.y[index]


class Apart(MLP):
    def forward(self, x):
        return super().forward(x).detach()


class FrozenLater(nn.Module):
    """Uses its backbone in the first step alone, and freezes its norm after that."""

    def __init__(self):
        super().__init__()
        self.norm, self.backbone, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls <= 1:
            return self.head(self.backbone(self.norm(x)))
        self.norm.requires_grad_(False)
        return self.head(x)


class Reentrant(nn.Module):
    """Recomputes one layer's activations twice, in torch's old way."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        once = checkpoint(self.layer, self.first(x), use_reentrant=True)
        return self.head(checkpoint(self.layer, once, use_reentrant=True))
'''
BCE = {"name": "BCEWithLogitsLoss"}
ONE = {"name": "torch.nn:Linear", "in_features": 8, "out_features": 1}


@pytest.mark.parametrize(
    ("data", "model", "loss", "cure"),
    [
        ({"y": "float64"}, {}, {}, "class labels as integers"),
        ({"shape": [1]}, {}, {}, "target.squeeze(1)"),
        ({"x": "float64"}, {}, {}, "x.float()"),
        ({"width": 7}, {}, {}, "two shapes do not fit"),
        ({"uneven": True}, {}, {}, "loaders.collate_fn"),
        ({"shape": [1]}, ONE, BCE, "target.float()"),
        ({"y": "float32"}, ONE, BCE, "target.unsqueeze(1)"),
        ({"y": "float32"}, ONE, {"name": "MSELoss"}, "target.unsqueeze(1)"),
        ({"y": "float32"}, ONE, {"name": "torch.nn.functional:l1_loss"}, "target.unsqueeze(1)"),
        ({"y": "float32", "shape": [1]}, ONE, {"name": "BCELoss"}, "BCEWithLogitsLoss"),
        ({}, {"name": "Apart"}, {}, "the loss depends on no parameter"),
    ],
)
def test_a_usual_mistake_has_its_cure(
    here: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
    model: dict[str, Any],
    loss: dict[str, Any],
    cure: str,
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    changes = {"loaders": {"name": "Wrong", "batch_size": 4, "train": {"size": 8, **data}}, "metrics": None}
    changes |= {"model": model} if model else {}
    changes |= {"loss": loss} if loss else {}
    with pytest.raises(Exception):  # noqa: B017  (torch's own, of whatever type)
        here("wrong", modules=["wrong", "toy"], **changes)
    failure = json.loads((tmp_path / "run-wrong" / "failure.json").read_text())
    assert cure in failure["cure"], failure["message"]


def test_parameters_have_the_numbers_that_the_wrapper_gave_them(place: Place) -> None:
    place.write("wrong.py", WRONG)
    changes: dict[str, Any] = {"modules": ["wrong", "toy"], "model": {"name": "FrozenLater"}}
    place.run(place.config("frozen", **changes), expect=1, ranks=2)
    failure = json.loads((place.path("frozen") / "failure.json").read_text())
    names = "backbone.bias, backbone.weight, norm.bias, norm.weight"  # as the wrapper numbers them
    found = (
        f"these parameters had no part in the loss: {names}; frozen since the training began: norm.bias, norm.weight"
    )
    assert failure["message"].startswith(f"{found}\n"), failure["message"]
    assert "trainer.ddp.find_unused_parameters=true" in failure["cure"]
    place.run(place.config("twice", **changes | {"model": {"name": "Reentrant"}}), expect=1, ranks=2)
    failure = json.loads((place.path("twice") / "failure.json").read_text())
    assert "had its gradient twice in one backward pass: layer." in failure["message"], failure["message"]
    assert "use_reentrant=False" in failure["cure"] and "static_graph" in failure["cure"]
