"""Activation checkpointing: parts of a model compute their activations again in backward, which saves their memory."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from dtrain.config.did_you_mean import did_you_mean

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


def checkpoint_activations(module: Module, wish: bool | str | Sequence[str]) -> list[str]:
    """Let parts of a model recompute what they compute, instead of keeping it for backward; returns their names.

    What is computed stays the same bit for bit: dropout draws the same numbers again, and buffers (BatchNorm's running
    statistics) are changed by the first pass alone. torch's `checkpoint_wrapper` is a module of its own, which would be
    in the names of all weights, and lets a second pass change the buffers once more.

    Args:
        module: The whole model, not wrapped yet.
        wish: True: the elements of containers (ModuleList, Sequential) that have parts of their own. Else patterns in
            the style of a shell, over modules' names or the names of their classes. Of modules within one another the
            outermost is taken that is called; a ModuleList is not, so its elements are.

    Raises:
        ValueError: There is no such module.
    """
    if not wish:
        return []
    patterns = [wish] if isinstance(wish, str) else [] if wish is True else list(wish)
    known = {text for name, part in module.named_modules() for text in (name, type(part).__name__) if name}
    if absent := [pattern for pattern in patterns if not any(fnmatchcase(text, pattern) for text in known)]:
        which = f"{absent[0]!r} matches the name or class of no module"
        raise ValueError(which + (did_you_mean(absent[0], known) or f"; there are {', '.join(sorted(known)[:20])}"))
    found = dict(_chosen(module, "", patterns, is_asked=False))
    if not found:
        raise ValueError(
            "finds no blocks: no element of a ModuleList or Sequential has parts of its own; name patterns"
        )
    for part in set(found.values()):
        if _state_of(part):  # torch.compile would let both passes change buffers: it compiles what lies within
            around = torch.compiler.disable(_recomputed_with_state, recursive=False)
            part.forward = functools.partial(around, part.forward, part)
        else:
            part.forward = functools.partial(_recomputed, part.forward)
    return list(found)


def _chosen(module: Module, name: str, patterns: Sequence[str], is_asked: bool) -> Iterator[tuple[str, Module]]:
    """The outermost modules within one that are asked for, and are called."""
    for own_name, part in module.named_children():
        path = f"{name}.{own_name}" if name else own_name
        is_called = type(part).forward is not Module.forward
        if patterns:
            texts = path, type(part).__name__
            wanted = is_asked or any(fnmatchcase(text, pattern) for text in texts for pattern in patterns)
        else:
            wanted = isinstance(module, _CONTAINERS) and not isinstance(part, _CONTAINERS) and any(part.children())
            wanted = wanted and any(True for _ in part.parameters())
        if wanted and is_called:
            yield path, part
        else:
            yield from _chosen(part, path, patterns, is_asked=wanted and bool(patterns))


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `forward` returns; in backward it is called again."""
    return (
        checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if torch.is_grad_enabled()
        else forward(*args, **kwargs)
    )


def _recomputed_with_state(forward: Callable[..., Any], module: Module, *args: Any, **kwargs: Any) -> Any:
    """The same for a module with buffers, of which the second call is given those of before the first."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    buffers = _state_of(module)
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_before(buffers)), **kwargs
    )


_Buffers = list[tuple[dict[str, Any], str, Tensor]]


def _state_of(module: Module) -> _Buffers:
    """Copies of the buffers that training may change; one that is in no checkpoint is a constant, or could not resume.

    They are looked up by name: a forward may put a new tensor in a buffer's place.
    """
    return [
        (part._buffers, name, value.clone())
        for part in module.modules()
        for name, value in part._buffers.items()
        if value is not None and name not in part._non_persistent_buffers_set
    ]


@contextmanager
def _as_before(buffers: _Buffers) -> Iterator[None]:
    """Copies in the buffers' places meanwhile, which may change them; the buffers themselves may be part of a graph."""
    now = [(owner, name, owner[name]) for owner, name, _ in buffers]
    for owner, name, value in buffers:
        owner[name] = value.clone()
    try:
        yield
    finally:
        for owner, name, current in now:
            owner[name] = current
