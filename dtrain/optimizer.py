"""get_optimizer and get_lr_scheduler: what moves the weights and how fast; knows no loop, no rank, no checkpoint."""

import copy
import inspect
import json
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from ml_collections import ConfigDict
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dtrain.build import build
from dtrain.config import to_plain
from dtrain.sections import calls, refused
from dtrain.shards import is_shard, local_part

# What ReduceLROnPlateau learns on its way; the rest of its state is its arguments.
_LEARNT = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch"}


def get_optimizer(config: ConfigDict, model: torch.nn.Module) -> Optimizer:
    """Build `optimizer` over the parameters that are trained.

    On a GPU, torch's fused kernels are used where the optimizer has them and the config says nothing: they are the
    fastest, and skip a step with a non-finite gradient without asking the host.

    Raises:
        ConfigError: The name or an argument is wrong, or there is nothing to train.
    """
    parameters = [item for item in model.parameters() if item.requires_grad]
    if not parameters:
        raise refused(config, ("model",), "has no parameters to train")
    optimizer = build(config, "optimizer", parameters)
    if not isinstance(optimizer, Optimizer):
        text = f"{config.optimizer.name} made a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        raise refused(config, ("optimizer", "name"), text)
    if any(item.default is item.empty for item in inspect.signature(optimizer.step).parameters.values()):
        text = f"{config.optimizer.name} evaluates the loss itself, several times per step; that loop is not this one"
        raise refused(config, ("optimizer", "name"), text)
    on_gpu = parameters[0].device.type == "cuda"
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(config.optimizer)
    if on_gpu and not chosen and "fused" in optimizer.defaults and type(optimizer).__module__.startswith("torch."):
        optimizer = build(config, "optimizer", parameters, fused=True)
    _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: Optimizer) -> None:
    """Let fused SGD's momentum begin at zero, from which the first step makes the gradient, as without it.

    torch leaves it as whatever lay in memory where the first step is skipped (torch/optim/sgd.py, _fused_sgd), as
    fp16's often is. With dampening zero would be another beginning: there the host looks before it steps.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        if not group["fused"] or not group["momentum"]:
            continue
        if group["dampening"]:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector; torch's own function sorts them first, which takes as long again."""
    if len({item.dtype for item in gradients}) > 1:
        return get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


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


class KeptBuffers:
    """Buffers of floating point as they were after the last good step; a step that is skipped has them put back.

    A forward with NaN would leave it in running statistics for good. Sparse and expanded ones are constants.

    Args:
        buffers: A module's; none, where a bad step ends the training.
    """

    def __init__(self, buffers: Iterable[torch.Tensor]) -> None:
        plain = [buffer for buffer in buffers if buffer.is_floating_point() and buffer.layout == torch.strided]
        self._pairs = [(buffer, buffer.detach().clone()) for buffer in plain if 0 not in buffer.stride()]

    @torch.no_grad()
    def after_step(self, norm: torch.Tensor) -> None:
        """Keep them, or put them back where the norm of the gradients is not finite; the host does not wait for it."""
        if not self._pairs:
            return
        is_good = torch.isfinite(norm)
        for buffer, kept in self._pairs:
            kept.copy_(torch.where(is_good, buffer, kept))
            buffer.copy_(kept)


