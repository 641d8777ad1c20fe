"""This process's random number generators: seed, save, restore, and one sample's own seed."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dtrain.data.draws import Draws


def seed_all(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) from one sequence of non-negative integers."""
    torch.manual_seed(_seed_python_and_numpy(entropy))


def get_state() -> dict[str, Any]:
    """The state of all generators in plain types and tensors, as a checkpoint may hold them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        **torch_state(),
    }


def torch_state() -> dict[str, torch.Tensor | None]:
    """Torch's part of `get_state`, which is what a model draws from: 3 microseconds."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    version, internal, next_gauss = state["python"]
    name, keys, *others = state["numpy"]
    numpy_state = (name, np.array(keys, dtype=np.uint32), *others)
    _set_cpu_state(((version, tuple(internal), next_gauss), numpy_state, state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _cpu_state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_cpu_state(state: tuple[Any, Any, torch.Tensor]) -> None:
    _draws.cache_clear()  # what it knows of NumPy's holds as long as numbers are only drawn
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Leave the CPU generators as they were, whatever is drawn inside."""
    before = _cpu_state()
    try:
        yield
    finally:
        _set_cpu_state(before)


def without_drawing(make: Callable[[], Any]) -> tuple[bool, Any]:
    """Call `make`. True and its result if it drew from no CPU generator, else False, and the generators as before."""
    nothing_drawn = _draws().remember()
    result = make()
    return (True, result) if nothing_drawn() else (False, None)


@functools.cache
def _draws() -> Draws:
    return Draws()


def seed_sample(seed: int, epoch: int, *index: int) -> int:
    """Seed the CPU generators for one sample, so that its augmentation depends on these numbers alone.

    `index` is the sample's; where it may come more than once in an epoch, its position in the epoch follows.

    Returns:
        Torch's seed, of 64 bits, for other generators to follow.
    """
    own = _seed_python_and_numpy((seed, epoch, *index))
    # Not torch.manual_seed: it would reseed the accelerator's generator, too, which dropout draws from.
    torch.default_generator.manual_seed(own)
    return own


def _seed_python_and_numpy(entropy: tuple[int, ...]) -> int:
    """Returns the seed for torch."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    return int(words[2]) << 32 | int(words[3])
