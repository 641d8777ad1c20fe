"""What a replay says of the module that fails: what went into it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.training.replay import Step, _described, _examined


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log() if x.shape[1] == 2 else x @ torch.ones(5, 5)


def examined(module: nn.Module, batch: torch.Tensor) -> tuple[list[str], list[str]]:
    state: Any = SimpleNamespace(clear=lambda: None, sums={"loss": torch.tensor(0.0)})
    step = Step(lambda micro: module(micro.batch).sum().backward(), state, SimpleNamespace(module=module))  # type: ignore[arg-type]
    failed: list[str] = []
    try:
        return _examined(step, batch, [7, 8], failed)[0], failed
    except RuntimeError:
        return [], failed


def test_a_module_that_raises_is_named_with_what_went_into_it() -> None:
    module = nn.Sequential(nn.Identity(), Picky())
    batch = torch.tensor([[1.0, -2.5, 3.0], [0.0, 0.5, 4.25]])
    expected = "float32 [2, 3] from -2.5 to 4.25"
    assert examined(module, batch) == (
        [],
        [f"into 1 (Picky) went {expected}", f"into the model (Sequential) went {expected}"],
    )


def test_a_bad_output_is_told_with_its_inputs() -> None:
    found, failed = examined(nn.Sequential(Picky(), nn.Linear(2, 1)), torch.tensor([[1.0, -1.0], [2.0, 3.0]]))
    assert failed == []
    assert "first bad output: 0 (Picky); its input was finite: float32 [2, 2] from -1 to 3" in found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([1.0, float("nan"), 3.0]), "float32 [3] from 1 to 3, 1 not finite"),
        ({"a": torch.arange(4), "b": torch.ones(1, dtype=torch.bool)}, "int64 [4] from 0 to 3; bool [1] from 1 to 1"),
        (torch.zeros(0, 2), "float32 [0, 2]"),
        (torch.zeros(1, dtype=torch.complex64), "complex64 [1]"),
        (3, "no tensors"),
    ],
)
def test_tensors_in_words(value: Any, text: str) -> None:
    assert _described(value) == text
