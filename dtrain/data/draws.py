"""Whether anything was drawn from the CPU generators: their states are read where they lie in memory.

Python's and NumPy's own functions for it take 30 and 100 microseconds, which is a tenth of a step of one millisecond.
"""

import ctypes
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_Words = ctypes.c_uint32 * 625  # a Mersenne twister's 624 words, and how many of them are used up


def _python_words() -> Any:
    """CPython's own, which follow an object's header, the number first; None where they do not lie there."""
    if sys.implementation.name != "cpython" or type(random._inst).__basicsize__ < object.__basicsize__ + 2500:
        return None
    words = _Words.from_address(id(random._inst) + object.__basicsize__)
    return words if (*words[1:], words[0]) == random.getstate()[1] else None


def _numpy_words() -> Any:
    """NumPy's, at the address that it names; None where its global generator is another one."""
    bits = np.random.mtrand._rand._bit_generator
    if not isinstance(bits, np.random.MT19937):
        return None
    words = _Words.from_address(bits.ctypes.state_address)
    _, keys, position, *_ = np.random.get_state()
    return words if [*words] == [*keys, position] else None


class Draws:
    """Remembers the states of a moment, tells whether they are the same at a later one, and puts them back."""

    def __init__(self) -> None:
        self._python, self._numpy, self._bits = _python_words(), _numpy_words(), np.random.mtrand._rand._bit_generator
        self._quiet = b""  # NumPy's words at a moment at which it held no normal number that is drawn already

    def remember(self) -> Callable[[], bool]:
        """The states of now; returns what tells whether nothing was drawn since, and else puts them back."""
        torchs, gauss = torch.get_rng_state(), random._inst.gauss_next  # type: ignore[attr-defined]
        pythons = None if self._python is None else bytes(self._python)
        numpys = self._numpy_bytes()
        whole_python = random.getstate() if pythons is None else None
        whole_numpy = np.random.get_state(legacy=False) if numpys is None else None

        def nothing_drawn() -> bool:
            same = torch.get_rng_state().numpy().tobytes() == torchs.numpy().tobytes()  # torch.equal takes 10 us
            if pythons is None:
                same = same and random.getstate() == whole_python
            else:
                same = same and bytes(self._python) == pythons and random._inst.gauss_next == gauss  # type: ignore[attr-defined]
            if numpys is None:
                same = same and _equal(np.random.get_state(legacy=False), whole_numpy)
            else:
                same = same and self._has_its_bits() and bytes(self._numpy) == numpys
            if not same:
                torch.set_rng_state(torchs)
                random.setstate(whole_python or _python_state(pythons, gauss))
                np.random.set_state(whole_numpy or _numpy_state(numpys))
                self._quiet = b""
            return same

        return nothing_drawn

    def _has_its_bits(self) -> bool:
        return np.random.mtrand._rand._bit_generator is self._bits

    def _numpy_bytes(self) -> bytes | None:
        """NumPy's words, where these tell all: no normal number, of which two are drawn at a time, waits beside them.

        As long as the words are the same, none can have begun to wait.
        """
        if self._numpy is None or not self._has_its_bits():
            return None
        words = bytes(self._numpy)
        if words != self._quiet:
            if np.random.get_state()[3]:  # type: ignore[index]
                return None
            self._quiet = words
        return words


def _equal(one: Any, other: Any) -> bool:
    """Of NumPy's states, which hold arrays."""
    return pickle.dumps(one) == pickle.dumps(other)


def _python_state(words: Any, gauss: float | None) -> tuple[Any, ...]:
    position, *rest = np.frombuffer(words, np.uint32).tolist()
    return random.getstate()[0], (*rest, position), gauss


def _numpy_state(words: Any) -> tuple[Any, ...]:
    found = np.frombuffer(words, np.uint32)
    return "MT19937", found[:624], int(found[624]), 0, 0.0
