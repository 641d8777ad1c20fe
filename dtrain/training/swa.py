"""Stochastic weight averaging: the mean of the weights at epochs' ends, with BatchNorm's statistics of that mean."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.data import rng
from dtrain.dataloader import MicroBatch, TrainLoader
from dtrain.distributed.ranks import Ranks
from dtrain.modelloader import Forward
from dtrain.training.ema import EMA
from dtrain.training.state import Trainables, TrainState


def swa_settings(*, start_epoch: int, lr: float | None = None, anneal_epochs: int = 10) -> dict[str, Any]:
    """The keys under `trainer.swa`.

    Args:
        start_epoch: The first epoch, counted from 1, at whose end the weights are taken into the average.
        lr: The learning rate that is kept from then on, instead of the scheduler's. Default: the scheduler's own.
        anneal_epochs: Over so many epochs from `start_epoch` on the rate goes there, along a cosine.
    """
    return dict(locals())


class SWA(EMA):
    """The equal average of the weights at the ends of epochs from `start_epoch` on (Izmailov et al., 2018).

    Until the first of them the model itself is evaluated. See `swa_settings`.
    """

    def __init__(self, module: Module, start_epoch: int, lr: float | None = None, anneal_epochs: int = 10) -> None:
        super().__init__(module, decay=1.0)
        self.start_epoch, self.lr, self.anneal_epochs = start_epoch, lr, anneal_epochs

    @property
    def is_ready(self) -> bool:
        """Whether it holds the weights of an epoch."""
        return self.updates > 0

    def resume(self, updates: int, averaged_epoch: int) -> None:
        """Continue an average; one of every step's weights (EMA) is none of epochs' ends."""
        self.updates = updates if averaged_epoch >= 0 else 0

    def kept_share(self) -> float:
        """The old average's share in the next one."""
        return self.updates / (self.updates + 1)

    def begin_epoch(self, trainables: Trainables, state: TrainState) -> None:
        """Set the learning rate of an epoch, the scheduler's from then on standing still; torch's SWALR, by a formula.

        The rates from which it began are in the state, so that a training resumes exactly.
        """
        number = state.epoch + 1 - self.start_epoch  # of this epoch among those with a rate of their own
        if self.lr is None or number < 0:
            return
        groups = [group for optimizer in trainables.optimizers.values() for group in optimizer.param_groups]
        if len(state.swa_rates) != len(groups):
            state.swa_rates = [float(group["lr"]) for group in groups]
        trainables.schedule.hold()  # type: ignore[union-attr]
        share = min(1.0, number / self.anneal_epochs) if self.anneal_epochs else 1.0
        way = (1 - math.cos(math.pi * share)) / 2
        first = state.swa_rates[0]
        for group, rate in zip(groups, state.swa_rates, strict=True):
            group["lr"] = rate + (self.lr * rate / first - rate) * way  # groups keep their ratios

    def end_epoch(
        self,
        trainables: Trainables,
        loader: TrainLoader,
        forward: Forward,
        ranks: Ranks,
        state: TrainState,
        stop: Callable[[], bool],
    ) -> bool:
        """Take the weights of an epoch's end into the average, and give it BatchNorm's statistics. All ranks call it.

        Returns:
            False where a rank was asked to stop meanwhile: then the epoch's end comes again when the training resumes.
        """
        if state.averaged_epoch < state.epoch:  # else it comes again
            state.averaged_epoch = state.epoch
            self.update(trainables.module)
            if trainables.loss is not None and trainables.loss_ema:
                trainables.loss_ema.update(trainables.loss)
        micros = loader.epoch(state.epoch, 0, state.order)
        # Where the ranks exchange something for each batch, they cannot leave at different times.
        exchanges = loader.may_leave_out or any(isinstance(part, SyncBatchNorm) for part in self.module.modules())
        for part, trained in zip(self.module.modules(), trainables.module.modules(), strict=True):
            part.training = trained.training  # what is frozen keeps its statistics
        is_done = update_batchnorm(self.module, forward, micros, ranks, bool if exchanges else stop)
        self.module.eval()
        return is_done

    def is_due(self, state: TrainState) -> bool:
        """Whether the epoch that ends now is one of those whose weights are averaged."""
        return state.epoch + 1 >= self.start_epoch


@torch.no_grad()
@rng.untouched()
def update_batchnorm(
    module: Module, forward: Forward, micros: Iterable[MicroBatch], ranks: Ranks, stop: Callable[[], bool]
) -> bool:
    """Give BatchNorm the statistics of an epoch's batches, as torch's `update_bn` does, over the batches of all ranks.

    The module's parts that train are in train mode. Each batch counts by its samples; sums are reduced once, so every
    rank gets the same. All ranks call it.

    Returns:
        False where a rank was asked to stop meanwhile; then the statistics are as they were.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    norms = [part for part in norms if part.running_mean is not None]
    if not norms:
        return True
    before = [(part.momentum, part.running_mean.clone(), part.running_var.clone()) for part in norms]  # type: ignore[union-attr]
    sums: list[Tensor] = [
        value.new_zeros(value.shape, dtype=_sum_dtype(value)) for part in norms for value in _statistics(part)
    ]
    samples, stopped = 0, False
    for part in norms:
        part.momentum = 1.0  # running statistics are then the last batch's
        part.reset_running_stats()
    for batch, count, stopped in _rounds(micros, ranks, stop):
        if stopped:
            break
        if batch is not None:
            forward.only(module, batch)
            samples += count
            for total, value in zip(sums, (value for part in norms for value in _statistics(part)), strict=True):
                total.add_(value, alpha=count)
    counts = ranks.sum_(torch.tensor([samples, stopped], device=ranks.device))
    whole, is_stopped = counts.tolist()
    means = [ranks.sum_(total) / whole for total in sums] if not is_stopped else []
    for index, (part, (momentum, mean, variance)) in enumerate(zip(norms, before, strict=True)):
        part.momentum = momentum
        part.running_mean.copy_(mean if is_stopped else means[2 * index])  # type: ignore[union-attr]
        part.running_var.copy_(variance if is_stopped else means[2 * index + 1])  # type: ignore[union-attr]
    return not is_stopped


def _statistics(part: Any) -> tuple[Tensor, Tensor]:
    return part.running_mean, part.running_var


def _sum_dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64


def _rounds(micros: Iterable[MicroBatch], ranks: Ranks, stop: Callable[[], bool]) -> Iterator[tuple[Any, int, bool]]:
    """This rank's batches, each with its samples and whether to stop before it, with shards on all ranks alike."""
    if ranks.strategy.is_sharded:
        yield from ranks.strategy.rounds(((micro.batch, micro.samples) for micro in micros), stop)
    else:
        for micro in micros:
            yield micro.batch, micro.samples, stop()
