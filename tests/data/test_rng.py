"""The random number generators: saved, restored, left alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.data import rng


def test_a_restored_state_continues_as_if_nothing_had_been() -> None:
    rng.seed_all(1, 2)
    state = rng.get_state()
    first = torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()
    rng.seed_all(3)
    rng.set_state(state)
    assert (torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()) == first


def test_a_state_with_a_half_used_pair_of_normal_numbers_is_restored() -> None:
    rng.seed_all(1)
    np.random.randn()
    random.gauss(0, 1)
    state = rng.get_state()
    first = np.random.randn(), random.gauss(0, 1)
    rng.set_state(state)
    assert (np.random.randn(), random.gauss(0, 1)) == first


def test_a_state_is_of_plain_types() -> None:
    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        return set().union(*map(kinds, value)) if isinstance(value, list) else {type(value)}

    assert kinds(rng.get_state()) <= {int, float, str, torch.Tensor, type(None)}


def test_what_is_drawn_inside_untouched_is_forgotten_also_after_an_error() -> None:
    rng.seed_all(4)
    expected = torch.rand(()), random.random(), np.random.rand()
    rng.seed_all(4)
    with pytest.raises(ValueError, match="in there"), rng.untouched():
        torch.rand(3), random.random(), np.random.rand()
        raise ValueError("in there")
    assert (torch.rand(()), random.random(), np.random.rand()) == expected
