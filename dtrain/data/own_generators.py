"""The random number generators that a dataset holds: found once per process, seeded for each sample.

What a constructor makes is cloned into every worker: without this all of them would draw the same numbers, and others
than one process draws.
"""

import contextlib
import functools
import random
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

MOST_OBJECTS = 5_000  # that are looked at, numbers and texts included: some ten milliseconds
MOST_ITEMS = 100  # of one container
KINDS = (np.random.RandomState, np.random.Generator, torch.Generator, random.Random)
_CLOSED = (
    *(str, bytes, bytearray, int, float, complex, bool, type(None), range, np.ndarray, np.generic, torch.Tensor),
    *(torch.dtype, torch.device, ModuleType, BuiltinFunctionType, MethodDescriptorType, property),
)  # what holds no generator


def generators_in(**roots: Any) -> dict[str, Any]:
    """The generators that some objects hold, by where they are: dataset.transforms[0].rng.

    Looked at are attributes (a class's own, too), the items of containers, what functions and partials have bound, and
    the variables of the modules of all these classes and functions; breadth first, so that bounds cut off what is far.
    The names do not depend on the order in which attributes were made. What says `seeds_itself = True` is left alone.
    """
    waiting = deque(roots.items())
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for _ in range(MOST_OBJECTS):
        if not waiting:
            break
        name, value = waiting.popleft()
        if isinstance(value, _CLOSED) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, KINDS):
            if not _is_shared(value):
                found[name] = value
            continue
        with contextlib.suppress(Exception):  # what cannot be looked at is nothing to fail for
            if getattr(value, "seeds_itself", None) is not True:
                waiting.extend((f"{name}{part}", item) for part, item in _parts(value))
    return found


def seed_generator(generator: Any, name: str, seed: int) -> None:
    """Seed one of them, in place, from a seed of 64 bits; another name gives other numbers."""
    own = (seed + zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15) % 2**64
    if isinstance(generator, torch.Generator):
        generator.manual_seed(own)
    elif isinstance(generator, random.Random):
        generator.seed(own)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(own).state
    elif isinstance(bits := generator._bit_generator, np.random.MT19937):
        generator.seed(own % 2**32)
    else:
        generator.set_state(np.random.RandomState(type(bits)(own)).get_state(legacy=False))


def _is_shared(generator: Any) -> bool:
    """Whether it is one of those that every sample has seeded anyway, or one that no seed changes."""
    shared = (np.random.mtrand._rand, random._inst, torch.default_generator)
    return generator in shared or isinstance(generator, random.SystemRandom)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with how it is reached."""
    if isinstance(value, type):
        yield from ((name, item) for name, item in _variables(vars(value)) if not isinstance(item, FunctionType))
        yield from _module_variables(value.__module__)
        return
    yield from _items(value)
    if type(value) in (dict, list, tuple):
        return
    yield from _slots(value)
    yield from _variables(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__[:-1]:
        if kind.__module__ != "builtins":
            yield f".{kind.__name__}", kind


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a partial, a method or a function holds."""
    if isinstance(value, dict):  # not any mapping: one may be a file, and read what is asked of it
        for (key, item), _ in zip(dict.items(value), range(MOST_ITEMS), strict=False):
            yield f"[{key!r}]", item
    elif isinstance(value, list | tuple | deque):
        for number, item in zip(range(MOST_ITEMS), value, strict=False):
            yield f"[{number}]", item
    elif isinstance(value, functools.partial):
        yield from (("", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((".__self__", value.__self__), ("", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value)


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    yield from _module_variables(function.__module__)


def _variables(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """By name: workers may make attributes in different orders."""
    yield from ((f".{name}", names[name]) for name in sorted(names, key=str))


def _module_variables(module: str | None) -> Iterator[tuple[str, Any]]:
    """A module's own generators; its other variables belong to whoever imports them."""
    names = vars(sys.modules[module]) if module in sys.modules else {}
    yield from ((name, item) for name, item in _variables(dict(names)) if isinstance(item, KINDS))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield f".{name}", getattr(value, name)
