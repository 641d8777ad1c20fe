"""get_loss_criterion: the loss that the config names, as a total and its terms; knows no model and no loop."""

from collections.abc import Mapping
from typing import Any

import torch
from ml_collections import ConfigDict

from dtrain.batch import main_output
from dtrain.build import build


class Criterion:
    """A loss of any form, called as `total, terms = criterion(output, target)`.

    A loss may return a tensor or a dict of terms; a dict is summed, and each of its terms is logged. torch's own losses
    know tensors only, so of a sequence or a dict they are given the main (first) output; other losses get all of it.
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
        if isinstance(value, Mapping):
            return sum(value.values()), value  # type: ignore[return-value]
        return value, {}

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
