"""What is input, target and main output: the forms that batches and outputs may have."""

import functools
import inspect
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import PackedSequence

from dtrain.config.errors import ConfigError

INPUT_KEYS = ("input", "image", "images", "x")
TARGET_KEYS = ("target", "label", "labels", "mask", "y")
TargetKey = str | list[str] | None
WHOLE = "batch"  # the argument of a forward that takes all of a batch at once
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by a tensor's number of axes
_is_none = functools.partial(operator.is_, None)
KEPT = "kept_samples"  # the key, field or attribute by which a batch says how many samples a collate function kept


def split(batch: Any, input_key: str | None = None, target_key: TargetKey = None) -> tuple[Any, Any]:
    """A batch as (input, target).

    Args:
        batch: A pair; a longer sequence, whose last element is the target and the others the inputs; or a dict.
        input_key: Which entry of a dict is the input. Default: one of INPUT_KEYS, else all but the target, as a dict.
        target_key: Which entry of a dict is the target; of a list, a dict of these. Default: one of TARGET_KEYS.

    Raises:
        ValueError: The batch has no target.
        ConfigError: Several entries of a dict have usual names, so that it takes a key to tell.
    """
    if isinstance(batch, Mapping):
        return _split_dict(batch, input_key, target_key)
    batch = _without_count(batch)
    if _are_several(batch) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise ValueError(f"a batch is (input, target) or a dict, found {described(batch)}")


def inputs(batch: Any, input_key: str | None = None, target_key: TargetKey = None) -> Any:
    """The input of a batch as for `split`, or without a target; a sequence of several is taken to end with one."""
    if isinstance(batch, Mapping):
        key = input_key or _key(batch, INPUT_KEYS, "input_key")
        targets = {target_key} if isinstance(target_key, str) else {*(target_key or TARGET_KEYS)}
        return {key: batch[key] for key in batch if key not in {*targets, KEPT}} if key is None else batch[key]
    batch = _without_count(batch)
    if _are_several(batch):
        return batch[0] if len(batch) == 1 else split(batch)[0]
    return batch


def _split_dict(batch: Mapping[str, Any], input_key: str | None, target_key: TargetKey) -> tuple[Any, Any]:
    target_key = target_key or _key(batch, TARGET_KEYS, "target_key")
    keys = target_key if isinstance(target_key, list) else [target_key or ""]
    if any(key not in batch for key in keys):
        found, expected = ", ".join(map(repr, batch)), " and ".join(filter(None, keys)) or " or ".join(TARGET_KEYS)
        text = f"no target in a batch with the keys {found}: expected {expected}; name it with trainer.target_key"
        raise ValueError(text)
    target = {key: batch[key] for key in keys} if isinstance(target_key, list) else batch[keys[0]]
    input_key = input_key or _key(batch, INPUT_KEYS, "input_key")
    if input_key is not None:
        return batch[input_key], target
    return {key: value for key, value in batch.items() if key not in (*keys, KEPT)}, target


def _are_several(value: Any) -> bool:
    """Whether it is several things in a row; a packed sequence is one, though a tuple."""
    return isinstance(value, list | tuple) and not isinstance(value, PackedSequence)


def _without_count(batch: Any) -> Any:
    """A named tuple without its field KEPT, as a plain one; any other batch as it is."""
    fields = getattr(batch, "_fields", ())
    if KEPT not in fields:
        return batch
    return tuple(value for field, value in zip(fields, batch, strict=True) if field != KEPT)


def kept_samples(batch: Any, items: Any, dealt: int) -> int:
    """How many samples a batch of a collate function has: what it says, else those of its items that are not None.

    Args:
        batch: What the function made; None: nothing.
        items: What it was given.
        dealt: How many samples the items are of.

    Raises:
        ValueError: The batch says something that cannot be.
    """
    if batch is None:
        return 0
    said = batch.get(KEPT) if isinstance(batch, Mapping) else getattr(batch, KEPT, None)
    if said is None:
        return dealt - sum(map(_is_none, items)) if isinstance(items, list) else dealt
    if not 0 <= int(said) <= dealt or int(said) != said:
        raise ValueError(f"{KEPT} of a batch is {said}; possible: 0 to {dealt}, the samples that its collate_fn got")
    return int(said)


def _key(batch: Mapping[str, Any], usual: Sequence[str], setting: str = "") -> str | None:
    """The usual key that a batch has; with a `setting` of the trainer's, the only one, else a ConfigError names it."""
    found = [key for key in usual if key in batch]
    if setting and len(found) > 1:
        keys, several = ", ".join(map(repr, batch)), " and ".join(map(repr, found))
        text = f"trainer.{setting}: missing: of a batch with the keys {keys}, {several} may be meant; name one"
        raise ConfigError(text + (", or a list of them" if setting == "target_key" else ""))
    return found[0] if found else None


