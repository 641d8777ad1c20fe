"""Fits the weights of other files to a model."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch


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
    rename: dict[str, str] | None = None,
    leave_out: list[str] | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """The keys under `trainer.pre_trained`, where it is more than a path.

    Args:
        path: A checkpoint or weight file.
        rename: Regular expressions, each with what takes the place of what it finds in a name of the file (groups as
            in re.sub); one after another, in this order.
        leave_out: Regular expressions of names, as renamed, that are not loaded: the model's own begin as they are.
        partial: Load what fits, whatever else there is; all that does not is said.
    """
    return dict(locals())


def renamed(weights: Mapping[str, Any], rename: Mapping[str, str], leave_out: list[str]) -> dict[str, Any]:
    """The weights under their new names, without those that are left out.

    Raises:
        ValueError: A rule is no regular expression or matches nothing, or two weights get one name.
    """
    names = {name: name for name in weights}
    for pattern, replacement in rename.items():
        new = {name: _sub(pattern, replacement, now, "rename") for name, now in names.items()}
        if new == names:
            raise ValueError(f"rename: {pattern!r} matches none of the file's names, such as {_some(names.values())}")
        names = new
    if len(set(names.values())) < len(names):
        twice = next(now for now in names.values() if list(names.values()).count(now) > 1)
        raise ValueError(f"rename: {twice!r} would be the name of several weights")
    kept = {now: weights[name] for name, now in names.items()}
    for pattern in leave_out:
        left = [name for name in kept if not _matches(pattern, name)]
        if len(left) == len(kept):
            raise ValueError(f"leave_out: {pattern!r} matches none of the names, such as {_some(kept)}")
        kept = {name: kept[name] for name in left}
    return kept


def _sub(pattern: str, replacement: str, name: str, rule: str) -> str:
    try:
        return re.sub(pattern, replacement, name)
    except re.error as error:
        raise ValueError(f"{rule}: {pattern!r} -> {replacement!r} is no regular expression: {error}") from error


def _matches(pattern: str, name: str) -> bool:
    return _sub(pattern, "", name, "leave_out") != name


def _some(names: Any) -> str:
    return ", ".join(list(names)[:5])


def take_over(
    model: torch.nn.Module,
    weights: dict[str, Any],
    rename: Mapping[str, str] | None = None,
    leave_out: list[str] | None = None,
    partial: bool = False,
) -> list[str]:
    """Load weights into a model, and say what was not.

    Args:
        model: Its parameters and buffers are overwritten.
        weights: A state_dict.
        rename: See `weight_settings`.
        leave_out: See `weight_settings`.
        partial: See `weight_settings`.

    Returns:
        One line for each name that was not loaded.

    Raises:
        ValueError: The weights do not fit; nothing was loaded then.
    """
    rules = rename or {}
    own = renamed(fitted(model, weights), rules, leave_out or []) if rules or leave_out else fitted(model, weights)
    expected = [name for name in model.state_dict() if any(_matches(pattern, name) for pattern in leave_out or [])]
    misfits = misfits_of(model, own, expected)
    if misfits and not partial:
        told = "; ".join(misfits[:10]) + (f"; and {len(misfits) - 10} more" if len(misfits) > 10 else "")
        raise ValueError(f"does not fit the model: {told}; pre_trained has rename, leave_out and partial for that")
    state = model.state_dict()
    fits = {name: value for name, value in own.items() if name in state and _same_shape(value, state[name])}
    if not fits:
        raise ValueError("has nothing that fits the model")
    model.load_state_dict(fits, strict=False)
    return [f"begins as built: {name} {tuple(state[name].shape)}" for name in expected] + misfits


def _same_shape(one: Any, other: Any) -> bool:
    return not isinstance(other, torch.Tensor) or one.shape == other.shape


def misfits_of(model: torch.nn.Module, weights: dict[str, torch.Tensor], spared: Collection[str] = ()) -> list[str]:
    """What keeps weights from being this model's, one line each; none when they fit exactly.

    Args:
        model: Whose weights they are to be.
        weights: A state_dict.
        spared: Names that the weights need not have.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights and name not in spared]
    lines = [f"missing in the file: {name} {tuple(own[name].shape)}" for name in missing]
    lines += [f"not in the model: {name} {tuple(weights[name].shape)}" for name in weights if name not in own]
    lines += [
        f"other shape: {name} is {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and isinstance(value, torch.Tensor) and weights[name].shape != value.shape
    ]
    return lines
