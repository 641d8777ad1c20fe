"""Optimizers and schedules by name: clocks, warm-up, lengths filled in, in words, going on after a stop."""

# ruff: noqa: E501 - a case of a table is one line

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.training.ema import EMA
from dtrain.training.optimizer import get_optimizer
from dtrain.training.rate_text import rate_text
from dtrain.training.schedule import Schedule, get_lr_scheduler

RATE = 0.1
STEPS, EPOCHS = 40, 4  # 10 steps per epoch


# What a user's module holds. `modules: [test_optimizer]` finds it here.


class Halving(LRScheduler):
    """A user's own scheduler, which computes the next rate from the present one."""

    def get_lr(self) -> list[float]:
        return [group["lr"] * (0.5 if self.last_epoch else 1.0) for group in self.optimizer.param_groups]


def not_an_optimizer(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return parameters


def not_a_scheduler(optimizer: Optimizer) -> Optimizer:
    return optimizer


def config_of(optimizer: dict[str, Any] | None = None, val: bool = True, **lr_scheduler: Any) -> ConfigDict:
    sections: dict[str, Any] = {
        "modules": ["test_optimizer"],
        "model": {"name": "Linear", "in_features": 2, "out_features": 1},
        "loss": {"name": "MSELoss"},
        "loaders": {"name": "TensorDataset", "train": {}} | ({"val": {}} if val else {}),
        "optimizer": optimizer or {"name": "SGD", "lr": RATE},
        "trainer": {"max_epochs": EPOCHS},
    }
    return from_mapping(sections | ({"lr_scheduler": lr_scheduler} if lr_scheduler else {}))


def schedule_of(
    steps: int = STEPS, epochs: int = EPOCHS, mode_of_monitor: str | None = None, **settings: Any
) -> Schedule:
    """A schedule with an optimizer of its own, as create_trainer makes them."""
    config = config_of(**settings)
    return get_lr_scheduler(config, get_optimizer(config, nn.Linear(2, 1)), steps, epochs, mode_of_monitor)


def run(
    schedule: Schedule, steps: int, first: int = 0, per_epoch: int = 10, scores: Callable[[int], float] | None = None
) -> list[float]:
    """The rate that acts in each step, the clocks ticking as in the loop."""
    rates: list[float] = []

    for step in range(first, first + steps):
        with schedule.rate_of(step) as logged:
            rates.append(schedule.optimizer.param_groups[0]["lr"])
            schedule.optimizer.step()
        assert rates[-1] == logged == schedule.rate(step), "the rate that is logged is the one that acts"
        schedule.tick("step")
        if (step + 1) % per_epoch == 0:
            schedule.tick("epoch")
            schedule.tick("validation", scores((step + 1) // per_epoch) if scores else 1.0)
    return rates


def cosine(progress: float, rate: float = RATE) -> float:
    return rate * (1 + math.cos(math.pi * progress)) / 2


# The optimizer


def test_an_optimizer_by_name_gets_the_parameters_that_are_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = get_optimizer(config_of({"name": "AdamW", "lr": 1e-3, "betas": [0.8, 0.9]}), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert [id(item) for item in group["params"]] == [id(item) for item in model[1].parameters()]
    assert (group["lr"], tuple(group["betas"])) == (1e-3, (0.8, 0.9))


@pytest.mark.parametrize(
    ("optimizer", "model", "message"),
    [
        ({"name": "SGD", "lr": 0.1}, nn.ReLU(), "model: has no parameters to train"),
        ({"name": "not_an_optimizer"}, nn.Linear(1, 1), "made a list; expected a torch.optim.Optimizer"),
        ({"name": "SGD", "lr": -1.0}, nn.Linear(1, 1), "Invalid learning rate"),
    ],
)
def test_what_cannot_train_is_refused(optimizer: dict[str, Any], model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_optimizer(config_of(optimizer), model)


# The clocks


def test_without_a_scheduler_the_rate_stays() -> None:
    assert run(schedule_of(), STEPS) == [RATE] * STEPS


def test_a_scheduler_steps_per_epoch_unless_it_says_otherwise() -> None:
    expected = [RATE * 0.5 ** (step // 10) for step in range(STEPS)]
    assert run(schedule_of(name="ExponentialLR", gamma=0.5), STEPS) == pytest.approx(expected)
    assert run(schedule_of(name="ExponentialLR", gamma=0.5, interval="epoch"), STEPS) == pytest.approx(expected)
    assert run(schedule_of(name="ExponentialLR", gamma=0.5, interval="validation"), STEPS) == pytest.approx(expected)


def test_a_scheduler_per_step() -> None:
    rates = run(schedule_of(name="ExponentialLR", gamma=0.9, interval="step"), STEPS)
    assert rates == pytest.approx([RATE * 0.9**step for step in range(STEPS)])


def test_a_scheduler_per_validation_knows_no_epochs() -> None:
    schedule = schedule_of(name="ExponentialLR", gamma=0.5, interval="validation")
    schedule.tick("epoch")
    schedule.tick("step")
    assert schedule.rate(0) == RATE
    schedule.tick("validation", 0.3)
    assert schedule.rate(0) == RATE / 2


def test_a_users_own_scheduler() -> None:
    rates = run(schedule_of(name="Halving"), STEPS)
    assert rates == pytest.approx([RATE * 0.5 ** (step // 10) for step in range(STEPS)])


# Lengths


@pytest.mark.parametrize(("interval", "length"), [("epoch", EPOCHS), ("step", STEPS)])
@pytest.mark.parametrize(
    ("name", "key", "more"),
    [("CosineAnnealingLR", "T_max", {}), ("OneCycleLR", "total_steps", {"max_lr": 1.0}),
     ("PolynomialLR", "total_iters", {"power": 0.9})],
)  # fmt: skip
def test_the_length_is_filled_in(name: str, key: str, more: dict[str, float], interval: str, length: int) -> None:
    assert getattr(schedule_of(name=name, interval=interval, **more).scheduler, key) == length
    assert getattr(schedule_of(name=name, interval=interval, **more, **{key: 7}).scheduler, key) == 7


def test_onecycle_may_say_its_length_in_its_own_way() -> None:
    config = config_of(name="OneCycleLR", max_lr=1.0, interval="step", epochs=3, steps_per_epoch=5)
    schedule = get_lr_scheduler(config, get_optimizer(config, nn.Linear(2, 1)), STEPS, EPOCHS)
    assert schedule.scheduler.total_steps == 15


def test_cosine_reaches_its_end() -> None:
    rates = run(schedule_of(name="CosineAnnealingLR", interval="step"), STEPS)
    assert rates == pytest.approx([cosine(step / STEPS) for step in range(STEPS)])


# Warm-up


def test_warm_up_rises_linearly_to_the_rate() -> None:
    rates = run(schedule_of(name="ConstantLR", factor=1.0, warmup_steps=5), 8)
    assert rates == pytest.approx([RATE * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1)])
    rates = run(schedule_of(name="ConstantLR", factor=1.0, warmup_steps=4, warmup_start=0.5), 6)
    assert rates == pytest.approx([RATE * share for share in (0.625, 0.75, 0.875, 1, 1, 1)])


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "CosineAnnealingLR"},
        {"name": "ExponentialLR", "gamma": 0.95},
        {"name": "StepLR", "step_size": 3, "gamma": 0.5},
        {"name": "OneCycleLR", "max_lr": 1.0},
        {"name": "Halving"},
    ],
)
def test_warm_up_multiplies_any_scheduler_and_leaves_it_its_own_course(scheduler: dict[str, Any]) -> None:
    plain = run(schedule_of(**scheduler, interval="step"), STEPS)
    warmed = run(schedule_of(**scheduler, interval="step", warmup_steps=15), STEPS)
    assert warmed == pytest.approx([rate * min(1, (step + 1) / 15) for step, rate in enumerate(plain)])


def test_warm_up_changes_every_group_and_nothing_for_good() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = SGD([{"params": parameters[0], "lr": 1.0}, {"params": parameters[1], "lr": 0.01}])
    schedule = Schedule(optimizer, warmup_steps=4)
    with schedule.rate_of(0) as logged:
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.0025]
    assert logged == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.01]


# ReduceLROnPlateau


def test_plateau_steps_after_each_validation_with_its_score() -> None:
    schedule = schedule_of(name="ReduceLROnPlateau", patience=0, factor=0.5)
    assert schedule.interval == "validation"
    rates = run(schedule, STEPS, scores={1: 1.0, 2: 0.9, 3: 0.95, 4: 0.99}.__getitem__)
    assert [rates[step] for step in (0, 10, 20, 30)] == pytest.approx([RATE, RATE, RATE, RATE / 2])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_takes_good_and_bad_from_what_is_monitored(mode: str) -> None:
    schedule = schedule_of(name="ReduceLROnPlateau", patience=0, factor=0.5, mode_of_monitor=mode)
    assert schedule.scheduler.mode == mode
    for score in (0.1, 0.2, 0.3):
        schedule.tick("validation", score)
    assert schedule.rate(0) == pytest.approx(RATE if mode == "max" else RATE / 4)


def test_plateaus_own_mode_wins() -> None:
    assert schedule_of(name="ReduceLROnPlateau", mode="min", mode_of_monitor="max").scheduler.mode == "min"


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_plateau_on_another_clock_is_refused(interval: str) -> None:
    with pytest.raises(ConfigError, match="needs a score, so it steps after each validation; remove 'interval'"):
        schedule_of(name="ReduceLROnPlateau", interval=interval)


@pytest.mark.parametrize(
    "scheduler", [{"name": "ReduceLROnPlateau"}, {"name": "ExponentialLR", "gamma": 0.5, "interval": "validation"}]
)
def test_a_schedule_that_nothing_would_drive_is_refused(scheduler: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="steps after each validation, but 'loaders' has no 'val'"):
        schedule_of(val=False, **scheduler)


def test_what_is_no_scheduler_is_refused() -> None:
    with pytest.raises(ConfigError, match="made a SGD; expected a scheduler"):
        schedule_of(name="not_a_scheduler")


# Going on


def resumed(schedule: Schedule, **settings: Any) -> Schedule:
    """A new schedule that has loaded the state of another, as after a restart."""
    state = [schedule.optimizer.state_dict(), schedule.state_dict()]
    new = schedule_of(**settings)
    new.optimizer.load_state_dict(state[0])
    new.load_state_dict(state[1])
    return new


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"name": "CosineAnnealingLR"},
        {"name": "CosineAnnealingLR", "interval": "step", "warmup_steps": 12},
        {"name": "OneCycleLR", "max_lr": 1.0, "interval": "step"},
        {"name": "CosineAnnealingWarmRestarts", "T_0": 7, "T_mult": 2, "interval": "step"},
        {"name": "StepLR", "step_size": 3, "interval": "step"},
        {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5},
        {"name": "Halving", "interval": "validation"},
    ],
)
@pytest.mark.parametrize("stop", [1, 7, 10, 25])
def test_a_schedule_goes_on_where_it_stopped(scheduler: dict[str, Any], stop: int) -> None:
    whole = run(schedule_of(**scheduler), STEPS)
    part = schedule_of(**scheduler)
    first = run(part, stop)
    assert first + run(resumed(part, **scheduler), STEPS - stop, first=stop) == whole


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "CosineAnnealingLR", "interval": "step"},
        {"name": "CosineAnnealingLR", "interval": "epoch"},
        {"name": "OneCycleLR", "max_lr": 1.0, "interval": "step"},
        {"name": "PolynomialLR", "interval": "step", "warmup_steps": 5},
    ],
)
def test_a_longer_training_goes_on_as_if_it_had_been_planned_so(scheduler: dict[str, Any]) -> None:
    longer = {"steps": 2 * STEPS, "epochs": 2 * EPOCHS}
    planned = run(schedule_of(**longer, **scheduler), 2 * STEPS)
    part = schedule_of(**scheduler)
    run(part, STEPS)
    rest = run(resumed(part, **longer, **scheduler), STEPS, first=STEPS)
    assert rest == pytest.approx(planned[STEPS:], rel=1e-9, abs=1e-12)
    assert max(rest) > 0


