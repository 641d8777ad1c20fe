"""get_loss_criterion: the loss that the config names, as a total and its terms; knows no model and no loop."""

from collections.abc import Mapping
from typing import Any

import torch
from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.data.batch import main_output


class Criterion:
    """A loss of any form, called as `total, terms = criterion(output, target)`.

    A loss may return a tensor or a dict of terms; a dict is summed, and each of its terms is logged. torch's own losses
    know tensors only, so of a sequence or a dict they are given the main (first) output; other losses get all of it.

    Raises:
        TypeError: The loss returned something else, or more than one number.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.main_only = (getattr(type(loss), "__module__", "") or "").startswith("torch.") or (
            getattr(loss, "__module__", None) or getattr(getattr(loss, "func", None), "__module__", None) or ""
        ).startswith("torch.")

    def __call__(self, output: Any, target: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The value to minimise (a scalar) and its named terms (none for a plain loss)."""
        if self.main_only and not isinstance(output, torch.Tensor):
            output = main_output(output)
        value = self.loss(output, target)
        if not isinstance(value, Mapping):
            return self._scalar(value), {}
        terms = {name: self._scalar(term, name) for name, term in value.items()}
        if not terms:
            raise TypeError(f"the loss {self.name} returned an empty dict; expected its terms")
        return sum(terms.values()), terms  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """What the loss is called in messages."""
        function = getattr(self.loss, "func", self.loss)
        return getattr(function, "__name__", type(function).__name__)

    def _scalar(self, value: Any, term: str = "") -> torch.Tensor:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value if value.dim() == 0 else value.reshape(())
        of = f" for {term!r}" if term else ""
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(
            f"the loss {self.name} returned {found}{of}; expected one number as a tensor (the mean over the batch, "
            "as with reduction: mean), or a dict of such terms"
        )

    def to(self, device: torch.device) -> "Criterion":
        """Move the loss's own tensors, such as class weights."""
        for item in (self.loss, *getattr(self.loss, "keywords", {}).values()):
            if isinstance(item, torch.nn.Module):
                item.to(device)
        if getattr(self.loss, "keywords", None):
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.loss.keywords.items()}
            self.loss.keywords.update(moved)
        return self


def get_loss_criterion(config: ConfigDict) -> Criterion:
    """Build `loss`.

    Raises:
        ConfigError: The name or an argument is wrong.
    """
    return Criterion(build(config, "loss"))
