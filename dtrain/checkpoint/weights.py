"""Weights for a model from checkpoints and other files: read, renamed, held against the model's own, loaded."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.checkpoint.checkpoint_files import (
    EMA,
    LOSS,
    LOSS_EMA,
    MANIFEST,
    MODEL,
    STATE,
    has_averaged,
    read_manifest,
    read_tensors,
    read_torch_file,
    read_weights,
    require_sealed,
    require_whole,
    write_tensors,
)
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError, take_snapshot
from dtrain.checkpoint.shards import Stored, stored_in, whole, write_whole
from dtrain.config.errors import ConfigError, first_few
from dtrain.distributed.ranks import Ranks

WRAPPERS = ("model_state_dict", "state_dict", "model")  # the keys under which people save a state_dict
AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema")  # and those of averaged weights beside it


def load_for_use(
    module: torch.nn.Module,
    ranks: Ranks,
    checkpoints: Checkpoints,
    path: Path | None,
    is_required: bool = False,
    criterion: Any = None,
) -> int | None:
    """Give every rank the weights to be used, the averaged ones where a checkpoint has them; returns their step.

    The step is that of a checkpoint; None: of a weight file, or where there is none.

    They are those of a checkpoint folder or weight file; without a path, the best checkpoint's, else the last one's,
    else the model's own. A loss (`dtrain.loss.Criterion`) with a state gets its own from the same checkpoint. Raises
    ConfigError where these are not enough (`is_required`), or weights do not fit.
    """
    weights: dict[str, Any] | None = None
    of_loss: dict[str, Any] | None = None
    kept: dict[str, Any] | None = None  # of the loss's attributes
    loss: torch.nn.Module | None = criterion and criterion.module

    def read(ask: Callable[[Path], list[bool]]) -> int | None:
        nonlocal weights, of_loss, kept
        chosen = path or checkpoints.to_use()
        if chosen is None and is_required:
            raise ConfigError(f"{checkpoints.folder} holds no checkpoint; train first, or name one: --checkpoint")
        if chosen is None:
            return None
        try:
            as_stored = ranks.strategy.is_sharded and all(ask(chosen))
            found = load_weights(chosen, averaged=None, is_verified=path is None, as_stored=as_stored)
            weights = fitted(module, found)
            if criterion is not None:
                of_loss, kept = _state_of_loss(chosen, loss is not None)
        except (CheckpointError, OSError) as error:
            raise ConfigError(str(error)) from error
        if misfits := misfits_of(module, weights):
            raise ConfigError(f"{chosen} does not fit the model: {first_few(misfits, 10, '; ')}")
        if of_loss is not None and loss is not None and (misfits := misfits_of(loss, of_loss)):
            raise ConfigError(f"{chosen} does not fit the loss: {first_few(misfits, 10, '; ')}")
        return int(read_manifest(chosen)["step"]) if (chosen / MANIFEST).is_file() else None

    step = ranks.consult(read, is_seen)
    ranks.strategy.load_weights(module, weights)
    if loss is not None:
        ranks.strategy.load_weights(loss, of_loss)
    if criterion is not None and (kept := ranks.broadcast(kept)) is not None:
        criterion.kept.load_state_dict(kept)
    return step


def is_seen(checkpoint: Path) -> bool:
    """Whether this process sees a checkpoint folder: the disk may be another rank's own."""
    return (checkpoint / MANIFEST).is_file()


