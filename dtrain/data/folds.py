"""Folds: which part of a dataset is which fold's, by names alone, so that every run and every machine agrees."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Subset


def fold_settings(  # noqa: PLR0913
    *,
    count: int,
    fold: int = 0,
    by: Literal["file", "index", "groups"] = "file",
    groups: str | None = None,
    pattern: str | None = None,
    stratify: str | None = None,
    balanced: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The keys under `loaders.folds`, which split the data of `loaders.train`.

    Args:
        count: How many folds there are.
        fold: Which of them is validated, from 0; the training gets the others.
        by: file | index | groups: what stays together: a file's or volume's items, nothing, or a group's.
        groups: With by: groups, where they are: an attribute or column of the dataset, one value for each volume or
            item. Default: groups.
        pattern: With by: file, a regular expression: files in whose names it finds the same stay together, such as
            a patient's.
        stratify: An attribute or column of the dataset whose values are spread evenly over the folds.
        balanced: Folds of the same size, up to one; a new file may then move others. false: each name decides for
            itself, so that a new file moves no other one, and sizes differ.
        seed: Another one gives another split. The training's seed does not.
    """
    return dict(locals())


def split(dataset: Any, settings: Mapping[str, Any], phase: str) -> Any:
    """The part of a dataset that is this fold's: for `train` all folds but one, for `val` that one.

    A dataset with `volumes` gives it by its method `only(numbers)`; of another one it is a Subset.

    Raises:
        ValueError: The dataset does not say what it is split by, or has too few of it.
    """
    folds = fold_numbers(dataset, settings)
    own = [number for number, fold in enumerate(folds) if (fold == settings["fold"]) == (phase == "val")]
    if not own:
        raise ValueError(f"fold {settings['fold']} of {settings['count']} leaves nothing to {phase}")
    return dataset.only(own) if hasattr(dataset, "volumes") else Subset(dataset, own)


def fold_numbers(dataset: Any, settings: Mapping[str, Any]) -> list[int]:
    """The fold of each volume of a dataset with `volumes`, of each item of another one.

    Raises:
        ValueError: See `split`.
    """
    keys = _keys(dataset, settings)
    classes = None if settings["stratify"] is None else _column(dataset, settings["stratify"], "stratify", len(keys))
    return dealt(keys, settings["count"], settings["seed"], balanced=settings["balanced"], classes=classes)


def dealt(
    keys: Sequence[str], count: int, seed: int = 0, *, balanced: bool = True, classes: Sequence[str] | None = None
) -> list[int]:
    """The fold of each key; equal keys have the same.

    Balanced, the keys in the order of their hashes are dealt to the folds in turn, class after class; a key's class is
    the one that it has most often. Else a key's hash modulo the count is its fold.

    Raises:
        ValueError: There are fewer different keys than folds.
    """
    different = sorted(set(keys))
    if len(different) < count:
        raise ValueError(f"count is {count}, and there are {len(different)} to be dealt: {', '.join(different[:5])}")
    hashes = {key: int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") for key in different}
    if not balanced:
        return [hashes[key] % count for key in keys]
    own: dict[str, Counter[str]] = {key: Counter() for key in different}
    for key, value in zip(keys, classes or ("",) * len(keys), strict=True):
        own[key][value] += 1
    main = {key: min(counts, key=lambda value: (-counts[value], value)) for key, counts in own.items()}
    order = sorted(different, key=lambda key: (main[key], hashes[key], key))
    fold_of = {key: number % count for number, key in enumerate(order)}
    return [fold_of[key] for key in keys]


def _keys(dataset: Any, settings: Mapping[str, Any]) -> list[str]:
    """By what each volume, or item, is dealt."""
    by, volumes = settings["by"], getattr(dataset, "volumes", None)
    length = len(dataset) if volumes is None else len(volumes)
    if by == "groups":
        return _column(dataset, settings["groups"] or "groups", "groups", length)
    if by == "index":
        if volumes is not None and length < len(dataset):
            raise ValueError("by is index, which would put patches of one file into training and validation; by: file")
        return [str(number) for number in range(length)]
    names = [volume.name for volume in volumes] if volumes is not None else _file_names(dataset)
    if settings["pattern"] is None:
        return names
    found = [re.search(settings["pattern"], name) for name in names]
    if without := [name for name, match in zip(names, found, strict=True) if match is None]:
        raise ValueError(f"pattern {settings['pattern']!r} finds nothing in {', '.join(without[:3])}")
    return ["/".join(match.groups() or [match[0]]) for match in found if match is not None]


def _file_names(dataset: Any) -> list[str]:
    """The name of each item's file, with its folder's, as datasets of files keep them."""
    for name in ("samples", "imgs", "files", "paths"):
        listed = getattr(dataset, name, None)
        if isinstance(listed, list | tuple) and len(listed) == len(dataset):
            paths = [item[0] if isinstance(item, list | tuple) else item for item in listed]
            if all(isinstance(path, str | Path) for path in paths):
                return ["/".join(Path(path).parts[-2:]) for path in paths]
    kind = type(dataset).__name__
    raise ValueError(f"by is file, and {kind} has no volumes, samples or files for each item; possible: index, groups")


def _column(dataset: Any, name: str, key: str, length: int) -> list[str]:
    """One text for each volume or item."""
    values = getattr(dataset, name, None)
    if values is None and name in (getattr(dataset, "column_names", None) or ()):
        values = dataset[name]
    values = values() if callable(values) else values
    if values is None:
        raise ValueError(f"{key} is {name}, and {type(dataset).__name__} has no attribute or column of that name")
    listed = values.tolist() if hasattr(values, "tolist") else list(values) if isinstance(values, Iterable) else []
    if len(listed) != length:
        raise ValueError(f"{key} is {name}, which has {len(listed)} values; expected {length}, one for each")
    return [str(value) for value in listed]
