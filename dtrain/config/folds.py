"""Folds: where `loaders.folds` splits the data of `loaders.train`, `loaders.val` is filled in from there."""

from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.config.errors import ConfigError, KeyPath, Place, is_mapping

OF_TRAINING = ("sampler", "batch_sampler", "shuffle", "drop_last")  # which say nothing of a validation's data
CHANGES = ("transforms", "random_scale")  # what a training may do to its data, and a validation should not


def are_folds(loaders: Any) -> bool:
    """Whether a section of loaders has folds. A dataset's own argument of that name is no mapping with a count."""
    return is_mapping(loaders) and is_mapping(loaders.get("folds")) and not is_mapping(loaders["folds"].get("name"))


def fill_in_validation(values: dict[str, Any], places: dict[KeyPath, Place]) -> None:
    """Give `loaders.val` the keys of `loaders.train` that it has not itself.

    Raises:
        ConfigError: What the training does to its data would be done to the validation's, too; or there is nothing to
            split.
    """
    loaders = values.get("loaders")
    if not are_folds(loaders):
        return
    assert isinstance(loaders, dict)
    train, val = loaders.get("train"), {} if loaders.get("val") is None else loaders["val"]
    if not isinstance(train, dict) or not isinstance(val, dict):
        text = "split the data of loaders.train, so that loaders.val has nothing but what differs there, one mapping"
        raise ConfigError(f"loaders.folds: {text}", places.get(("loaders", "folds")))
    for key in CHANGES:
        if train.get(key) and key not in val:
            text = f"would change the validation's part of the data, too: give loaders.val {key} of its own"
            raise ConfigError(f"loaders.train.{key}: {text}", places.get(("loaders", "train", key)))
    taken = {key: value for key, value in train.items() if key not in val and key not in OF_TRAINING}
    loaders["val"] = {**taken, **val}
    for path in [path for path in places if path[:2] == ("loaders", "train") and path[2:3] and path[2] in taken]:
        places[("loaders", "val", *path[2:])] = places[path]
    if (section := places.get(("loaders", "val")) or places.get(("loaders", "train"))) is not None:
        places["loaders", "val"] = section


def fold_mistakes(folds: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of `loaders.folds` with what is wrong with their values."""
    count, fold = folds.get("count"), folds.get("fold", 0)
    if type(count) is int and count < 2:
        yield "count", f"must be at least 2, found {count}"
    elif type(count) is int and type(fold) is int and not 0 <= fold < count:
        yield "fold", f"is {fold}; possible: 0 to {count - 1}"
    if folds.get("balanced") is False and folds.get("stratify") is not None:
        yield "stratify", "needs balanced: true, since else each file's own name decides where it belongs"
    if folds.get("pattern") is not None and folds.get("by", "file") != "file":
        yield "pattern", "is for by: file"
    if folds.get("groups") is not None and folds.get("by", "file") != "groups":
        yield "groups", "is for by: groups"
