"""A step without what torch adds for a profiler: the same step; hooks and profilers are told where there are any."""

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as of_torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dtrain.training.optimizer_step import drop_gradients, take_step

CLASSES: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    lambda parameters: Counted(parameters, lr=0.1),
]


class Counted(torch.optim.SGD):
    """A user's own, around torch's."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


def with_gradients(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = make(model.parameters())
    model(torch.arange(10.0).view(2, 5)).square().mean().backward()
    return model, optimizer


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("scheduled", [False, True])
def test_it_is_torchs_step_bit_for_bit(make: Callable[[Any], torch.optim.Optimizer], scheduled: bool) -> None:
    (one, ours), (other, theirs) = with_gradients(make), with_gradients(make)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1) for each in (ours, theirs)] if scheduled else []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler's, that no step was taken before its own
        for _ in range(3):
            take_step(ours)
            theirs.step()
            for schedule in schedules:
                schedule.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(one.weight, with_gradients(make)[0].weight)
    drop_gradients(ours)
    assert one.weight.grad is one.bias.grad is None


def test_no_profiler_is_told_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it were torch's own way, which is the slow one."""
    _, optimizer = with_gradients(CLASSES[0])
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda name: pytest.fail(name))
    take_step(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    take_step(optimizer)


def test_a_profiler_that_is_there_is_told() -> None:
    _, optimizer = with_gradients(CLASSES[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_step(optimizer)
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_of_one_and_of_all_optimizers_are_called(scheduled: bool) -> None:
    told: list[str] = []
    for where in ("one before", "one after", "all before", "all after"):
        _, optimizer = with_gradients(CLASSES[0])
        if scheduled:
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        register = {
            "one before": optimizer.register_step_pre_hook,
            "one after": optimizer.register_step_post_hook,
            "all before": register_optimizer_step_pre_hook,
            "all after": register_optimizer_step_post_hook,
        }[where]
        handle = register(lambda *_, where=where: told.append(where))
        take_step(optimizer)
        handle.remove()
        take_step(optimizer)
    assert told == ["one before", "one after", "all before", "all after"]


@pytest.mark.parametrize("scheduled", ["", "before", "after"])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_step_that_somebody_put_around_one_optimizers_is_called(scheduled: str, wraps: bool) -> None:
    calls: list[Any] = []
    _, optimizer = with_gradients(CLASSES[0])
    original = type(optimizer).step

    def counted(self: Any, closure: Any = None) -> Any:
        calls.append(self)
        return original(self, closure)

    if scheduled == "before":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = functools.wraps(original)(counted) if wraps else counted
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    if scheduled == "after":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls.clear()
    take_step(optimizer)
    assert calls == [optimizer]


def test_a_step_that_somebody_put_around_a_classs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    _, optimizer = with_gradients(CLASSES[3])
    original = Counted.step
    monkeypatch.setattr(Counted, "step", functools.wraps(original)(lambda self: calls.append(original(self))))
    take_step(optimizer)
    assert calls == [None]
    assert optimizer.steps == 1  # type: ignore[attr-defined]


def test_torch_has_what_this_relies_on() -> None:
    step = inspect.unwrap(of_torch.Optimizer.profile_hook_step)
    text = inspect.getsource(step)
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        assert name in text
        assert hasattr(of_torch, name)
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert name in text
        assert hasattr(with_gradients(CLASSES[0])[1], name)
    text = inspect.getsource(torch.optim.lr_scheduler.LRScheduler)
    assert "_wrapped_by_lr_sched" in text
    assert "_opt_called" in text