def _state_of_loss(path: Path, has_weights: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A loss's weights from a verified checkpoint folder, averaged where there are such, and its attributes.

    The weights are None where it has none, or where they are not there: then a warning says so.
    """
    content = read_torch_file(path / STATE, mmap=True) if (path / STATE).is_file() else {}
    kept = copy.deepcopy(content.get("state", {}).get("kept", {}).get("loss", {}))
    rests = content.get("others", {})
    name = next((name for name in (LOSS_EMA, LOSS) if name in rests), None)
    if has_weights and name:
        return read_tensors(path / f"{name}.safetensors", copy.deepcopy(rests[name])), kept
    if has_weights:
        warnings.warn(f"{path} has no weights of the loss: its figures are those of the loss as built", stacklevel=2)
    return None, kept


def load_weights(
    path: Path, averaged: bool | None = False, is_verified: bool = False, as_stored: bool = False
) -> dict[str, Any]:
    """Weights from a checkpoint folder, a .safetensors file or a torch file, on the CPU; nothing in it is executed.

    A folder of shards alone is taken, too: a sharded checkpoint's `model`, or one of torch.distributed.checkpoint's in
    that form. `as_stored`: what lies in a checkpoint's shards is not read, but described (`Stored`).

    In a torch file the weights may lie under 'model_state_dict', 'state_dict' or 'model', averaged ones under the names
    in AVERAGES. 'module.' (DDP) before all names and '_orig_mod.' (torch.compile) anywhere are taken out of a file's
    names; a checkpoint folder's are kept.

    A checkpoint folder that was just verified is not read twice; a file or a folder of shards in one is compared with
    its manifest, too. `averaged`: whether the averaged weights are taken;
    None: where there are some, since it is they that a training with averaged weights has validated and tested.
    Raises CheckpointError where there is no such file or no such weights in it, or it is damaged or holds code.
    """
    if is_folder_of_shards(path):
        require_sealed(path)
        return _unwrapped_names(whole(stored_in(path)))
    if path.is_dir():
        require_whole(path, is_verified)
        if averaged and not has_averaged(path):
            raise CheckpointError(f"{path} holds no averaged weights: it was trained without trainer.ema_decay")
        file, key = (MODEL, "weights") if averaged is False or not has_averaged(path) else (EMA, "ema")
        state = read_torch_file(path / STATE, mmap=True)  # of which the optimizer's part is then never read
        return read_weights(path, file, copy.deepcopy(state[key]), as_stored)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        if averaged and path.name != EMA:
            raise CheckpointError(
                f"{path} holds one set of weights; the averaged ones of a checkpoint are in its {EMA}"
            )
        require_sealed(path)
        return _unwrapped_names(read_tensors(path, {}))
    return _unwrapped_names(_find_weights(path, read_torch_file(path), averaged))


def write_weights(source: Path, target: Path, averaged: bool | None = None, is_verified: bool = False) -> list[str]:
    """Write what `load_weights` would load as one safetensors file; returns names that such a file cannot hold.

    Of a checkpoint, and of a safetensors file, a piece is in memory at a time, however large the model is.
    """
    left: list[str] = []
    if source.is_file() and source.suffix != ".safetensors":
        weights = take_snapshot(load_weights(source, averaged), {}).weights
        write_tensors(target, weights)
        return [*weights.rest]
    if source.is_dir() and not is_folder_of_shards(source):
        require_whole(source, is_verified)
        file, key = (EMA, "ema") if has_averaged(source) and averaged is not False else (MODEL, "weights")
        left = [*read_torch_file(source / STATE, mmap=True)[key]]
        source /= file if (source / file).is_file() else file.removesuffix(".safetensors")
    else:
        require_sealed(source)
    write_whole(target, stored_in(source))
    return left


def is_folder_of_shards(path: Path) -> bool:
    """Whether a folder holds one model's shards and nothing else that is known here, so not a checkpoint."""
    return path.is_dir() and not (path / MANIFEST).exists() and any(path.glob("shard-*.safetensors"))


def _find_weights(path: Path, content: Any, averaged: bool | None) -> dict[str, Any]:
    """The state_dict in what people save: the content itself, or what lies in it under one of the usual keys."""
    weights, keys = content, {False: WRAPPERS, None: (*AVERAGES, *WRAPPERS), True: AVERAGES}[averaged]
    while isinstance(weights, dict) and (inner := [weights[k] for k in keys if isinstance(weights.get(k), dict)]):
        weights, keys = inner[0], WRAPPERS
    is_found = averaged is not True or keys is WRAPPERS
    if is_found and isinstance(weights, dict) and any(isinstance(value, torch.Tensor) for value in weights.values()):
        return weights
    found = f"the keys {list(weights)[:10]}" if isinstance(weights, dict) else f"a {type(weights).__name__}"
    what = "averaged weights" if averaged else "weights"
    raise CheckpointError(
        f"{path} holds no {what} but {found}. Possible: a state_dict, or one under {', '.join(keys)}."
    )


def _unwrapped_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same weights without what DDP and torch.compile put into names, in whatever order they were applied.

    torch's AveragedModel adds the number of averages to the module's weights.
    """
    weights = {str(name).replace("_orig_mod.", ""): value for name, value in weights.items()}
    if weights.keys() - {"n_averaged"} and all(name.startswith("module.") or name == "n_averaged" for name in weights):
        weights.pop("n_averaged", None)
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def fitted(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under this model's names, where a file has it as a part named `model` beside a loss's own tensors.

    So are PIDNet's published files. Weights that are this model's by their names already are returned as they are.
    """
    own, prefix = set(model.state_dict()), "model."
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return inside if own and own <= inside.keys() and not own <= weights.keys() else weights


def weight_settings(
    *,
    path: str,
    weights: Literal["raw", "averaged"] | None = None,
    rename: dict[str, str] | None = None,
    leave_out: list[str] | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """The keys under `trainer.pre_trained`, where it is more than a path.

    Args:
        path: A checkpoint or weight file.
        weights: raw | averaged. Default: the averaged ones where there are some, to which the run's figures belong.
        rename: Regular expressions, each with what takes the place of what it finds in a name of the file (groups as
            in re.sub); one after another, in this order.
        leave_out: Regular expressions of names, as renamed, that are not loaded: the model's own begin as they are.
        partial: Load what fits, whatever else there is; all that does not is said.
    """
    return dict(locals())


def renamed(weights: Mapping[str, Any], rename: Mapping[str, str], leave_out: Iterable[str]) -> dict[str, Any]:
    """The weights under new names, less those left out; ValueError for a bad or useless rule, or one name for two."""
    names = list(weights)
    for pattern, replacement in rename.items():
        new = [_sub("rename", pattern, replacement, name) for name in names]
        if new == names:
            raise ValueError(f"rename: {pattern!r} matches none of the file's names, such as {', '.join(names[:5])}")
        names = new
    if several := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"rename: {several[0]!r} would be the name of several weights")
    kept = dict(zip(names, weights.values(), strict=True))
    for pattern in leave_out:
        left = {name: value for name, value in kept.items() if not _matches(pattern, name)}
        if len(left) == len(kept):
            raise ValueError(f"leave_out: {pattern!r} matches none of the names, such as {', '.join(list(kept)[:5])}")
        kept = left
    return kept


def _sub(rule: str, pattern: str, replacement: str, name: str) -> str:
    try:
        return re.sub(pattern, replacement, name)
    except re.error as error:
        raise ValueError(f"{rule}: {pattern!r} -> {replacement!r} is not a regular expression: {error}") from error


def _matches(pattern: str, name: str) -> bool:
    return _sub("leave_out", pattern, "", name) != name


def take_over(
    model: torch.nn.Module,
    weights: dict[str, Any],
    rename: Mapping[str, str] | None = None,
    leave_out: list[str] | None = None,
    partial: bool = False,
) -> list[str]:
    """Load weights by the rules of `weight_settings`, or none (ValueError); returns a line for each name not loaded."""
    own = model.state_dict()
    weights = renamed(fitted(model, weights), rename or {}, leave_out or [])
    spared = [name for name in own if any(_matches(pattern, name) for pattern in leave_out or [])]
    misfits = misfits_of(model, weights, spared)
    if misfits and not partial:
        found = first_few(misfits, 10, "; ")
        raise ValueError(f"does not fit the model: {found}; pre_trained has rename, leave_out and partial for that")
    fits = {name: value for name, value in weights.items() if name in own and not _differ(value, own[name])}
    if not fits:
        raise ValueError("has nothing that fits the model")
    model.load_state_dict(fits, strict=False)
    return [f"begins as built: {name} {_shape(own[name])}" for name in spared] + misfits


def misfits_of(model: torch.nn.Module, weights: Mapping[str, Any], spared: Collection[str] = ()) -> list[str]:
    """What keeps weights from being this model's, one line each; they need not have the spared names."""
    own, present = model.state_dict(), {*weights, *spared}
    return [
        *(f"missing in the file: {name} {_shape(own[name])}" for name in own if name not in present),
        *(f"not in the model: {name} {_shape(value)}" for name, value in weights.items() if name not in own),
        *(
            f"other shape: {name} is {_shape(weights[name])} in the file, {_shape(value)} in the model"
            for name, value in own.items()
            if name in weights and _differ(weights[name], value)
        ),
    ]


def _differ(value: Any, own: Any) -> bool:
    return isinstance(own, torch.Tensor) and _shape(value) != _shape(own)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor | Stored) else f"({type(value).__name__})"
