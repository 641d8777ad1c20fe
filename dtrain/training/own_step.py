"""What a training_step of one's own returns and does: figures of any form, gradients over all ranks, steps it takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.config.did_you_mean import did_you_mean
from dtrain.dataloader import MicroBatch
from dtrain.distributed.ranks import Ranks


class OwnStep:
    """The steps that a `training_step` takes itself, in the optimizer step at work.

    `optimizers` are those of the training by name.
    """

    def __init__(
        self, optimizers: Mapping[str, Optimizer], ranks: Ranks, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.optimizers, self._ranks, self.scaler = optimizers, ranks, scaler
        self.micro: MicroBatch | None = None  # the batch at work
        self.is_taken = False  # it has taken steps itself, in one of this step's batches
        self.has_several = len(optimizers) > 1
        self.loss: Tensor | None = None  # of the batch at work: the sum of what was minimised
        self.waiting: list[str] = []  # the optimizers whose gradients wait for the step's last batch

    def end(self) -> list[str]:
        """The step is whole: the optimizers that still have to step, since its last batch had no samples."""
        waiting, self.waiting, self.is_taken = self.waiting, [], False
        return waiting

    def optimizer(self, name: str | None) -> tuple[str, Optimizer]:
        """The optimizer of that name, or the only one.

        Raises:
            ValueError: There is none of that name, or there are several and none is named.
        """
        if name is None and len(self.optimizers) == 1:
            return next(iter(self.optimizers.items()))
        if name is not None and name in self.optimizers:
            return name, self.optimizers[name]
        known = ", ".join(self.optimizers)
        if name is None:
            raise ValueError(f"there are several optimizers, so one must be named: {known}")
        hint = f"{did_you_mean(str(name), self.optimizers)}; possible: {known}"
        cure = hint if self.has_several else "; there is a single one, which needs no name"
        raise ValueError(f"there is no optimizer {name!r}{cure}")

    def gradients(self, loss: Tensor, name: str | None, retain_graph: bool) -> list[Tensor | None]:
        """The gradients of the mean over all ranks' samples, for the parameters of an optimizer.

        Raises:
            RuntimeError: No batch is at work.
        """
        if self.micro is None:
            raise RuntimeError("gradients are of a batch's loss: call it within training_step")
        value, parameters = loss.detach(), trained(self.optimizer(name)[1])
        # 0 * loss is NaN for a loss that is not finite; so then are its gradients, which every rank gets to see.
        seed = torch.add(torch.full_like(value, self.micro.weight), value, alpha=0)
        scaled = self.scaler.scale(loss) if self.scaler else loss
        with torch.autocast(self._ranks.device.type, enabled=False):
            found = self._ranks.strategy.gradients(scaled, seed, parameters, retain_graph)
        if self.scaler:
            torch._foreach_div_([item for item in found if item is not None], self._scale())
        return found

    def prepare(self, gradients: list[Tensor], factor: float) -> None:
        """Make gradients what an optimizer's step expects: times a factor, and with fp16 times the loss's scale."""
        if gradients and (factor != 1 or self.scaler):
            torch._foreach_mul_(gradients, self._scale() * factor if self.scaler else factor)
        torch.clear_autocast_cache()  # of weights that are about to change

    def _scale(self) -> Tensor:
        assert self.scaler is not None
        return self.scaler.scale(torch.ones((), device=self._ranks.device))

    def add(self, name: str, gradients: list[Tensor | None]) -> bool:
        """Add gradients to those that an optimizer has; whether it shall step now: the step's last batch is at work.

        Raises:
            ValueError: They are more or fewer than its parameters.
        """
        assert self.micro is not None
        parameters = trained(self.optimizers[name])
        if len(parameters) != len(gradients):
            text = f"{len(gradients)} gradients for the {len(parameters)} parameters of the optimizer"
            raise ValueError(f"{text}{f' {name!r}' if name else ''}")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                known = parameter.grad
                parameter.grad = gradient.detach() if known is None else known.add_(gradient.detach())
        self.is_taken = True
        if self.micro.closes:
            self.waiting = [other for other in self.waiting if other != name]
        elif name not in self.waiting:
            self.waiting.append(name)
        return self.micro.closes

    def told(self, result: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The loss that a `training_step` returned, and the figures by the names under which they are logged.

        A tensor is the loss; in a dict it is under 'loss', and the other figures are logged as they are called; of
        `(loss, terms)` the terms are logged as loss_<term>. Where it took its steps itself, the loss is what was
        minimised, unless it says otherwise; it may then return nothing.

        Raises:
            TypeError: It returned something else.
        """
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
            return result[0], {f"loss_{name}": _figure(name, term) for name, term in result[1].items()}
        if isinstance(result, Mapping):
            figures = {str(name): value for name, value in result.items()}
            loss = figures.pop("loss", None)
            if loss is not None and self.is_taken:
                loss = _figure("loss", loss)
        elif result is None or isinstance(result, Tensor):
            loss, figures = result, {}
        else:
            raise TypeError(f"training_step returned a {type(result).__name__}; {_EXPECTED}")
        if loss is None and self.is_taken:
            loss = self.loss
        elif not isinstance(loss, Tensor):
            what = "nothing" if result is None else f"a dict without a tensor 'loss' (found: {', '.join(figures)})"
            raise TypeError(f"training_step returned {what}, and took no step itself with self.minimize; {_EXPECTED}")
        return loss, {name: _figure(name, value) for name, value in figures.items()}


_EXPECTED = "expected the loss, a dict with 'loss', or (loss, a dict of its terms)"


def _figure(name: Any, value: Any) -> Tensor:
    return figure_of("training_step", name, value)


def figure_of(method: str, name: Any, value: Any) -> Tensor:
    """A figure that a method returned, as a scalar tensor.

    Raises:
        TypeError: It is not one number.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{method} returned {found} for {name!r}; expected one number")


def trained(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """The parameters of an optimizer that are trained now, in the order of its groups."""
    return [item for group in optimizer.param_groups for item in group["params"] if item.requires_grad]
