"""In what two configs describe different trainings, and in what only how long, how often, where or how fast."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, KeyPath, dotted, is_mapping, shown, to_plain
from dtrain.config.schema import OBJECT, Call, Slot, calls, set_names
from dtrain.config.signatures import Callee

NOT_SET: Any = type("NotSet", (), {"__repr__": lambda self: "(not set)"})()
# Calls, as in `calls`, and those of their keys that change nothing of what is computed, up to rounding.
_FREE = [
    ("", r"device|experiment|run_name|modules|config_version|trackers"),
    (r"trackers\.\d+", r".*"),
    (r"mlflow|predictor|cluster|sweep(\.\w+)?|loaders\.(test|predict)(/[\w-]+)?(\.loader)?", r".*"),
    (
        r"loaders\.[\w/-]+\.loader",
        r"every_epochs|num_workers|pin_memory|persistent_workers|prefetch_factor|timeout|multiprocessing_context",
    ),
    (
        r"trainer",
        r"max_.*|.*_every_.*|keep_.*|checkpoint_dir|mirror_.*|early_stop_.*|time_limit|hang_timeout_seconds|pictures|profile"
        r"|compile|deterministic|strategy|activation_checkpointing|channels_last|cudnn_benchmark"
        r"|limit_batches|anomaly|log_grad_norm|spare_memory_dir",
    ),
    (r"trainer\.ddp", r"(?!comm_hook).*"),
    (r"trainer\.fsdp", r"(?!param_dtype|reduce_dtype).*"),
]
# Calls that are also arguments of `trainer`, as which they are compared.
_PARTS = ("trainer.pictures", "trainer.pre_trained", "trainer.freeze", "trainer.swa", "trainer.profile")
_BATCH_SIZES = ("batch_size", "global_batch_size")
_TOP_DEFAULTS = {"seed": 0, "device": "auto", "modules": [], "config_version": None}


class Change(NamedTuple):
    """One key that has another value."""

    path: KeyPath
    before: Any  # NOT_SET where it is not there, nor has a default that is known
    after: Any
    is_free: bool  # what is computed stays the same

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {_shown(self.before)} -> {_shown(self.after)}"


def changes(before: ConfigDict, after: ConfigDict, ranks_before: int, ranks_after: int) -> list[Change]:
    """What differs between the trainings that two configs describe, one change per key.

    Compared are the calls, not the texts: a default that is written down, another order of keys, a key that is shared
    by several phases, another way to write a number, a path or a component's name change nothing. With another number
    of ranks, another batch size per rank that makes the same global batch is none for the training; where the same one
    makes another global batch, that is a change to be told.
    """
    old, new = _calls(before), _calls(after)
    found = [*_of_top(before, after)]
    for key in dict.fromkeys((*old, *new)):
        if key in old and key in new:
            found += _of_call(key, old[key], new[key])
        elif not key.endswith((".loader", ".schedule")):  # dtrain's own keys beside a component that came or went
            call = old.get(key) or new[key]
            values = {"name": to_plain(call.name), **{name: to_plain(call.arguments[name]) for name in call.arguments}}
            one, other = (values, NOT_SET) if key in old else (NOT_SET, values)
            found.append(Change(call.path, one, other, _is_free(key, "name")))
    batches = _global_batch(old, ranks_before), _global_batch(new, ranks_after)
    same_batch = batches[0] == batches[1]
    result: dict[KeyPath, Change] = {}
    for change in found:
        if same_batch and change.path[-1] in _BATCH_SIZES:
            change = change._replace(is_free=True)
        known = result.get(change.path)
        result[change.path] = change if known is None or known.is_free else known
    if batches[0][0] != batches[1][0] and not any(path[-1] in _BATCH_SIZES for path in result):  # by the ranks alone
        path = ("global_batch_size",)
        result[path] = Change(path, batches[0][0], batches[1][0], is_free=True)
    return list(result.values())


def ranks_of_batch(before: ConfigDict, after: ConfigDict, known: int, given: int) -> int:
    """The ranks whose batches an optimizer step has where a training continues on a given number of them.

    These are those that it is known to have begun with, so that a step has the same samples; unless its config says by
    now that batches of another size are wanted.
    """
    sizes = []
    for config in (before, after):
        found = calls(config)
        loader, trainer = (found[key].arguments if key in found else {} for key in ("loaders.train.loader", "trainer"))
        sizes.append([*(to_plain(loader.get(key)) for key in _BATCH_SIZES), trainer.get("accumulate") or 1])
    return known if sizes[0] == sizes[1] else given


def _calls(config: ConfigDict) -> dict[str, Call]:
    return {key: call for key, call in calls(config).items() if not key.startswith(_PARTS)}


def _of_top(before: ConfigDict, after: ConfigDict) -> Iterator[Change]:
    """The keys beside the sections."""
    for key in dict.fromkeys((*before, *after)):
        default = _TOP_DEFAULTS.get(key)
        one, other = (default if config.get(key) is None else to_plain(config[key]) for config in (before, after))
        if not is_mapping(one) and not is_mapping(other) and key != "metrics" and one != other:
            yield Change((key,), one, other, _is_free("", key))


def _of_call(key: str, before: Call, after: Call) -> Iterator[Change]:
    """Two calls of the same part."""
    names = to_plain(before.name), to_plain(after.name)
    old, new = _target(before, before.name), _target(after, after.name)
    if old and new and old != new and names[0] == names[1]:  # found in another of the `modules`
        names = ".".join(old), ".".join(new)
    if names[0] != names[1] and (old != new or old is None):
        yield Change(after.path_of("name"), names[0], names[1], _is_free(key, "name"))
    defaults = defaults_of(before) | defaults_of(after)
    for name in dict.fromkeys((*before.arguments, *after.arguments)):
        if key == "trainer" and name in ("ddp", "fsdp", "resume"):
            continue  # calls of their own; and what is asked for now
        default = defaults.get(name, NOT_SET)
        one, other = (to_plain(call.arguments.get(name, default)) for call in (before, after))
        path = after.path_of(name) if name in after.arguments else before.path_of(name)
        for where, inner, other_inner in _of_values(path, one, other, before, after):
            yield Change(where, inner, other_inner, _is_free(key, name))


def _of_values(path: KeyPath, one: Any, other: Any, before: Call, after: Call) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Where two values differ, as deep inside as can be said."""
    if path[-1] == OBJECT:
        one, other = _comparable(one, other)
    if is_mapping(one) and is_mapping(other):
        for key in dict.fromkeys((*one, *other)):
            yield from _of_values((*path, key), one.get(key, NOT_SET), other.get(key, NOT_SET), before, after)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (item, other_item) in enumerate(zip(one, other, strict=True)):
            yield from _of_values((*path, index), item, other_item, before, after)
    elif not _is_same(path, one, other, before, after):
        yield path, one, other


