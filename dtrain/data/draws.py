"""Whether anything was drawn from the CPU generators: their states are read where they lie in memory.

Python's and NumPy's own functions for it take 30 and 100 microseconds, which is a tenth of a step of one millisecond.
"""

import ctypes
import functools
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


@functools.cache
def torch_edges() -> tuple[Any, Any] | None:
    """The bytes before and after torch's words; None where these do not lie at the head of the generator.

    Before them it holds how many are used up, and behind them a normal number that waits.
    """
    if sys.implementation.name != "cpython":
        return None
    address = ctypes.c_void_p.from_address(id(torch.default_generator) + object.__basicsize__).value
    words = torch.get_rng_state()[24 : 24 + 8 * 624].view(torch.int64).numpy().astype(np.uint32).tobytes()
    begin = ctypes.string_at(address, 128 + len(words)).find(words) if address else -1
    if begin < 20:
        return None
    first, end = address + begin, address + begin + len(words)  # type: ignore[operator]
    return (ctypes.c_char * 28).from_address(first - 20), (ctypes.c_char * 32).from_address(end - 4)


class Draws:
    """Tells by marks whether numbers were drawn between two moments, knows the states of the first, and puts them back.

    Compared are marks, which cannot stay as they are when numbers are drawn: how many of the words are used up, and
    some of the words. (The number comes round after 624 of them, but then all words are new.) Whole states are copied
    only where their marks moved since the last time.
    """

    def __init__(self) -> None:
        self._torch, self._python, self._numpy = torch_edges(), _python_words(), _numpy_words()
        self._bits = np.random.mtrand._rand._bit_generator
        self._quiet: Any = None  # NumPy's mark at a moment at which it held no normal number that is drawn already
        self.known: tuple[Any, ...] = (None, None, None)  # marks, and the states that they are of
        self.states: tuple[Any, ...] = (None, None, None)

    def read_states(self, marks: tuple[Any, ...]) -> None:
        """Make `states` those of now, whose marks were just read."""
        known = zip(marks, self.known, self.states, _READERS, strict=True)
        self.states = tuple(state if mark == old else read() for mark, old, state, read in known)
        self.known = marks

    def put_back(self, states: tuple[Any, ...], marks: tuple[Any, ...] = (None, None, None)) -> None:
        """Let the generators continue from there; those that have the marks of then are there."""
        now = self.marks(marks)
        for put, state, mark, of_now in zip(_WRITERS, states, marks, now, strict=True):
            if mark == of_now:
                continue
            if put is _WRITERS[2] and isinstance(mark, tuple) and isinstance(of_now, tuple):
                self._put_words_back(state["state"])
            else:
                put(state)
        self._quiet = marks[2]  # bytes where a normal number waited: unlike any words

    def _put_words_back(self, state: Any) -> None:
        """NumPy's, when no normal number waited: what its `set_state` does, in a tenth of the time."""
        np.random.seed(0)  # lets none wait
        words = np.frombuffer(self._numpy, np.uint32)
        words[:624], words[624] = state["key"], state["pos"]

    def moved(self, since: tuple[Any, ...]) -> list[bool]:
        """Whether each was drawn from since a moment that had these marks."""
        return [mark != was for mark, was in zip(self.marks(since), since, strict=True)]

    def marks(self, since: tuple[Any, ...] = (None, None, None)) -> tuple[Any, ...]:
        """Of torch's generator, Python's and NumPy's; each is the whole state where its place is not known.

        `since` are those of an earlier moment: what is to be compared with these alone is found sooner.
        """
        edges, words = self._torch, self._python
        torchs = edges[0].raw + edges[1].raw if edges else torch.get_rng_state().numpy().tobytes()
        pythons: Any = random._inst.gauss_next if words else random.getstate()  # type: ignore[attr-defined]
        if words:
            pythons = words[0], words[1], words[624], pythons
        numpys = None
        if self._numpy and np.random.mtrand._rand._bit_generator is self._bits:
            words = self._numpy
            numpys = words[0], words[623], words[624]
            # As long as the words are the same, no normal number, of which two are drawn at a time, can begin to wait.
            if numpys != self._quiet and not isinstance(since[2], tuple):
                numpys = None if np.random.get_state()[3] else numpys  # type: ignore[index]
                self._quiet = numpys
        return torchs, pythons, numpys or pickle.dumps(_READERS[2]())


_READERS: tuple[Callable[[], Any], ...] = (
    torch.get_rng_state,
    random.getstate,
    lambda: np.random.get_state(legacy=False),
)
_WRITERS: tuple[Callable[[Any], None], ...] = (torch.set_rng_state, random.setstate, np.random.set_state)
