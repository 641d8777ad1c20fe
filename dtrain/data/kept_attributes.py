"""What an object keeps between calls in plain attributes (a step counter, the best so far), saved and put back."""

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

_SCALARS = (type(None), bool, int, float, complex, str)
_CONTAINERS = (list, tuple, set, dict, OrderedDict)
_MAX_ELEMENTS = 1_000_000  # more is a cache rather than a state
_OF_TORCHMETRICS = {"_update_count", "_groups_checked"}
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # what torch itself keeps on every module


class KeptAttributes:
    """The attributes of some objects that have changed since they were made.

    What is as it was made is not saved: it follows from the config, whose new values hold. Left out are other objects,
    and tensors with a gradient or of more than a million elements; parameters, and buffers but `with_buffers`, since
    others look after those. Tensors are put back on the device.
    """

    def __init__(self, device: torch.device, with_buffers: bool = False) -> None:
        self._device, self._with_buffers = device, with_buffers
        self._objects: Mapping[str, Any] = {}
        self._as_made: dict[str, Any] = {}
        self._waiting: Mapping[str, Any] = {}  # what was loaded before the objects were there

    def begin(self, objects: Mapping[str, Any]) -> None:
        """The objects are made; what was loaded before is put into them."""
        self._objects = objects
        self._as_made = self._plain_values()
        if self._waiting:
            self._put_back()

    def state_dict(self) -> dict[str, Any]:
        """Plain values by `object.attribute`, copied."""
        if not self._objects:
            return dict(self._waiting)
        found = self._plain_values().items()
        return {place: value for place, value in found if not _equal(value, self._as_made.get(place, _OTHER))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned, as soon as the objects are there; what fits none is passed over."""
        self._waiting = state
        self._put_back()

    def _put_back(self) -> None:
        homes, now = dict(self._homes()), self._plain_values()
        for place, value in {**self._as_made, **self._waiting}.items():
            home, _, name = place.rpartition(".")
            if home in homes and not _equal(value, now.get(place, _OTHER)):
                homes[home][name] = _original(value, self._device)

    def _plain_values(self) -> dict[str, Any]:
        values = {
            f"{home}.{name}": _plain(value)
            for home, attributes in self._homes()
            for name, value in attributes.items()
            # A torchmetrics object knows by private attributes how far it is with one evaluation.
            if name not in _OF_MODULES and not (name.startswith("_") and _OF_TORCHMETRICS & attributes.keys())
        }
        return {place: value for place, value in values.items() if value is not _OTHER}

    def _homes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where attributes lie: each object's, and those of each module within one."""
        for key, value in self._objects.items():
            parts = value.named_modules() if isinstance(value, torch.nn.Module) else [("", value)]
            for name, part in parts:
                home = f"{key}.{name}" if name else key
                yield home, getattr(part, "__dict__", {})
                if self._with_buffers and isinstance(part, torch.nn.Module):
                    yield f"{home}:buffers", part._buffers


class _Other:
    """Stands for what is not a plain value."""


_OTHER = _Other()


def _plain(value: Any) -> Any:
    """A copy that a checkpoint can hold, `_OTHER` where there is none; arrays and deques become marked lists."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, np.generic) and isinstance(value.item(), _SCALARS):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return ["numpy", torch.from_numpy(value.copy())] if value.size <= _MAX_ELEMENTS else _OTHER
    if type(value) is torch.Tensor:
        small = value.layout == torch.strided and value.numel() <= _MAX_ELEMENTS
        return value.detach().clone() if small and not value.requires_grad else _OTHER
    if type(value) is deque:
        items = _plain(list(value))
        return _OTHER if items is _OTHER else ["deque", items, value.maxlen]
    if type(value) not in _CONTAINERS or len(value) > _MAX_ELEMENTS:
        return _OTHER
    pairs = isinstance(value, dict)
    try:
        items = [_plain(item) for item in (value.items() if pairs else value)]
    except RecursionError:
        return _OTHER
    return _OTHER if any(item is _OTHER for item in items) else type(value)(items)


def _original(value: Any, device: torch.device) -> Any:
    """What `_plain` was given, its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list) and len(value) == 2 and value[0] == "numpy" and isinstance(value[1], torch.Tensor):
        return value[1].cpu().numpy().copy()
    if isinstance(value, list) and len(value) == 3 and value[0] == "deque" and isinstance(value[1], list):
        return deque(_original(value[1], device), value[2])
    if isinstance(value, dict):
        return type(value)((key, _original(item, device)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_original(item, device) for item in value)
    return copy.copy(value)


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other or (one != one and other != other))
