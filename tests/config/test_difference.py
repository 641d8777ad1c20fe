"""In what two configs describe different trainings: what the number of ranks alone makes of a batch."""

from typing import Any

import pytest

from dtrain.config.difference import changes
from dtrain.config.load import from_mapping


def config(**loaders: Any) -> Any:
    return from_mapping(
        {
            "model": {"name": "torch.nn.Linear", "in_features": 1, "out_features": 1},
            "loaders": {"name": "Digits", "train": {}, **loaders},
            "loss": {"name": "MSELoss"},
            "optimizer": {"name": "SGD", "lr": 0.1},
            "trainer": {"max_epochs": 1},
        }
    )


@pytest.mark.parametrize(
    ("before", "ranks_before", "after", "ranks_after", "lines"),
    [
        ({"batch_size": 4}, 1, {"batch_size": 4}, 2, ["global_batch_size: 4 -> 8"]),
        ({"global_batch_size": 4}, 1, {"global_batch_size": 4}, 2, []),
        ({"batch_size": 4}, 1, {"batch_size": 2}, 2, ["loaders.batch_size: 4 -> 2"]),
    ],
)
def test_what_the_number_of_ranks_makes_of_a_batch_is_told_and_stops_nothing(
    before: dict[str, Any], ranks_before: int, after: dict[str, Any], ranks_after: int, lines: list[str]
) -> None:
    found = changes(config(**before), config(**after), ranks_before, ranks_after)
    assert [str(change) for change in found] == lines
    assert all(change.is_free for change in found)


def test_another_batch_size_is_another_training() -> None:
    (change,) = changes(config(batch_size=4), config(batch_size=2), 1, 1)
    assert str(change) == "loaders.batch_size: 4 -> 2" and not change.is_free