def test_the_rate_typed_for_the_rest_is_the_rate_that_acts() -> None:
    part = schedule_of(name="ExponentialLR", gamma=0.5)
    run(part, 20)
    rest = resumed(part, name="ExponentialLR", gamma=0.5, optimizer={"name": "SGD", "lr": 0.8, "weight_decay": 0.1})
    assert rest.rate(20) == pytest.approx(0.2)
    assert rest.optimizer.param_groups[0]["weight_decay"] == 0.1
    plain = resumed(part)
    assert plain.rate(20) == RATE, "the scheduler was taken out of the config"
    assert resumed(plain, name="ExponentialLR", gamma=0.5).rate(20) == pytest.approx(RATE / 4), "and put back"


def test_plateau_with_another_patience_keeps_what_it_has_learnt() -> None:
    part = schedule_of(name="ReduceLROnPlateau", patience=0, factor=0.5)
    for score in (1.0, 2.0):
        part.tick("validation", score)
    rest = resumed(part, name="ReduceLROnPlateau", patience=5, factor=0.5)
    assert rest.rate(0) == pytest.approx(RATE / 2)
    assert (rest.scheduler.patience, rest.scheduler.best) == (5, 1.0)


def test_the_state_is_of_plain_types(tmp_path: Any) -> None:
    for scheduler in ({"name": "CosineAnnealingLR"}, {"name": "ReduceLROnPlateau"}, {}):
        state = schedule_of(**scheduler).state_dict()
        torch.save(state, tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_no_warning_when_the_first_step_was_skipped(recwarn: pytest.WarningsRecorder) -> None:
    schedule = schedule_of(name="CosineAnnealingLR", interval="step")
    schedule.tick("step")
    assert [str(item.message) for item in recwarn] == []


# The rate in words


def said_and_done(**settings: Any) -> tuple[str, list[float]]:
    config = config_of(**settings)
    optimizer = get_optimizer(config, nn.Linear(2, 1))
    schedule = get_lr_scheduler(config, optimizer, STEPS, EPOCHS)
    before = [dict(group) for group in optimizer.param_groups]
    said = rate_text(functools.partial(get_lr_scheduler, config), schedule, STEPS, EPOCHS)
    assert [dict(group) for group in optimizer.param_groups] == before, "asking changes nothing"
    return said, run(schedule, STEPS)


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        ({"name": "CosineAnnealingLR"}, "cosine to 0"),
        ({"name": "CosineAnnealingLR", "interval": "step", "warmup_steps": 10}, "warm-up 10 steps, cosine to 0"),
        ({"name": "CosineAnnealingLR", "eta_min": 0.01}, "cosine to 0.01"),
        ({"name": "ConstantLR", "factor": 1.0, "warmup_steps": 9, "warmup_start": 0.1}, "warm-up 9 steps from 0.1 times it, ConstantLR to 0.1"),
        ({"name": "ConstantLR", "factor": 1.0, "warmup_steps": 2}, "warm-up 2 steps, ConstantLR to 0.1"),
        ({"name": "StepLR", "step_size": EPOCHS}, "StepLR to 0.1"),  # the last epoch's rate, not that after it
        ({"name": "StepLR", "step_size": 1, "gamma": 0.5}, f"StepLR to {0.1 * 0.5 ** (EPOCHS - 1):.3g}"),
        ({"name": "LinearLR", "start_factor": 0.5, "total_iters": EPOCHS}, "linear from 0.05 to 0.1"),
        ({"name": "ReduceLROnPlateau", "patience": 4, "factor": 0.2}, "times 0.2 after 5 validations without improvement"),
        ({"name": "ExponentialLR", "gamma": 0.5, "interval": "validation"}, "then by ExponentialLR"),
    ],
)  # fmt: skip
def test_the_rate_that_was_typed_and_how_it_moves(scheduler: dict[str, Any], text: str) -> None:
    assert said_and_done(**scheduler)[0] == f"0.1, {text}"


