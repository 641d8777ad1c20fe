"""This process's random number generators: seed, save, restore, and one sample's own seed."""

import contextlib
import functools
import random
import sys
from collections.abc import Iterator
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
    draws.cache_clear()  # what it knows of NumPy's holds as long as numbers are only drawn
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Leave the CPU generators as they were, whatever is drawn inside."""
    before, of_monai = _cpu_state(), seed_of_monai()
    try:
        yield
    finally:
        _set_cpu_state(before)
        set_seed_of_monai(of_monai)


@functools.cache
def draws() -> Draws:
    """What tells whether numbers were drawn from the CPU generators, in this process."""
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
    set_seed_of_monai(own % 2**32)
    return own


def has_monai() -> bool:
    """Whether MONAI is imported, whose transforms take their seed from a variable."""
    return "monai.utils.misc" in sys.modules


def seed_of_monai() -> int | None:
    """What MONAI's Compose seeds its transforms with; None where it is not imported."""
    return getattr(sys.modules.get("monai.utils.misc"), "_seed", None)


def set_seed_of_monai(seed: int | None) -> None:
    """What MONAI's Compose seeds its transforms with, anew whenever it is asked for its length or truth.

    So `if self.transform:` in an item would, without it, have the operating system choose the numbers.
    """
    if (misc := sys.modules.get("monai.utils.misc")) is not None:
        misc._seed = seed  # type: ignore[attr-defined]


def _seed_python_and_numpy(entropy: tuple[int, ...]) -> int:
    """Returns the seed for torch."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    return int(words[2]) << 32 | int(words[3])
