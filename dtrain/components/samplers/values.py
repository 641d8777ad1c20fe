"""values_of: one value for each sample of a dataset (a label, a weight, a length), without reading the samples."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

Values = str | list | Callable | None
_FILES = (".npy", ".csv", ".txt")


def values_of(dataset: Any, by: Values, what: str) -> np.ndarray:
    """One value for each sample, (N,).

    Args:
        dataset: Of N samples.
        by: An attribute or method of the dataset, a list of N values, a file of them (.npy; .csv or .txt with one on
            each line), or a function that gets the dataset and returns them. Of a `Subset` or `ConcatDataset`, the
            attribute is that of what is inside.
        what: What is looked for, for the message: labels.

    Raises:
        ValueError: There is nothing of that name, or not one value for each sample.
    """
    if callable(by):
        found = by(dataset)
    elif isinstance(by, str):
        found = _named(dataset, by, what)
    else:
        found = by
    values = _as_array(found)
    if values.ndim != 1 or len(values) != len(dataset):
        shape = f"shape {values.shape}" if values.ndim != 1 else f"{len(values):,} values"
        name = f"'{by}' has" if isinstance(by, str) else "has"
        raise ValueError(f"by: {name} {shape}; the dataset has {len(dataset):,} samples, and each needs one")
    return values


def _named(dataset: Any, name: str, what: str) -> Any:
    if isinstance(dataset, Subset):
        return _as_array(_named(dataset.dataset, name, what))[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_as_array(_named(part, name, what)) for part in dataset.datasets])
    found = getattr(dataset, name, None)
    if found is not None:
        return found() if callable(found) else found
    if name in (getattr(dataset, "column_names", None) or ()):  # as those of Hugging Face
        return dataset[name]
    records = getattr(dataset, "data", None)  # MONAI's: a mapping for each sample
    if isinstance(records, Sequence) and records and isinstance(records[0], Mapping) and name in records[0]:
        return [record[name] for record in records]
    if name.endswith(_FILES):
        return _read(Path(name))
    kind = type(dataset).__name__
    own = [key for key in dir(dataset) if not key.startswith("_")]
    near = difflib.get_close_matches(name, own, 2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(
        f"by: {kind} has no attribute or method '{name}'{hint}. Reading every sample to find its {what} would take as "
        f"long as an epoch: let {kind} keep them (self.{name} = [...], one for each sample), name a file (.npy, .csv) "
        f"or a function of the dataset (by: {{name: my_{name}}})"
    )


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"by: there is no file {path}")
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    try:
        return np.array(lines, dtype=float)
    except ValueError:  # a heading, or names
        try:
            return np.array(lines[1:], dtype=float)
        except ValueError:
            return np.array(lines)


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, list | tuple) and values and all(isinstance(item, Tensor) for item in values):
        return np.array([item.item() for item in values])
    return np.asarray(values)