def described(batch: Any) -> str:
    """What a batch or an output is, in words."""
    if isinstance(batch, torch.Tensor):
        return f"one tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
    return f"a {type(batch).__name__}{size}"


Form = Literal["one", "several", "named"]


def call_form(model: torch.nn.Module, example: Any, sample_counts: Collection[int] = ()) -> Form:
    """How a model takes an input of this form: as one argument, as several, or by name; decided by its signature.

    Args:
        model: What is called.
        example: An input.
        sample_counts: How many samples the batches have that a collate function of the user's own has made. A list of
            as many is one for each sample, as for detection, unless the model requires so many arguments, or takes any.
    """
    if isinstance(example, Mapping) and _accepts(model, (), example):
        return "named"
    if not _are_several(example) or not _accepts(model, example, {}):
        return "one"
    is_list_of_samples = isinstance(example, list) and len(example) in sample_counts
    return "one" if is_list_of_samples and not _requires(model, len(example)) else "several"


def _requires(model: torch.nn.Module, count: int) -> bool:
    """Whether a model requires so many arguments, two or more, or takes any number."""
    items = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(item.kind in positional and item.default is item.empty for item in items)
    return any(item.kind is item.VAR_POSITIONAL for item in items) or 1 < count == required


def whole_form(model: torch.nn.Module, batch: Any, is_training: bool) -> Form | None:
    """How a model that computes its own loss takes a whole batch, target included; None: it does not.

    A dict goes by name and a sequence by position, where the signature of `forward` takes all of it; anything else (a
    tensor, a graph), and any batch of a `forward(batch)`, is one argument. Outside training a model need not compute a
    loss, so there it must require the last part of a sequence, or call it what targets are called.
    """
    if isinstance(batch, Mapping) and _accepts(model, (), batch):
        return "named"
    items = list(inspect.signature(model.forward).parameters.values())
    if items and items[0].name == WHOLE and not _requires(model, 2):
        return "one"
    if isinstance(batch, Mapping):
        return None
    if not _are_several(batch):
        return "one" if _accepts(model, (batch,), {}) else None
    if not _accepts(model, batch, {}):
        return None
    certain = is_training or len(batch) == 1 or _requires(model, len(batch))
    return "several" if certain or items[len(batch) - 1].name.removesuffix("s") in TARGET_KEYS else None


def whole(batch: Any) -> Any:
    """A whole batch as a model is given it: without what a collate function says of it."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != KEPT}
    return _without_count(batch)


def parts_of_whole(batch: Any, input_key: str | None = None, target_key: TargetKey = None) -> tuple[Any, Any]:
    """(input, target) of a batch that a model takes whole, for metrics and pictures; where it is not clear, all of it.

    A metric then names what it compares by its `target_key`.
    """
    try:
        return split(batch, input_key, target_key)
    except (ValueError, ConfigError):
        if input_key or target_key:
            raise
        return batch, batch


def call_text(model: torch.nn.Module, batch: Any, form: Form) -> str:
    """`(images, targets)`: how a whole batch is handed over, in words."""
    if form == "named":
        return f"({', '.join(f'{key}=...' for key in batch)})"
    names = [key for key, item in inspect.signature(model.forward).parameters.items() if item.kind != item.VAR_KEYWORD]
    return f"({', '.join(names[: len(batch) if form == 'several' else 1])})"


def call(model: torch.nn.Module, inputs: Any, form: Form) -> Any:
    """What a model makes of an input that it takes in this form."""
    if form == "named":
        return model(**inputs)
    return model(*inputs) if form == "several" else model(inputs)


def _accepts(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def main_output(output: Any) -> Any:
    """The main one of a model's outputs: a tensor itself, a sequence's first, a dict's 'out', 'logits' or first."""
    if isinstance(output, Mapping):
        key = _key(output, ("out", "logits"))
        return main_output(output[key] if key else next(iter(output.values())))
    return main_output(output[0]) if isinstance(output, list | tuple) else output


def in_channels_last(value: Any) -> Any:
    """The same with its images (N, C, H, W) and volumes (N, C, D, H, W) in the memory format of that name."""
    if isinstance(value, torch.Tensor):
        memory_format = CHANNELS_LAST.get(value.dim())
        return value.contiguous(memory_format=memory_format) if memory_format and value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_channels_last(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value if isinstance(value, PackedSequence) else type(value)(*map(in_channels_last, value))
    return type(value)(map(in_channels_last, value)) if isinstance(value, list | tuple) else value


def to_device(value: Any, device: torch.device) -> Any:
    """The same with its tensors on the device; copies from pinned memory do not wait."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):  # a packed sequence, a graph, or what else a collate function made
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
