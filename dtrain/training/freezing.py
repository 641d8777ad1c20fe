"""trainer.freeze: parameters that are not trained, for good or until an epoch, and modules that stay in eval mode."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch.nn import Module

from dtrain.config.errors import first_few
from dtrain.config.optimizers import Frozen
from dtrain.training.parameter_groups import LOSS, Named, named_parameters


def freeze_settings(
    *, match: str | list[str] | None = None, types: str | list[str] | None = None, until_epoch: int | None = None
) -> dict[str, Any]:
    """The keys of a mapping under `trainer.freeze`.

    Args:
        match: Patterns of the names of parameters.
        types: Class names of the modules that own them; with `match`, those that both fit.
        until_epoch: So many epochs long; 0: not at all, an exception from earlier entries. Default: always.
    """
    return dict(locals())


class Freezing:
    """What of a model, and of its loss, is frozen in which epoch.

    A frozen parameter has no gradient, so that no optimizer moves it, by weight decay neither. A module of which all
    parameters are frozen is in eval mode and stays in it, whoever calls `train()`: BatchNorm keeps its statistics,
    dropout is off. Parameters that do not require a gradient anyway are left alone.
    """

    def __init__(self, model: Module, loss: Module | None, entries: Sequence[Frozen]) -> None:
        self._model, self._loss = model, loss
        self._until: dict[str, float] = {}  # the epoch from which a parameter is trained, by its name
        self._held: list[Module] = []  # the outermost modules that are kept in eval mode
        for item in named_parameters(model, loss) if entries else ():
            fitting = [entry.until_epoch for entry in entries if item.fits(entry.match, entry.types)]
            if fitting and item.parameter.requires_grad:
                self._until[item.name] = math.inf if fitting[-1] is None else fitting[-1]

    @property
    def thawed_later(self) -> frozenset[str]:
        """The names of parameters that are frozen for some epochs only."""
        return frozenset(name for name, epoch in self._until.items() if 0 < epoch < math.inf)

    def apply(self, epoch: int) -> bool:
        """Freeze what is frozen in an epoch (from 0), and thaw the rest; whether that changed anything."""
        items = self._items() if self._until else []
        if all(item.parameter.requires_grad == self._is_trained(item, epoch) for item in items):
            return False
        _reshard(self._model)
        for item in self._items():
            item.parameter.requires_grad_(self._is_trained(item, epoch))
            item.parameter.grad = None
        self._hold(epoch)
        return True

    def _items(self) -> list[Named]:
        """The parameters that are frozen at some time; with FSDP they are other objects from time to time."""
        return [item for item in named_parameters(self._model, self._loss) if item.name in self._until]

    def _is_trained(self, item: Named, epoch: int) -> bool:
        return epoch >= self._until[item.name]

    def _hold(self, epoch: int) -> None:
        """Keep the modules that are frozen whole in eval mode, and no others."""
        for module in self._held:
            del module.train
            module.train(self._model.training)
        frozen = {name for name, until in self._until.items() if epoch < until}
        parts = [(self._model, "")] + ([(self._loss, LOSS)] if self._loss is not None else [])
        self._held = [module for part, prefix in parts for module in _frozen_whole(part, prefix, frozen)]
        for module in self._held:
            module.eval()
            module.train = functools.partial(_stay, module)  # type: ignore[method-assign]

    def lines(self) -> Iterator[str]:
        """What is frozen, as it is shown before a training: `4 tensors, 1,234 parameters (backbone), until epoch 3`."""
        items = {item.name: item for item in named_parameters(self._model, self._loss)}
        for until in sorted({epoch for epoch in self._until.values() if epoch}):
            own = [items[name] for name, epoch in self._until.items() if epoch == until]
            size = sum(item.parameter.numel() for item in own)
            modules = first_few([*dict.fromkeys(item.name.partition(".")[0] for item in own)], 4)
            when = f", until epoch {until:g}" if until < math.inf else ""
            yield f"{len(own)} tensor{'' if len(own) == 1 else 's'}, {size:,} parameters of {modules}{when}"


def _reshard(model: Module) -> None:
    """With FSDP the shards have the flag that counts, and a part may have whole weights after an evaluation."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _stay(module: Module, mode: bool = True) -> Module:
    """What `train` of a module does that stays in eval mode."""
    return module


def _frozen_whole(module: Module, prefix: str, frozen: set[str]) -> Iterator[Module]:
    """The outermost modules whose parameters are all frozen, some of them by these names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = {prefix + name for name in parameters}
    known = [prefix + name in frozen or not item.requires_grad for name, item in parameters.items()]
    if names and all(known) and not frozen.isdisjoint(names):
        yield module
        return
    for name, child in module.named_children():
        yield from _frozen_whole(child, f"{prefix}{name}.", frozen)
