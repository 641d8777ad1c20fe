"""Which output of a model and which target of a batch a metric compares, where there are several of either."""

from collections.abc import Mapping
from typing import Any

import torch

from dtrain.data.batch import TARGET_KEYS

Key = str | int | list[str | int] | None
_MAIN_KEYS = ("out", "logits")


def main_pair(
    output: Any, target: Any, output_key: Key = None, target_key: Key = None, samples: int = 0
) -> tuple[Any, Any]:
    """The output and the target that belong together.

    Without keys: of two dicts the entries under the one key that both have; of a dict of outputs 'out' or 'logits', of
    a dict of targets the one under a usual key (`batch.TARGET_KEYS`), of either its only entry; of a tuple or list of
    tensors the first. A list or tuple of samples (of dicts, texts or numbers, as for detection, or of so many tensors
    as there are samples) is taken whole.

    Args:
        output: What the model returned.
        target: What the batch has as its target.
        samples: How many samples the batch has; 0: not known.
        output_key: The key, index or attribute of the output; a list of keys gives a dict of those entries.
        target_key: The same of the target. Where only one of the two is given and the other side has that key, both.

    Raises:
        ValueError: Keys do not decide it, or there is no such entry; with the keys that there are.
    """
    if isinstance(target, torch.Tensor) and _rows(output) == {samples}:
        samples = 0  # nothing but several outputs fits one tensor
    if output_key is None and target_key is None:
        return _paired(output, target, samples)
    if output_key is None:
        return _other(output, target_key, samples, "output"), _entry(target, target_key, samples, "target")
    measured = _entry(output, output_key, samples, "output")
    if target_key is None:
        return measured, _other(target, output_key, samples, "target")
    return measured, _entry(target, target_key, samples, "target")


def _other(value: Any, key: Key, samples: int, side: str) -> Any:
    """What belongs to a key that was given for the other side alone: what is under that key, else the only entry."""
    if _has(value, key, samples):
        return _entry(value, key, samples, side)
    if are_several(value, samples) and len(value) > 1:
        raise ValueError(f"{side}_key: missing: the other side's key is {key!r}, and {_described(value)}")
    return _main(value, samples, side)


def shows_outputs(value: Any, samples: int) -> bool:
    """Whether a list of tensors can only be several outputs: it has another length than the batch."""
    return isinstance(value, list | tuple) and len(value) != samples and are_several(value, samples)


def output_of(output: Any, key: str | int | None) -> Any:
    """What is under a key of a model's several outputs, else the main one; a ValueError where keys do not tell."""
    return _main(output if key is None else _entry(output, key, 0, "output"), 0, "output")


def _paired(output: Any, target: Any, samples: int) -> tuple[Any, Any]:
    """Output and target by the keys that both have, else the main one of each."""
    outputs, targets = (side._asdict() if hasattr(side, "_asdict") else side for side in (output, target))
    if isinstance(outputs, Mapping) and isinstance(targets, Mapping):
        shared = [key for key in outputs if key in targets]
        main = [key for key in shared if key in _MAIN_KEYS]
        if len(shared) == 1 or main:
            key = main[0] if main else shared[0]
            output, target = outputs[key], targets[key]
        elif shared:
            raise ValueError(f"output and target have several keys in common ({_listed(shared)}); {_CURE}")
    return _main(output, samples, "output"), _main(target, samples, "target")


_CURE = "name one with output_key and target_key"


def _main(value: Any, samples: int, side: str) -> Any:
    """The main one of several; a ValueError where keys do not tell which it is."""
    if isinstance(value, Mapping):
        usual = [key for key in (*_MAIN_KEYS, *(TARGET_KEYS if side == "target" else ())) if key in value]
        if len(value) == 1:
            usual = list(value)
        if not usual or (side == "target" and len(usual) > 1):
            raise ValueError(f"the {side} has the keys {_listed(value)}, and none of them is the main one; {_CURE}")
        return _main(value[usual[0]], samples, side)
    return _main(value[0], samples, side) if are_several(value, samples) else value


def are_several(value: Any, samples: int = 0) -> bool:
    """Whether a sequence holds several outputs or targets of the batch, main one first, rather than its samples."""
    if not isinstance(value, list | tuple) or not value:
        return False
    if isinstance(value[0], list | tuple):
        return are_several(value[0], samples)
    if all(isinstance(item, torch.Tensor) for item in value):
        # As many as there are samples: one each. Only a tuple whose items all have as many rows is taken for several
        # outputs, as models return them; a metric that then gets a list says so itself.
        return len(value) != samples or (isinstance(value, tuple) and _rows(value) == {samples})
    if isinstance(value, tuple):
        return not all(isinstance(item, Mapping | str | bytes | int | float | None) for item in value)
    return isinstance(value[0], torch.Tensor)


def _rows(value: Any) -> set[int]:
    """How long the tensors of a sequence are; empty where it holds something else."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, torch.Tensor) for item in value):
        return set()
    return {len(item) if item.dim() else -1 for item in value}


def _has(value: Any, key: Key, samples: int) -> bool:
    """Whether there is such an entry: of a dict, a field of a named tuple or data class, an index of several."""
    try:
        _entry(value, key, samples, "")
    except ValueError:
        return False
    return not isinstance(key, int) or are_several(value, samples)


def _entry(value: Any, key: Key, samples: int, side: str) -> Any:
    """What lies under a key, of several tensors there the first; a dict of entries for a list of keys."""
    if isinstance(key, list):
        return {each: _entry(value, each, samples, side) for each in key}
    is_index = isinstance(value, list | tuple) and isinstance(key, int) and -len(value) <= key < len(value)
    if is_index or (isinstance(value, Mapping) and key in value):
        found = value[key]
    elif isinstance(key, str) and not isinstance(value, Mapping | torch.Tensor) and hasattr(value, key):
        found = getattr(value, key)  # of a named tuple or a data class
    else:
        raise ValueError(f"{side}_key: the {side} has no {key!r}; {_described(value)}")
    return found[0] if are_several(found, samples) else found


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"possible: {_listed(value)}"
    if isinstance(value, list | tuple):
        return (
            f"it is a {type(value).__name__} of {len(value)}: {_listed(getattr(value, '_fields', range(len(value))))}"
        )
    return f"it is one {type(value).__name__}, without keys"


def _listed(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys)
