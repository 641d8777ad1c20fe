"""get_lr_scheduler: the learning rate of each step, warm-up included."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

from ml_collections import ConfigDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dtrain.config.build import build
from dtrain.config.errors import to_plain
from dtrain.config.optimizers import ONE
from dtrain.config.schema import Call, calls, has_several, refused
from dtrain.training.optimizer import Built

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
        names: Sequence[str] = (),
    ) -> None:
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval
        self.warmup_steps, self.warmup_start, self.plan = warmup_steps, warmup_start, plan
        self.ticks = {"step": 0, "epoch": 0, "validation": 0}
        self.is_held = False  # another sets the rates from now on
        settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self._settings_at_start = copy.deepcopy(settings)
        self._names = [*names] if len(set(names)) > 1 and len(names) == len(settings) else []  # of the groups' rates
        self.rates: list[float] = []  # of the groups in the last step, where there are several
        self.last_rate = 0.0  # of the first group in the last step, where there are several optimizers

    def rate(self, step: int) -> float:
        """The first group's learning rate in optimizer step `step` (from 0)."""
        return float(self.optimizer.param_groups[0]["lr"]) * self._factor(step)

    def rate_of(self, step: int) -> AbstractContextManager[float]:
        """A context with the rates of a step, in which the optimizer steps; it gives the first group's."""
        if self._names:
            factor = self._factor(step)
            self.rates = [float(group["lr"]) * factor for group in self.optimizer.param_groups]
        if step >= self.warmup_steps:
            return nullcontext(float(self.optimizer.param_groups[0]["lr"]))
        return self._warming_up(self._factor(step))

    def rates_by_group(self) -> dict[str, float]:
        """The rates of the last step, by the names of groups; nothing where all are the same."""
        first = {float(settings["lr"]) for settings in self._settings_at_start}
        if len(first) == 1 and len(set(self.rates)) < 2:
            return {}
        return dict(zip(self._names, self.rates, strict=False))

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

    def hold(self) -> None:
        """Let the scheduler stand still: another sets the rates from now on."""
        self.is_held = True

    def tick(self, clock: str, score: float | None = None) -> None:
        """Something ended: a 'step', an 'epoch' or a 'validation'. The scheduler steps if that is its clock."""
        if self.is_held:
            return
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
        state = {"scheduler": scheduler, "ticks": dict(self.ticks), "plan": self.plan, "first_rates": rates}
        return state | ({"rates": [*self.rates]} if self.rates else {})

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
            first_rates, count = state.get("first_rates") or [rate], len(self._settings_at_start)
            # Other groups than before have all the first one's rate so far.
            self._keep_reductions(first_rates if len(first_rates) == count else [first_rates[0]] * count)
        else:
            for group, settings in zip(self.optimizer.param_groups, self._settings_at_start, strict=True):
                group.update(settings)
            for _ in range(reached[self.interval]):
                self.tick(self.interval)
        self.ticks, rates = dict(reached), state.get("rates", [])
        self.rates = [*rates] if len(rates) == len(self._names) else []

    def _keep_reductions(self, first_rates: list[float | None]) -> None:
        """Let the settings of now hold; each rate is as much below its first one as it was, where that is known."""
        for group, settings, first in zip(
            self.optimizer.param_groups, self._settings_at_start, first_rates, strict=True
        ):
            reduction = group["lr"] / first if first else 1.0
            group.update(settings | {"lr": settings["lr"] * reduction})


