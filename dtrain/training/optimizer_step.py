"""optimizer.step() and zero_grad() without what torch adds for a profiler, where none listens.

That costs torch 2.13 a fifteenth of a step of 0.6 ms. tests/training/test_optimizer_step.py names what is taken from
torch that it does not document.
"""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as _POST_HOOKS
from torch.optim.optimizer import _global_optimizer_pre_hooks as _PRE_HOOKS

_HOOKED = Optimizer.profile_hook_step(print).__code__  # of what torch puts around the step of each class

_BY_SCHEDULER = "_wrapped_by_lr_sched"  # what a scheduler puts around that of one optimizer, to note that it was called


def take_step(optimizer: Any) -> None:
    """optimizer.step(); its hooks are called where it has some, and a profiler that is there is told of it."""
    step, of_object = type(optimizer).step, vars(optimizer).get("step")
    if (
        getattr(step, "__code__", None) is _HOOKED
        and (of_object is None or (getattr(of_object, _BY_SCHEDULER, False) and of_object.__wrapped__ is step))
        and not (_PRE_HOOKS or optimizer._optimizer_step_pre_hooks)
        and not (_POST_HOOKS or optimizer._optimizer_step_post_hooks)
        and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    ):
        optimizer._opt_called = True  # the note
        step.__wrapped__(optimizer)
    else:
        optimizer.step()


def may_keep_gradients(optimizer: Any) -> bool:
    """Whether it may hold on to gradients themselves from step to step: torch's own keep copies alone."""
    return not f"{type(optimizer).__module__}.".startswith("torch.optim.")


def drop_gradients(optimizer: Optimizer) -> None:
    """zero_grad()."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for item in group["params"]:
            item.grad = None