class WeightAverage:
    """An exponential moving average of a module's parameters and buffers; whole numbers are taken as they are.

    torch's AveragedModel keeps its count in a tensor, for which the host waits for the device in every step.

    Args:
        module: A copy of what is averaged; it becomes the average.
        decay: The old average's share, from 0 to 1. The first update is a copy.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module.requires_grad_(False), decay, 0
        self._of_shards = any(is_shard(item) for item in module.parameters())

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the weights of one more step in."""
        mine, theirs = ([*one.parameters(), *one.buffers()] for one in (self.module, module))
        if self._of_shards:
            mine, theirs = (list(map(local_part, one)) for one in (mine, theirs))
        averages: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for average, weight in zip(mine, theirs, strict=True):
            if self.updates and (average.is_floating_point() or average.is_complex()):
                averages.append(average)
                weights.append(weight)
            else:
                average.copy_(weight)
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.updates += 1


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

    def _factor(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        return self.warmup_start + (1 - self.warmup_start) * (step + 1) / self.warmup_steps

    def apply(self, step: int, take: Any) -> None:
        """Call `take()` (the optimizer's step) with the rate of this step."""
        if step >= self.warmup_steps:
            take()
            return
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self._factor(step)
        take()
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
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score if score is not None else float("nan"))
            else:
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, how far it came, and what it was planned from; the warm-up has none."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else {}
        return {"scheduler": scheduler, "ticks": dict(self.ticks), "plan": self.plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, after the optimizer has loaded its own.

        Where the plan has changed (another length, another rate in the config), the new one holds: the schedule is run
        through to the point that was reached, as if it had been so from the start.
        """
        reached = state["ticks"]
        if self.plan == state["plan"]:
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        elif isinstance(self.scheduler, ReduceLROnPlateau):  # what it did follows from scores that are gone
            self.scheduler.load_state_dict(
                {key: state["scheduler"][key] for key in _LEARNT & state["scheduler"].keys()}
            )
        else:
            for group, settings in zip(self.optimizer.param_groups, self._settings_at_start, strict=True):
                group.update(settings)
            for _ in range(reached[self.interval]):
                self.tick(self.interval)
        self.ticks = dict(reached)


def get_lr_scheduler(
    config: ConfigDict, optimizer: Optimizer, steps: int, epochs: int, mode: str | None = None
) -> Schedule:
    """Build `lr_scheduler`.

    Args:
        config: The whole config.
        optimizer: What it drives.
        steps: Optimizer steps of the whole training.
        epochs: Epochs of the whole training. T_max, total_steps and PolynomialLR's total_iters are filled with one of
            the two, by `interval`, where the config leaves them out.
        mode: min | max, what a good validation score is; ReduceLROnPlateau's, where the config leaves it out.

    Raises:
        ConfigError: The name or an argument is wrong, or nothing drives the scheduler.
    """
    if config.get("lr_scheduler") is None:
        return Schedule(optimizer, plan=_plan(config, {}))
    options = build(config, "lr_scheduler.schedule")
    lengths = _lengths(config, steps if options["interval"] == "step" else epochs)
    scheduler = build(config, "lr_scheduler", optimizer, **lengths)
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau):
        text = f"{config.lr_scheduler.name} made a {type(scheduler).__name__}; expected a scheduler of torch.optim"
        raise refused(config, ("lr_scheduler", "name"), text)
    on_plateau = isinstance(scheduler, ReduceLROnPlateau)
    if on_plateau and mode and "mode" not in config.lr_scheduler:
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


def _lengths(config: ConfigDict, length: int) -> dict[str, int]:
    """The schedule's length where its scheduler needs one and the config does not say it."""
    call = calls(config, "lr_scheduler")["lr_scheduler"]
    return {key: length for key in call.filled if key not in call.arguments and "epochs" not in call.arguments}


def end_points(config: ConfigDict, optimizer: Optimizer, schedule: Schedule, steps: int, epochs: int) -> str:
    """The learning rate of the first and the last step, found by running a copy of the schedule."""
    first = schedule.rate(0)
    ticks = {"step": steps, "epoch": epochs}.get(schedule.interval, 0)
    if schedule.scheduler is None:
        return f"{first:.3g}" + (f" to {schedule.rate(steps - 1):.3g}" if schedule.warmup_steps else "")
    if not 0 < ticks <= 20_000:
        return f"{first:.3g}, then by {type(schedule.scheduler).__name__}"
    rate = float(optimizer.param_groups[0]["initial_lr"])
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9)
    try:
        probed = get_lr_scheduler(config, probe, steps, epochs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(ticks - 1):
                probed.tick(schedule.interval)
        return f"{first:.3g} to {probed.rate(steps - 1):.3g}"
    except Exception:  # a scheduler that wants this very optimizer; the table can do without
        return f"{first:.3g}, then by {type(schedule.scheduler).__name__}"
