"""NumPy's SeedSequence, whose algorithm no version changes (NEP 19), computed for many samples at once.

All arithmetic is that of 32 bits; a sample is a column.
"""

import numpy as np

MASK = 2**32 - 1
_POOL = 4
_LONGEST = 8  # words that are generated of a pool


def words_of(number: int) -> list[int]:
    """A non-negative integer in words of 32 bits, the lowest first."""
    words = [number & MASK]
    while number := number >> 32:
        words.append(number & MASK)
    return words


def pools(entropy: np.ndarray) -> np.ndarray:
    """SeedSequence.mix_entropy for words of shape (words, samples); shape (4, samples)."""
    pool = np.zeros((_POOL, entropy.shape[1]), np.uint32)
    pool[: len(entropy)] = entropy[:_POOL]
    pool = _hashed(pool, _A[: _POOL + 1])
    used = _POOL
    for source, others in enumerate(_OTHERS):
        pool[others] = _both(pool[others], _hashed(pool[source], _A[used : used + _POOL]))
        used += _POOL - 1
    for more in entropy[_POOL:]:
        pool = _both(pool, _hashed(more, _A[used : used + _POOL + 1]))
        used += _POOL
    return pool


def generated(pool: np.ndarray, count: int) -> np.ndarray:
    """SeedSequence.generate_state(count) for pools of shape (4, samples), of at most 8 words; (count, samples)."""
    return _hashed(pool[[word % _POOL for word in range(count)]], _B[: count + 1])


def _powers(first: int, factor: int, count: int) -> np.ndarray:
    """first, first * factor, ..., as a column."""
    return np.array([first * pow(factor, power, 2**32) & MASK for power in range(count)], np.uint32)[:, None]


# SeedSequence's own numbers; what it mixes with goes through these, one step further for each word.
_A, _B = _powers(0x43B0D7E5, 0x931E8875, 64), _powers(0x8B51F9DD, 0x58F38DED, _LONGEST + 1)
_LEFT, _RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF = np.uint32(16)
_OTHERS = [[place for place in range(_POOL) if place != source] for source in range(_POOL)]


def _hashed(value: np.ndarray, constants: np.ndarray) -> np.ndarray:
    value = (value ^ constants[:-1]) * constants[1:]
    return value ^ (value >> _HALF)


def _both(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    result: np.ndarray = one * _LEFT - other * _RIGHT
    return result ^ (result >> _HALF)
