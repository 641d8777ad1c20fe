"""A step without what torch adds for a profiler: the same step; hooks and profilers are told where there are any."""

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as of_torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import dtrain
from dtrain.training.optimizer_step import drop_gradients, may_keep_gradients, take_step

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


OF_TORCH = [
    kind for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]  # fmt: skip


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.__name__)
def test_torchs_own_optimizers_keep_no_gradient_itself(kind: Any) -> None:
    layer = nn.Linear(3, 3, bias=kind.__name__ != "Muon")  # which takes matrices alone
    optimizer = kind(layer.parameters(), lr=0.1)
    seen: list[int] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 3)).square().mean()
        loss.backward()
        if kind.__name__ == "SparseAdam":
            for item in layer.parameters():
                item.grad = item.grad.to_sparse()  # type: ignore[union-attr]
        seen.extend(
            (item.grad._values() if item.grad.is_sparse else item.grad).untyped_storage().data_ptr()  # type: ignore[union-attr]
            for item in layer.parameters()
        )
        return loss

    for _ in range(2):
        optimizer.step(closure)
        held = [item for item in tree_leaves([*optimizer.state.values()]) if isinstance(item, torch.Tensor)]
        places = {item.untyped_storage().data_ptr() for item in held}
        assert not places & set(seen[-2:])
    assert not may_keep_gradients(optimizer)
    assert may_keep_gradients(type("Own", (kind,), {"__module__": "own"})(layer.parameters(), lr=0.1))


OWN_TRAINER = """
import dtrain.trainer


class Looks(dtrain.trainer.Trainer):
    def optimizer_step(self):
        self.before = [item.grad for item in self.module.parameters()]
        super().optimizer_step()


class Counts(dtrain.trainer.Trainer):
    def after_step(self, position):
        super().after_step(position)
"""


def test_what_may_keep_gradients_is_known_of_optimizer_trainer_and_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer_that_looks.py").write_text(OWN_TRAINER)
    monkeypatch.syspath_prepend(tmp_path)

    def may_keep(optimizer: Any = torch.optim.SGD, trainer: str | None = None, hook: Any = None) -> bool:
        model = nn.Linear(3, 2)
        if hook:
            model.weight.register_post_accumulate_grad_hook(hook)
        config = {
            "modules": ["trainer_that_looks"],
            "trainer": {"checkpoint_dir": str(tmp_path / "run"), "max_steps": 1}
            | ({"name": trainer} if trainer else {}),
        }
        made = dtrain.create_trainer(
            config, model=model, datasets={"train": TensorDataset(torch.ones(4, 3), torch.ones(4, 2))},
            loss=nn.MSELoss(), optimizer=functools.partial(optimizer, lr=0.1),
        )  # fmt: skip
        return made.may_keep_gradients

    assert not may_keep()
    assert may_keep(Counted)
    assert may_keep(trainer="Looks")
    assert not may_keep(trainer="Counts")
    assert may_keep(hook=lambda item: None)
