"""This process's random number generators: seed, save, restore, one sample's own; knows no loader, no checkpoint."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_all(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) from one sequence of non-negative integers."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def get_state() -> dict[str, Any]:
    """The state of all generators in plain types and tensors, as a checkpoint may hold them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` returned."""
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Leave the CPU generators as they were, whatever is drawn inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the CPU generators for one sample, so that its augmentation depends on these three numbers alone."""
    words = np.random.SeedSequence((seed, epoch, index)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: it would reseed the accelerator's generator, too, which dropout draws from.
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
