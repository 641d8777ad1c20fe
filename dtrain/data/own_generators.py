"""The random number generators that a dataset holds: found once per process; `own_seeding` seeds them.

What a constructor makes is cloned into every worker: without this all of them would draw the same numbers, and others
than one process draws.
"""

import contextlib
import functools
import itertools
import random
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

MOST_OBJECTS = 5_000  # that are looked at, plain data not included: some ten milliseconds
MOST_ITEMS = 100  # of one container: the first ones and, of a longer one, the last few
MOST_LOOKS = 30_000  # at items and attributes, those included that find out what is plain data
MANY = 16  # items of one class, of which a few tell what all are
MOST_AT_ONCE = 2_000  # of these looks, to judge what one object holds: its neighbours are to have some, too
FEW = 4  # items at either end of a container, by which the others are judged
_DRAWING = (np.random.RandomState, np.random.Generator, np.random.BitGenerator, torch.Generator, random.Random)
KINDS = (*_DRAWING, np.random.SeedSequence)
_CONTAINERS = (dict, list, tuple, deque, set, frozenset)
_PLAIN = (*_CONTAINERS, np.random.SeedSequence)  # one sequence for each of many samples is data, too
_CLOSED = (
    *(str, bytes, bytearray, int, float, complex, bool, type(None), range, np.generic, torch.Tensor),
    *(torch.dtype, torch.device, ModuleType, BuiltinFunctionType, MethodDescriptorType, property),
)  # what holds no generator
_QUICK = frozenset(_CLOSED)


def generators_in(**roots: Any) -> tuple[dict[str, Any], bool]:
    """The generators that some objects hold, by where they are, and whether all was looked at.

    Looked at are attributes (a class's own, too), the items of containers, what functions and partials have bound, and
    the variables of the modules of all these classes and functions. What lies below an attribute that is named for
    transforms comes first, then all else breadth first, so that bounds cut off what is far; annotations and other plain
    data are recognized by a few of them and count for nothing. The names, as dataset.transforms[0].rng, do not depend
    on the order in which attributes were made. What says `seeds_itself = True` is left alone.
    """
    first: deque[tuple[str, Any]] = deque()
    others = deque(roots.items())
    data = _Data()
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for _ in range(MOST_OBJECTS):
        if not (first or others) or data.looks > MOST_LOOKS:
            break
        waiting = first or others
        name, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, KINDS):
            if not _is_shared(value):
                found[name] = value
            continue
        with contextlib.suppress(Exception):  # what cannot be looked at is nothing to fail for
            if getattr(value, "seeds_itself", None) is not True:
                for part, item in data.parts_without_data(value):
                    (first if waiting is first or _is_for_transforms(part) else others).append((name + part, item))
    return found, not (first or others or data.is_cut)


def _is_shared(generator: Any) -> bool:
    """Whether it is one of those that every sample has seeded anyway, or one that no seed changes."""
    numpys = np.random.mtrand._rand
    shared = (numpys, numpys._bit_generator, random._inst, torch.default_generator)
    return any(generator is one for one in shared) or isinstance(generator, random.SystemRandom)


def _is_for_transforms(part: str) -> bool:
    return any(word in part.lower() for word in ("transform", "augment"))


class _Data:
    """Tells plain data (numbers, texts, containers and records of them) from what may hold a generator."""

    def __init__(self) -> None:
        self.looks = self.most = 0
        self.is_cut = False  # whether more than data was left out

    def parts_without_data(self, value: Any) -> list[tuple[str, Any]]:
        """What an object holds without data; many of one kind are judged by a few of them."""
        every = list(_readable(value))
        self.looks += len(every)
        self.most = self.looks + MOST_AT_ONCE
        parts = [(name, item) for name, item in every if not _is_closed(item)]
        counts = Counter(type(item) for _, item in parts)
        for kind in (kind for kind, count in counts.items() if count > MANY):
            alike = [item for _, item in parts if type(item) is kind]
            judged = alike[:FEW] + alike[-FEW:]
            if all(self.is_data(item) for item in judged):
                kept = {id(item) for item in judged if kind not in _PLAIN}  # for what their class holds
                parts = [(name, item) for name, item in parts if type(item) is not kind or id(item) in kept]
        if isinstance(value, _CONTAINERS) and len(value) > MOST_ITEMS:
            self.is_cut = self.is_cut or not all(isinstance(item, type) or self.is_data(item) for _, item in parts)
        return [(name, item) for name, item in parts if not _holds_closed_alone(item)]

    def is_data(self, value: Any, depth: int = 6) -> bool:
        self.looks += 1
        if _is_closed(value):
            return True
        if not depth or self.looks > self.most or callable(value) or isinstance(value, _DRAWING):
            return False
        held = _ends(value, FEW, FEW)
        if type(value) not in _CONTAINERS:
            try:
                held += [item for _, item in _attributes(value)]
            except Exception:  # what cannot be looked at
                return False
        return all(self.is_data(item, depth - 1) for item in held)


def _is_closed(value: Any) -> bool:
    return type(value) in _QUICK or isinstance(value, _CLOSED) or _is_array_of_numbers(value)


def _is_array_of_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def _holds_closed_alone(value: Any) -> bool:
    return type(value) in _CONTAINERS and all(_is_closed(item) for item in _ends(value))


def _ends(value: Any, first: int = MOST_ITEMS - FEW, last: int = FEW) -> list[Any]:
    """The first and last items of a container, of a dictionary its values; all of a small one."""
    return [item for _, item in _entries(value, first, last)]


def _entries(value: Any, first: int = MOST_ITEMS - FEW, last: int = FEW) -> Iterator[tuple[Any, Any]]:
    """The first and last items of a container with their keys or indices; all of a small one, none of what is none.

    Those of a set are numbered by class, since its order may be another in each process.
    """
    if isinstance(value, dict):  # not any mapping: one may be a file, and read what is asked of it
        keys: Iterable[Any] = dict.keys(value)
        if len(value) > first + last:
            keys = [*itertools.islice(keys, first), *reversed([*itertools.islice(reversed(dict.keys(value)), last)])]
        yield from ((key, dict.__getitem__(value, key)) for key in keys)
    elif isinstance(value, list | tuple | deque | np.ndarray):
        items, size = (value.flat, value.size) if isinstance(value, np.ndarray) else (value, len(value))
        few = range(size) if size <= first + last else [*range(first), *range(size - last, size)]
        yield from ((index, items[index]) for index in few)
    elif isinstance(value, set | frozenset):
        counts: Counter[str] = Counter()
        for item in itertools.islice(value, first + last):
            counts[kind := type(item).__name__] += 1
            yield f"{kind} {counts[kind]}", item


def _readable(value: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(Exception):
        yield from _parts(value)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with how it is reached."""
    if isinstance(value, type):
        yield from ((name, item) for name, item in _variables(vars(value)) if not isinstance(item, FunctionType))
        yield from _module_variables(value.__module__)
        return
    yield from _items(value)
    if type(value) in _CONTAINERS:
        return
    yield from _attributes(value)
    for kind in type(value).__mro__[:-1]:
        if kind.__module__ != "builtins":
            yield f".{kind.__name__}", kind


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a partial, a method or a function holds."""
    yield from ((f"[{key!r}]", item) for key, item in _entries(value))
    if isinstance(value, functools.partial):
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


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from _slots(value)
    yield from _variables(getattr(value, "__dict__", {}))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield f".{name}", getattr(value, name)
