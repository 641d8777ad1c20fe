"""get_loss_criterion: the loss that the config names, as one number to minimise and its terms."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.config.rules import SUMMED
from dtrain.config.schema import refused
from dtrain.data.heads import main_pair
from dtrain.data.kept_attributes import KeptAttributes

# Buffers of their losses are constants that the config gives, such as class weights.
_LIBRARIES = ("torch.", "monai.", "dtrain.components.")


class Criterion:
    """A loss of any form, called as `total, terms = criterion(output, target)`.

    A loss may return a tensor or a dict of terms; a dict is summed, and each of its terms is logged. PyTorch's own
    losses take tensors only, so of several outputs they are given the main one; other losses get all of them.

    `module` holds what of it is trained, shared and saved as a model is: its parameters and buffers, also where a loss
    that is not a module has them. It is None where there is nothing of the kind.

    Raises:
        TypeError: The loss returned something else, or more than one number.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        function = getattr(loss, "func", loss)  # with arguments, a function is a partial
        self.name = getattr(function, "__name__", type(function).__name__)  # in messages
        self.main_only = (getattr(function, "__module__", None) or "").startswith("torch.")
        if self.main_only:  # (N, 1) less (N) is (N, N), of which torch says no more than that it is likely wrong
            own = r"torch\.nn\.modules\.loss|dtrain\.loss"
            warnings.filterwarnings("error", "Using a target size", UserWarning, module=own)
        self._modules = loss if isinstance(loss, torch.nn.Module) else _Held(loss)
        for part in self._modules.modules():
            if type(part).__module__.startswith(_LIBRARIES):
                part._non_persistent_buffers_set.update(part._buffers)
        self.module = self._modules if self._modules.state_dict() else None
        self.kept = KeptAttributes(torch.device("cpu"))
        binary = isinstance(loss, torch.nn.BCEWithLogitsLoss | torch.nn.BCELoss)
        # Given output and target, refuses a target that the loss cannot mean; None: it takes any.
        self.check_target = _refuse_no_share if binary else getattr(loss, "check_target", None)

    def __call__(self, output: Any, target: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The value to minimise (a scalar) and its named terms (none for a plain loss)."""
        if self.main_only and not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
            output, target = self._pair(output, target)
        value = self.loss(output, target)
        if not isinstance(value, Mapping):
            return self._scalar(value), {}
        terms = {name: self._scalar(term, name) for name, term in value.items()}
        if not terms:
            raise TypeError(f"the loss {self.name} returned an empty dict; expected its terms")
        return sum(terms.values()), terms  # type: ignore[return-value]

    def _pair(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Which of several outputs and targets a loss of torch compares."""
        try:
            return main_pair(output, target)
        except ValueError as error:
            found = str(error).partition(";")[0]
            cure = "give both to a loss of your own, or call the main output 'out' or 'logits'"
            raise ValueError(f"{self.name} compares one output with one target, but {found}; {cure}") from None

    def _scalar(self, value: Any, term: str = "") -> torch.Tensor:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value if value.dim() == 0 else value.reshape(())
        of = f" for {term!r}" if term else ""
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        expected = "one number as a tensor (the mean over the batch, as with reduction: mean), or a dict of such terms"
        raise TypeError(f"the loss {self.name} returned {found}{of}; expected {expected}")

    def to(self, device: torch.device) -> "Criterion":
        """Move the loss's own tensors, such as class weights."""
        if not isinstance(self.loss, torch.nn.Module):
            held = _held_by(self.loss)
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                    held[name] = value.to(device)
        self._modules.to(device)
        self.kept = KeptAttributes(device)
        self.kept.begin({"loss": self.loss} | ({} if self._modules is self.loss else {"held": self._modules}))
        return self

    def train(self, mode: bool = True) -> None:
        """Put the loss into train mode, or into eval mode."""
        self._modules.train(mode)


class _Held(torch.nn.Module):
    """The modules and parameters in a loss that is not a module: a function's arguments, an object's attributes."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        for name, value in _held_by(loss).items():
            values = value.items() if isinstance(value, Mapping) else enumerate(value if _is_list(value) else [value])
            for key, item in values:
                own = f"{name}_{key}" if _is_list(value) or isinstance(value, Mapping) else f"{name}_"
                if isinstance(item, torch.nn.Parameter):
                    self.register_parameter(own, item)
                elif isinstance(item, torch.nn.Module):
                    self.add_module(own, item)


def _held_by(loss: Any) -> dict[str, Any]:
    """The arguments of a function, the attributes of an object."""
    found: dict[str, Any] = getattr(loss, "keywords", None) or getattr(loss, "__dict__", {})
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _adds_up(loss: Any) -> bool:
    """Whether a library's loss, or one within a sum of ours, is the sum over its samples."""
    function = getattr(loss, "func", loss)
    module = getattr(function, "__module__", None) or ""
    reduction = getattr(loss, "keywords", {}).get("reduction") or getattr(loss, "reduction", None)
    parts = [*getattr(loss, "losses", ()), getattr(loss, "loss", None)] if module.startswith("dtrain.") else []
    return (module.startswith(_LIBRARIES) and reduction == "sum") or any(map(_adds_up, parts))


def _refuse_no_share(output: Any, target: Any) -> None:
    """Binary cross entropies of torch take any target: for 255 in a mask the loss is far below 0.

    Raises:
        ValueError: A value is not from 0 to 1; its sample is the error's `sample_in_batch`.
    """
    if not isinstance(target, torch.Tensor) or target.device.type != "cpu" or not target.numel():
        return  # a device is not waited for
    low, high = target.aminmax()
    if low.item() >= 0 and high.item() <= 1:
        return
    sample, *voxel = (~((target >= 0) & (target <= 1))).nonzero()[0].tolist()
    value = target[(sample, *voxel)].item()
    where = f"sample {sample} of the batch" + (f" at {tuple(voxel)}" if voxel else "")
    error = ValueError(f"{where}: the target has the value {value:g}; expected 0 to 1")
    error.sample_in_batch = sample  # type: ignore[attr-defined]
    raise error


def get_loss_criterion(config: ConfigDict) -> Criterion:
    """Build `loss`.

    Raises:
        ConfigError: The name or an argument is wrong, or the loss is a sum over its samples.
    """
    loss = build(config, "loss")
    if _adds_up(loss):
        raise refused(config, ("loss",), f"{config.loss.name} {SUMMED}")
    return Criterion(loss)