def _comparable(one: Any, other: Any) -> tuple[Any, Any]:
    """Of the records of two objects given in Python, what tells whether they compute the same.

    Not their files, in which there is much else; their code only where the same Python has compiled both.
    """
    if not (is_mapping(one) and is_mapping(other)):
        return NOT_SET, NOT_SET  # one of them is not such a record: their names differ, or what they are is the same
    versions = {str(item.get("code")).partition(" ")[0] for item in (one, other)}
    keys = ("repr", "length", *(("code",) if len(versions) == 1 else ()))
    first, second = ({key: item[key] for key in keys if key in item} for item in (one, other))
    return first, second


def _is_same(path: KeyPath, one: Any, other: Any, before: Call, after: Call) -> bool:
    if one == other:
        return True
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    if "***" in one:  # a secret, which is stored nowhere
        return re.fullmatch(".*".join(map(re.escape, one.split("***"))), other, re.DOTALL) is not None
    if path[-1] == "name":
        targets = [_target(replace(call, slot=Slot(call.slot.libraries, nested=True)), name)
                   for call, name in ((before, one), (after, other))]  # fmt: skip
        return targets[0] is not None and targets[0] == targets[1]
    return "/" in one + other and Path(one).absolute() == Path(other).absolute()


def _target(call: Call, name: Any) -> tuple[str, str] | None:
    """The module and the name in it that a name leads to; None where it leads nowhere any more."""
    try:
        target = replace(call, name=name).target
    except ConfigError:
        return None
    return target.module, target.name


def defaults_of(call: Call) -> dict[str, Any]:
    """The defaults of what is called, as far as its source text says them."""
    found: dict[str, Any] = {}
    try:
        target = call.target
    except ConfigError:
        return found
    for item in target.parameters if isinstance(target, Callee) else ():
        try:
            found[item.name] = to_plain(ast.literal_eval(item.default or ""))
        except (ValueError, SyntaxError):
            continue
    return found


def _is_free(key: str, name: str) -> bool:
    """Whether another value for a key of a call leaves what is computed as it is."""
    return any(re.fullmatch(call, key) and re.fullmatch(names, name) for call, names in _FREE)


def _global_batch(found: Mapping[str, Call], ranks: int) -> list[int]:
    """Samples per batch over all ranks, of training and validation."""
    batches = []
    for name in (*(set_names(found, "train") or ["train"]), *(set_names(found, "val") or ["val"])):
        call = found.get(f"loaders.{name}.loader")
        values = call.arguments if call else {"global_batch_size": 1}
        batches.append(values.get("global_batch_size") or (values.get("batch_size") or 1) * ranks)
    return batches


def _shown(value: Any) -> str:
    return repr(value) if value is NOT_SET else shown(value)
