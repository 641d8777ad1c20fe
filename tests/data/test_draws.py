"""Whether a sample has drawn, told by where the generators lie in memory."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.data import rng


@pytest.fixture(autouse=True)
def _generators_of_before() -> Iterator[None]:
    with rng.untouched():
        yield


def whole_state() -> Any:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


def nothing() -> None:
    pass


def without_drawing(make: Callable[[], Any], are_marks_known: bool = False) -> tuple[bool, Any]:
    """What `make` gives and True where it drew nothing; else the generators as before."""
    draws = rng.draws()
    marks = draws.marks()
    if marks != draws.known:
        draws.read_states(marks)
    states, result = draws.states, make()
    assert any(draws.moved(marks)) == (draws.marks(marks) != marks) == (draws.marks() != marks)
    if draws.marks() == marks:
        return True, result
    draws.put_back(states, *([marks] if are_marks_known else []))
    return False, None


DRAWS: list[Callable[[], Any]] = [
    random.random, lambda: random.gauss(0, 1), lambda: random.shuffle([1, 2, 3]), lambda: random.getrandbits(32),
    lambda: [random.getrandbits(32) for _ in range(624)],  # to the very place where they began
    np.random.rand, np.random.randn, lambda: np.random.permutation(3), lambda: np.random.randint(2),
    lambda: np.random.bytes(4 * 624), lambda: np.random.seed(3), lambda: random.seed(3),
    lambda: torch.rand(1), lambda: torch.randn(()), lambda: torch.randperm(3), lambda: torch.manual_seed(3),
]  # fmt: skip


@pytest.mark.parametrize(
    "before", [nothing, np.random.rand, np.random.randn, lambda: random.gauss(0, 1), lambda: torch.randn(())]
)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_is_seen_and_taken_back(draw: Callable[[], Any], before: Callable[[], Any]) -> None:
    """Also where a normal number waits, which was drawn together with the one before."""
    rng.seed_all(5)
    assert without_drawing(lambda: "made") == (True, "made")
    before()
    state = whole_state()
    for are_marks_known in (False, True, True):
        assert without_drawing(lambda: "made") == (True, "made")
        assert without_drawing(draw, are_marks_known) == (False, None)
        assert whole_state() == state


def test_a_normal_number_that_waits_again_after_a_state_was_put_back_is_seen() -> None:
    """NumPy's words are those of a moment at which none did."""
    rng.seed_all(5)
    np.random.randn()
    waiting = rng.get_state()
    np.random.randn()
    assert without_drawing(nothing) == (True, None)
    rng.set_state(waiting)
    assert without_drawing(np.random.randn) == (False, None)
    assert whole_state()[3][1] == 1, "it waits again"


def test_another_generator_of_numpys_is_asked_for_its_state() -> None:
    ours = np.random.get_bit_generator()
    assert without_drawing(nothing) == (True, None)
    np.random.set_bit_generator(np.random.SFC64(1))
    try:
        state = np.random.get_state(legacy=False)
        assert without_drawing(nothing) == (True, None)
        assert without_drawing(np.random.rand) == (False, None)
        assert repr(np.random.get_state(legacy=False)) == repr(state)
    finally:
        np.random.set_bit_generator(ours)