class Schedules:
    """The schedules of several optimizers, by name; its methods are those of `Schedule`."""

    def __init__(self, of: Mapping[str, Schedule]) -> None:
        self.of = dict(of)

    def rate(self, step: int) -> float:
        """The learning rate of the first optimizer's first group in optimizer step `step` (from 0)."""
        return next(iter(self.of.values())).rate(step)

    @contextmanager
    def rate_of(self, step: int) -> Iterator[float]:
        """A context with the rates of a step, in which the optimizers step; it gives the first one's."""
        with ExitStack() as stack:
            for schedule in self.of.values():
                schedule.last_rate = stack.enter_context(schedule.rate_of(step))
            yield next(iter(self.of.values())).last_rate

    def rates_by_group(self) -> dict[str, float]:
        """The rates of the last step: of each optimizer's first group by its name, of others by both names."""
        found: dict[str, float] = {}
        for name, schedule in self.of.items():
            found[name] = schedule.last_rate
            found |= {f"{name}/{group}": rate for group, rate in schedule.rates_by_group().items()}
        return found

    def hold(self) -> None:
        """Let all schedulers stand still: another sets the rates from now on."""
        for schedule in self.of.values():
            schedule.hold()

    def tick(self, clock: str, score: float | None = None) -> None:
        """Something ended: a 'step', an 'epoch' or a 'validation'; each scheduler steps if that is its clock."""
        for schedule in self.of.values():
            schedule.tick(clock, score)

    def state_dict(self) -> dict[str, Any]:
        """The states by name."""
        return {name: schedule.state_dict() | {"rate": schedule.last_rate} for name, schedule in self.of.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved states, after the optimizers have loaded their own."""
        for name, schedule in self.of.items():
            schedule.load_state_dict(state[name])
            schedule.last_rate = state[name]["rate"]


def get_schedule(
    config: ConfigDict, optimizers: Mapping[str, Built], steps: int, epochs: int, mode: str | None = None
) -> Schedule | Schedules:
    """The schedule of the only optimizer, or those of all. See `get_lr_scheduler`."""
    schedules = {}
    for name, built in optimizers.items():
        names = [group.rate_name for group in built.groups]
        call = calls(config).get(_key(config, name))
        if call and any(isinstance(value, list) and len(value) == len(names) for value in call.arguments.values()):
            names = [group.name for group in built.groups]  # it has a list of one value for each group
        schedules[name] = get_lr_scheduler(config, built.optimizer, steps, epochs, mode, name=name, groups=names)
    return Schedules(schedules) if [*schedules] != [ONE] else schedules[ONE]


def _key(config: ConfigDict, name: str) -> str:
    """The key of the call that schedules an optimizer: one of its own, or that of all."""
    own = f"lr_scheduler.{name}"
    return own if f"{own}.schedule" in calls(config) else "lr_scheduler"


def get_lr_scheduler(
    config: ConfigDict,
    optimizer: Optimizer,
    steps: int,
    epochs: int,
    mode: str | None = None,
    *,
    name: str = ONE,
    groups: Sequence[str] = (),
) -> Schedule:
    """Build `lr_scheduler`, or an optimizer's own one of several, which drives the optimizer.

    `steps` and `epochs` are those of the whole training: T_max, total_steps and PolynomialLR's total_iters are filled
    with one of the two, by `interval`, and ReduceLROnPlateau's mode with `mode`, min | max, which is what a good
    validation score is; all of them where the config leaves them out. `groups` names the groups' rates.

    Raises:
        ConfigError: The name or an argument is wrong, or nothing drives the scheduler.
    """
    key = _key(config, name)
    if key not in calls(config):
        return Schedule(optimizer, plan=_plan(config, name, {}), names=groups)
    options = build(config, f"{key}.schedule")
    call, length = calls(config)[key], steps if options["interval"] == "step" else epochs
    lengths = {key: length for key in call.filled if key not in call.arguments and "epochs" not in call.arguments}
    scheduler = build(config, key, optimizer, **lengths)
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau):
        text = f"{call.name} made a {type(scheduler).__name__}; expected a scheduler of torch.optim"
        raise refused(config, call.path_of("name"), text)
    on_plateau = isinstance(scheduler, ReduceLROnPlateau)
    if on_plateau and mode and "mode" not in call.arguments and "mode" in getattr(call.target, "keywords", {"mode"}):
        scheduler = build(config, key, optimizer, mode=mode)
    options["interval"] = _interval(call, options["interval"], on_plateau)
    return Schedule(optimizer, scheduler, **options, plan=_plan(config, name, lengths), names=groups)


def _interval(call: Call, wish: str | None, on_plateau: bool) -> str:
    """When the scheduler steps."""
    if on_plateau and wish not in (None, "validation"):
        text = "ReduceLROnPlateau needs a score, so it steps after each validation; remove 'interval'"
        raise refused(call.config, (*call.path, "interval"), text)
    interval = wish or ("validation" if on_plateau else "epoch")
    if interval == "validation" and call.config.loaders.get("val") is None:
        text = f"{call.name} steps after each validation, but 'loaders' has no 'val'"
        raise refused(call.config, call.path, text)
    return interval


def _plan(config: ConfigDict, name: str, lengths: dict[str, int]) -> str:
    """Everything that the rate follows from, as one text that can be compared."""
    optimizer, scheduler = to_plain(config.optimizer), to_plain(config.get("lr_scheduler"))
    if name != ONE:
        optimizer = optimizer[name]
        scheduler = scheduler.get(name) if has_several(scheduler) else scheduler
    return json.dumps([optimizer, scheduler, lengths], sort_keys=True, default=str)