def test_a_rate_that_rises_and_falls() -> None:
    said, rates = said_and_done(name="OneCycleLR", max_lr=1.0, interval="step")
    assert said == f"{rates[0]:.6g}, one cycle up to {max(rates):.3g} to {rates[-1]:.3g}"
    said, rates = said_and_done(name="Halving")
    assert said == f"0.1, Halving to {rates[-1]:.3g}"
    assert said_and_done()[0] == "0.1"


def test_the_schedules_are_torchs_own() -> None:
    assert isinstance(schedule_of(name="CosineAnnealingLR").scheduler, CosineAnnealingLR)
    assert isinstance(schedule_of(name="ReduceLROnPlateau").scheduler, ReduceLROnPlateau)


# ---------------------------------------------------------------------------------------------------------- fused SGD


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_fused_momentum_is_not_what_lay_in_memory_when_the_first_step_is_skipped(
    monkeypatch: pytest.MonkeyPatch, dampening: float
) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"name": "SGD", "lr": RATE, "momentum": 0.9, "weight_decay": 0.1, "dampening": dampening}
    fused, plain = (
        get_optimizer(from_mapping({"optimizer": options | {"fused": kind}}), model)
        for kind, model in zip((True, False), models, strict=True)
    )
    monkeypatch.setattr(torch, "empty_like", lambda value: torch.full_like(value, math.nan))
    for step in range(3):
        gradients = [torch.randn_like(value) for value in models[0].parameters()]
        for model in models:
            for value, gradient in zip(model.parameters(), gradients, strict=True):
                value.grad = gradient.clone()
        if getattr(fused, "_step_supports_amp_scaling", False):
            fused.found_inf = torch.tensor(float(step == 0))
        elif step == 0:  # the host looks at the gradient, and does not step
            continue
        fused.step()
        if step:
            plain.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------------------ average


@pytest.mark.parametrize("decay", [0.0, 0.15, 1.0])
def test_the_average_has_a_ramp_and_its_counters_are_copied(decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ours = EMA(copy.deepcopy(model), decay)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(4):
        keeps = min(decay, [1 / 10, 2 / 11, 3 / 12, 4 / 13][step])
        for value in [*model.parameters(), *model.buffers()]:
            value.data.copy_(torch.full_like(value, step) if value.dtype == torch.long else torch.randn_like(value))
        ours.update(model)
        for name, value in model.state_dict().items():
            expected[name] = value if value.dtype == torch.long else keeps * expected[name] + (1 - keeps) * value
            torch.testing.assert_close(ours.module.state_dict()[name], expected[name], rtol=0, atol=1e-6)
    assert ours.updates == 4 and not any(value.requires_grad for value in ours.module.parameters())
