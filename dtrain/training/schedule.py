"""get_lr_scheduler: the learning rate of each step, warm-up included."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from ml_collections import ConfigDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dtrain.config.build import build
from dtrain.config.errors import to_plain
from dtrain.config.schema import calls, refused

# What ReduceLROnPlateau learns on its way; the rest of its state is its arguments.
_LEARNED = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch"}


def schedule_settings(
    *, interval: Literal["epoch", "step", "validation"] | None = None, warmup_steps: int = 0, warmup_start: float = 0.0
) -> dict[str, Any]:
    """Dtrain's own keys under `lr_scheduler`; the other keys are the scheduler's.

    Args:
        interval: When the scheduler steps: after each optimizer step, epoch or validation. Default: epoch, and
            validation for ReduceLROnPlateau.
        warmup_steps: Optimizer steps over which the rate rises linearly from `warmup_start` times itself to itself.
        warmup_start: The factor at the first step; 0 starts at one part in warmup_steps.
    """
    return dict(locals())


class Schedule:
    """A learning-rate scheduler with its clock. torch's scheduler (if any) knows nothing of warm-up.

    During warm-up the rate that the scheduler chose is multiplied by a factor that depends on the step alone, and only
    while the optimizer steps; so schedulers that compute the next rate from the present one are not disturbed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Any = None,
        interval: str = "epoch",
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        plan: str = "",
    ) -> None:
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval
        self.warmup_steps, self.warmup_start, self.plan = warmup_steps, warmup_start, plan
        self.ticks = {"step": 0, "epoch": 0, "validation": 0}
        settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self._settings_at_start = copy.deepcopy(settings)

    def rate(self, step: int) -> float:
        """The first group's learning rate in optimizer step `step` (from 0)."""
        return float(self.optimizer.param_groups[0]["lr"]) * self._factor(step)

    def rate_of(self, step: int) -> AbstractContextManager[float]:
        """A context with the rates of a step, in which the optimizer steps; it gives the first group's."""
        if step >= self.warmup_steps:
            return nullcontext(float(self.optimizer.param_groups[0]["lr"]))
        return self._warming_up(self._factor(step))

    def _factor(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        return self.warmup_start + (1 - self.warmup_start) * (step + 1) / self.warmup_steps

    @contextmanager
    def _warming_up(self, factor: float) -> Iterator[float]:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * factor
        try:
            yield float(groups[0]["lr"])
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def tick(self, clock: str, score: float | None = None) -> None:
        """Something ended: a 'step', an 'epoch' or a 'validation'. The scheduler steps if that is its clock."""
        self.ticks[clock] += 1
        if self.scheduler is None or clock != self.interval:
            return
        with warnings.catch_warnings():
            # A first step that was skipped for its gradient makes torch believe that the order of calls is wrong.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            if not isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step()
            elif score is not None:  # else the validation measured something else
                self.scheduler.step(score)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, how far it came, and what it was planned from; the warm-up has none."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else {}
        rates = [float(settings["lr"]) for settings in self._settings_at_start]
        return {"scheduler": scheduler, "ticks": dict(self.ticks), "plan": self.plan, "first_rates": rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state, after the optimizer has loaded its own.

        Where the plan has changed (another length, another rate in the config), the new one holds: the schedule is run
        through to the point that was reached, as if it had been so from the start.
        """
        reached, scheduler = state["ticks"], state["scheduler"]
        if self.plan == state["plan"]:
            if self.scheduler is not None:
                self.scheduler.load_state_dict(scheduler)
        elif isinstance(self.scheduler, ReduceLROnPlateau):  # what it did follows from scores that are gone
            self.scheduler.load_state_dict({key: scheduler[key] for key in _LEARNED & scheduler.keys()})
            # A checkpoint of before has the rate in its plan alone.
            rate = json.loads(state["plan"])[0].get("lr")
            self._keep_reductions(state.get("first_rates") or [rate] * len(self._settings_at_start))
        else:
            for group, settings in zip(self.optimizer.param_groups, self._settings_at_start, strict=True):
                group.update(settings)
            for _ in range(reached[self.interval]):
                self.tick(self.interval)
        self.ticks = dict(reached)

    def _keep_reductions(self, first_rates: list[float | None]) -> None:
        """Let the settings of now hold; each rate is as much below its first one as it was, where that is known."""
        for group, settings, first in zip(
            self.optimizer.param_groups, self._settings_at_start, first_rates, strict=True
        ):
            reduction = group["lr"] / first if first else 1.0
            group.update(settings | {"lr": settings["lr"] * reduction})


def get_lr_scheduler(
    config: ConfigDict, optimizer: Optimizer, steps: int, epochs: int, mode: str | None = None
) -> Schedule:
    """Build `lr_scheduler`, which drives the optimizer.

    `steps` and `epochs` are those of the whole training: T_max, total_steps and PolynomialLR's total_iters are filled
    with one of the two, by `interval`, and ReduceLROnPlateau's mode with `mode`, min | max, which is what a good
    validation score is; all of them where the config leaves them out.

    Raises:
        ConfigError: The name or an argument is wrong, or nothing drives the scheduler.
    """
    if config.get("lr_scheduler") is None:
        return Schedule(optimizer, plan=_plan(config, {}))
    options = build(config, "lr_scheduler.schedule")
    call, length = calls(config)["lr_scheduler"], steps if options["interval"] == "step" else epochs
    lengths = {key: length for key in call.filled if key not in call.arguments and "epochs" not in call.arguments}
    scheduler = build(config, "lr_scheduler", optimizer, **lengths)
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau):
        text = f"{config.lr_scheduler.name} made a {type(scheduler).__name__}; expected a scheduler of torch.optim"
        raise refused(config, ("lr_scheduler", "name"), text)
    on_plateau = isinstance(scheduler, ReduceLROnPlateau)
    if on_plateau and mode and "mode" not in call.arguments and "mode" in getattr(call.target, "keywords", {"mode"}):
        scheduler = build(config, "lr_scheduler", optimizer, mode=mode)
    options["interval"] = _interval(config, options["interval"], on_plateau)
    return Schedule(optimizer, scheduler, **options, plan=_plan(config, lengths))


def _interval(config: ConfigDict, wish: str | None, on_plateau: bool) -> str:
    """When the scheduler steps."""
    if on_plateau and wish not in (None, "validation"):
        text = "ReduceLROnPlateau needs a score, so it steps after each validation; remove 'interval'"
        raise refused(config, ("lr_scheduler", "interval"), text)
    interval = wish or ("validation" if on_plateau else "epoch")
    if interval == "validation" and config.loaders.get("val") is None:
        text = f"{config.lr_scheduler.name} steps after each validation, but 'loaders' has no 'val'"
        raise refused(config, ("lr_scheduler",), text)
    return interval


def _plan(config: ConfigDict, lengths: dict[str, int]) -> str:
    """Everything that the rate follows from, as one text that can be compared."""
    parts = [to_plain(config.optimizer), to_plain(config.get("lr_scheduler")), lengths]
    return json.dumps(parts, sort_keys=True, default=str)


def end_points(config: ConfigDict, optimizer: Optimizer, schedule: Schedule, steps: int, epochs: int) -> str:
    """The learning rate of the first and the last step, found by running a copy of the schedule."""
    first = schedule.rate(0)
    ticks = {"step": steps, "epoch": epochs}.get(schedule.interval, 0)
    if schedule.scheduler is None:
        return f"{first:.3g}" + (f" to {schedule.rate(steps - 1):.3g}" if schedule.warmup_steps else "")
    if 0 < ticks <= 20_000:
        rate = float(optimizer.param_groups[0]["initial_lr"])
        probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9)
        with suppress(Exception):  # a scheduler may want this very optimizer; the table can do without
            probed = get_lr_scheduler(config, probe, steps, epochs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(ticks - 1):
                    probed.tick(schedule.interval)
            return f"{first:.3g} to {probed.rate(steps - 1):.3g}"
    return f"{first:.3g}, then by {type(schedule.scheduler).__name__}"
