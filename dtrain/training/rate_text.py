"""The learning rate in a line: the one that was typed, then how it moves, found by running a copy of the schedule."""

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.config.optimizers import ONE
from dtrain.training.schedule import Schedule, Schedules

Again = Callable[..., Schedule]  # `get_lr_scheduler` of the config: makes the schedule for another optimizer
_MOST_TICKS = 20_000  # that are run through
# What people call it. These move towards a rate that they reach when all their ticks are done.
_TOWARDS = {"CosineAnnealingLR": "cosine", "LinearLR": "linear", "PolynomialLR": "polynomial"}
_OTHERS = {
    "OneCycleLR": "one cycle",
    "ExponentialLR": "exponential",
    "CosineAnnealingWarmRestarts": "cosine",
}  # restarted


def rate_text(again: Again, schedule: Schedule | Schedules, steps: int, epochs: int) -> str:
    """`0.001, warm-up 20 steps, cosine to 0`; of several optimizers each behind its name."""
    if isinstance(schedule, Schedules):
        return "; ".join(f"{name} {_text(again, one, steps, epochs, name)}" for name, one in schedule.of.items())
    return _text(again, schedule, steps, epochs, ONE)


def _text(again: Again, schedule: Schedule, steps: int, epochs: int, name: str) -> str:
    group = schedule.optimizer.param_groups[0]
    parts = [f"{float(group.get('initial_lr', group['lr'])):.6g}"]
    if schedule.warmup_steps:
        start = f" from {schedule.warmup_start:g} times it" if schedule.warmup_start else ""
        parts.append(f"warm-up {schedule.warmup_steps:,} steps{start}")
    if schedule.scheduler is not None:
        parts.append(_movement(again, schedule, steps, epochs, name))
    return ", ".join(parts)


def _movement(again: Again, schedule: Schedule, steps: int, epochs: int, name: str) -> str:
    kind = type(schedule.scheduler).__name__
    if isinstance(schedule.scheduler, ReduceLROnPlateau):
        plateau = schedule.scheduler
        return f"times {plateau.factor:g} after {plateau.patience + 1} {schedule.interval}s without improvement"
    ticks = {"step": steps, "epoch": epochs}.get(schedule.interval, 0)
    rates = _rates(again, schedule, steps, epochs, name, ticks - (kind not in _TOWARDS))
    if not rates:
        return f"then by {kind}"
    typed, end = float(schedule.optimizer.param_groups[0]["initial_lr"]), rates[-1]
    text = (_TOWARDS | _OTHERS).get(kind, kind)
    if not _same(rates[0], typed):
        text += f" from {rates[0]:.3g}"
    if (top := max(rates)) > max(rates[0], end) and not _same(top, max(rates[0], end)):
        text += f" up to {top:.3g}"
    if (low := min(rates)) < min(rates[0], end) and not _same(low, min(rates[0], end)):
        text += f" down to {low:.3g},"
    return f"{text} to {0 if abs(end) < 1e-9 * top else end:.3g}"


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def _rates(again: Again, schedule: Schedule, steps: int, epochs: int, name: str, ticks: int) -> list[float]:
    """The first group's rate at the start and after each tick, without warm-up; none where that cannot be known."""
    if not 0 <= ticks <= _MOST_TICKS:
        return []
    groups = schedule.optimizer.param_groups
    settings = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": float(group["initial_lr"])} for group in groups]
    probe = torch.optim.SGD(settings, momentum=0.9)
    with suppress(Exception), warnings.catch_warnings():  # a scheduler may want this very optimizer
        warnings.simplefilter("ignore")
        probed = again(probe, steps, epochs, name=name)
        rates = [float(probe.param_groups[0]["lr"])]
        for _ in range(ticks):
            probed.tick(schedule.interval)
            rates.append(float(probe.param_groups[0]["lr"]))
        return rates
    return []
