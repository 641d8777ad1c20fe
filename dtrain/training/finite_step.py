"""An optimizer step that is not taken where a gradient is not finite, and what such a step must not leave behind."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dtrain.config.errors import mark_section
from dtrain.distributed.ranks import Ranks
from dtrain.training.closure import Closure
from dtrain.training.optimizer_step import take_step
from dtrain.training.state import TrainState

_MOST_STEPS = 1000  # after which the host looks at their norms, however seldom figures are logged
_LEAST_SCALE = 1.0  # of fp16's loss: what is not finite at a smaller one is not so for its scale
_MOST_NAMED = 8  # steps in a message
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # what torch itself keeps on every module


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the weights are those of before that step."""


class _Step(NamedTuple):
    """A step that the host has not looked at."""

    number: int
    position: int  # in the epoch, where it begins
    samples: int  # since figures were last logged, before it
    norm: Tensor  # of its gradients, the same on all ranks
    has_finite_loss: Tensor | None  # on this rank; with fp16
    parts: dict[str, Tensor]  # the same of each optimizer that stepped in it, in their order, where a step has several


class _AbandonedError(Exception):
    """A closure's loss or gradient is not finite."""


class FiniteStep:
    """Steps unless a gradient is not finite; counts the steps that are skipped, or ends the training.

    Where the device alone knows whether a step was taken (fused optimizers), `judge` finds out later, without a wait in
    each step; if bad steps end the training, the device takes none after the first. With fp16 it steps through the
    loss's scaler: a gradient that is too large for fp16 lowers the scale, and is an error only where no scale helps.
    `say` is given a line for skipped steps.

    A training step with several optimizers is one step: `begin_parts`, `take` for each of them, `finish_parts`.
    An optimizer that asks for a closure is given `closure`, which evaluates the loss again: called with the optimizer,
    it returns the loss and the norm of the gradients, the same on all ranks.
    """

    closure: Closure | None = None
    part = ""  # the name of `optimizer`, where there are several

    def __init__(
        self,
        optimizer: Any,
        scaler: torch.amp.GradScaler | None,
        state: TrainState,
        on_nonfinite: Literal["stop", "skip"],
        say: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        self.optimizer, self.scaler, self.state = optimizer, scaler, state
        self._skips, self._say, self._ranks = on_nonfinite == "skip", say, ranks
        self._steps: list[_Step] = []  # since the last look at them
        self._was_bad = torch.zeros((), dtype=torch.float32, device=state.device)  # 1 from the first bad step on
        self._places: list[_Place] = []  # of buffers and plain tensors that a forward may change
        self._sums: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # of figures, and what they were
        self._parts: dict[str, tuple[Tensor, bool | None]] | None = None  # of the step at work: norm, and if it is good

    def begin(self, module: torch.nn.Module, others: Mapping[str, Any] | None = None) -> None:
        """The module is about to be trained: where bad steps are skipped, its buffers are put back after them.

        So are tensors in plain attributes of modules and of `others`, the objects that a loss consists of. A forward
        with NaN would leave it in running statistics for good. A forward may also put a new tensor in a buffer's place,
        so they are looked up by name. Sparse and expanded ones are constants.
        """
        if self._skips:
            objects = {id(part): part for whole in (module, *(others or {}).values()) for part in _parts(whole)}
            self._places = [place for part in objects.values() for place in _places(part)]
            self._sums = self.state.sums, copy.deepcopy(self.state.sums)

    def take(self, norm: Tensor) -> None:
        """optimizer.step(), unless the norm of the reduced gradients, equal on all ranks, is not finite.

        Where the host knows of it, and it may end the training, `judge` follows.
        """
        if self._parts is None:
            self._end(*self._stepped(norm))
        elif self._skips or all(is_good is not False for _, is_good in self._parts.values()):
            self._parts[self.part] = self._stepped(norm)
        else:  # an optimizer before it has ended the training
            self._parts[self.part] = norm, False

    def begin_parts(self) -> None:
        """The step at work has a `take` for each of its optimizers."""
        self._parts = {}

    def finish_parts(self) -> None:
        """All that is to be taken of this step is: it counts as one, and is good where all its parts are."""
        parts, self._parts = self._parts or {}, None
        norms = [norm for norm, _ in parts.values()] or [torch.zeros((), device=self.state.device)]
        self.state.grad_norm = norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        known = [is_good for _, is_good in parts.values()]
        is_good = None if None in known else all(known)
        self._end(norm, is_good, {name: part for name, (part, _) in parts.items()} if len(parts) > 1 else None)

    def _stepped(self, norm: Tensor) -> tuple[Tensor, bool | None]:
        """The norm, and whether the step was taken; None: known to the device alone."""
        is_fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        try:
            if self.scaler:  # skips a step that overflowed, and lowers its scale
                self.scaler.step(self.optimizer)
                self.scaler.update()
                return norm, None if is_fused else math.isfinite(norm.item())  # for which it has waited itself
            if is_fused and self.closure is None:
                bad = torch.isfinite(norm).logical_not().float()
                self.optimizer.found_inf = bad if self._skips else torch.maximum(self._was_bad, bad, out=self._was_bad)
                take_step(self.optimizer)
                return norm, None
            if not math.isfinite(norm.item()):
                return norm, False
            if self.closure is not None:
                return self._stepped_by_closure(self.closure, norm)
            take_step(self.optimizer)
            return norm, True
        except Exception as error:
            mark_section(error, "optimizer")
            raise

    def _stepped_by_closure(self, evaluate: Closure, norm: Tensor) -> tuple[Tensor, bool | None]:
        """The same for an optimizer that evaluates the loss itself; where that is not finite, all is put back."""
        weights = [item for group in self.optimizer.param_groups for item in group["params"]]
        before = [item.detach().clone() for item in weights]
        state = copy.deepcopy(self.optimizer.state_dict()) if self._skips else None
        bad: list[Tensor] = []

        def closure() -> Tensor:
            with torch.enable_grad():
                loss, its_norm = evaluate(self.optimizer)
            if not math.isfinite(its_norm.item()):
                bad.append(its_norm)
                raise _AbandonedError
            return loss

        try:
            self.optimizer.step(closure)
        except _AbandonedError:
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
            if state is not None:
                self.optimizer.load_state_dict(state)
            return bad[0], False
        return norm, True

    def _end(self, norm: Tensor, is_good: bool | None, parts: dict[str, Tensor] | None = None) -> None:
        """A step was taken or left out: note it, to be looked at later; keep or put back what its forward changed."""
        if self._steps or not is_good or self.scaler:  # a good step matters as the end of one before it
            if len(self._steps) == _MOST_STEPS:
                self.judge()
            state = self.state
            loss = torch.isfinite(state.stacked_sums[0]) if self.scaler else None
            self._steps.append(_Step(state.step + 1, state.position, state.samples, norm, loss, parts or {}))
        if self._skips:
            self._keep_or_put_back(torch.isfinite(norm) if is_good is None else is_good)
        elif is_good is False:
            self.judge()

    def judge(self, alone: bool = False) -> None:
        """Look at the steps since the last time: count those that were not taken, or raise NonFiniteError for them.

        All ranks call it, with the same result; `alone`: without the others, which may be gone.
        """
        steps, self._steps = self._steps, []
        state = self.state
        norms = torch.stack([step.norm for step in steps]).tolist() if steps else []
        if all(map(math.isfinite, norms)):
            state.overflows = 0 if steps else state.overflows
            return
        ends = [*(step.samples for step in steps[1:]), state.samples]
        bad: list[tuple[_Step, float]] = []
        overflows: list[tuple[_Step, float]] = []
        for step, end, norm, may_overflow in zip(steps, ends, norms, self._may_overflow(steps, alone), strict=True):
            if math.isfinite(norm):
                state.overflows = 0
                continue
            state.skipped += 1
            state.overflows += may_overflow
            state.unsummed += end - step.samples if self._skips else 0  # their losses are no longer in the sums
            (overflows if may_overflow else bad).append((step, norm))
        if bad:
            self._restore_scale(len(bad))
            self._tell(bad, "loss or gradient not finite")
        if overflows:
            self._tell_overflows(overflows)

    def finish(self) -> None:
        """At a training's end: if none of its steps was taken, that is an error, or said where bad ones are skipped.

        fp16's scale may have had no time to fall far enough.
        """
        if self.state.step and self.state.skipped == self.state.step:
            text = f"none of {self.state.step} steps was taken, since loss or gradient was not finite in any"
            if not self._skips:
                raise NonFiniteError(text)
            self._say(f"warning: {text}")

    def _may_overflow(self, steps: list[_Step], alone: bool) -> list[bool]:
        """Of each step, whether it may be an overflow: with fp16, where the loss is finite on all ranks."""
        flags = [step.has_finite_loss for step in steps if step.has_finite_loss is not None]
        if not flags:
            return [False] * len(steps)
        counts = torch.stack(flags).float()
        world_size = 1 if alone else self._ranks.world_size
        return [count == world_size for count in (counts if alone else self._ranks.sum_(counts)).tolist()]

    def _tell_overflows(self, steps: list[tuple[_Step, float]]) -> None:
        """Say that gradients were too large for fp16; where they still are at the least scale, it was not for that."""
        assert self.scaler is not None
        scale, count = self.scaler.get_scale(), self.state.overflows
        if not count or scale >= _LEAST_SCALE:
            self._say(f"{_named(steps)}: gradient too large for fp16, not taken; the loss's scale is {scale:g} now")
            return
        self.state.overflows = 0
        self._restore_scale(count)
        what = f"gradient not finite in {count} steps in a row, however small fp16's scale of the loss"
        self._tell(steps, f"{what}; trainer.precision=bf16 has fp32's range")

    def _restore_scale(self, count: int) -> None:
        """Take so many of fp16's reductions back, which were for nothing: the scale grows once in 2,000 steps."""
        if self.scaler:
            scale = self.scaler.get_scale() / self.scaler.get_backoff_factor() ** count
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale})

    def _tell(self, steps: list[tuple[_Step, float]], what: str) -> None:
        """Say that steps were skipped, or raise NonFiniteError for the first, which the training then stands before."""
        state, (first, norm) = self.state, steps[0]
        names, taken = _parts_of(first)
        what = f"{names}: {what}" if names else what
        if self._skips:
            self._say(f"{_named(steps)}: {what} (gradient norm {norm}); skipped, {state.skipped} so far")
            return
        if self.scaler is None:  # the device has taken no step since
            state.step, state.position = first.number - 1, first.position
        is_late = first.number <= state.step
        weights = "later steps were taken" if is_late else taken or "the weights are those of before it"
        text = f"step {first.number}: {what} (gradient norm {norm}); {weights}"
        raise NonFiniteError(f"{text}. trainer.on_nonfinite=skip would continue")

    @torch.no_grad()
    def _keep_or_put_back(self, is_good: bool | Tensor) -> None:
        """Keep buffers and sums as they are, or put them back as they were; the host waits for no device."""
        for place in self._places:
            place.keep_or_put_back(is_good)
        sums, (known, kept) = self.state.sums, self._sums
        if sums is not known:  # they begin again
            kept = {}
            self._sums = sums, kept
        for name, total in sums.items():
            if isinstance(total, Tensor):
                if name not in kept:
                    kept[name] = torch.zeros_like(total)
                _choose(is_good, total, kept[name])
            elif is_good:
                kept[name] = total
            else:
                sums[name] = kept.get(name, 0.0)


def _choose(is_good: bool | Tensor, value: Tensor, kept: Tensor) -> None:
    """Make both of them the value, or what was kept."""
    if isinstance(is_good, Tensor):
        value.copy_(kept.copy_(torch.where(is_good, value, kept)))
    elif is_good:
        kept.copy_(value)
    else:
        value.copy_(kept)


class _Place:
    """Where a tensor lies that a forward may change, or replace; with a copy of it after the last good step."""

    def __init__(self, owner: dict[str, Any], name: str) -> None:
        self.owner, self.name = owner, name
        value: Tensor | None = owner[name]
        self.value = value  # as it was found last
        self.kept: Tensor | None = None if value is None else value.clone()

    def keep_or_put_back(self, is_good: bool | Tensor) -> None:
        value, kept = self.owner.get(self.name), self.kept
        if value is kept:  # None is there, as before
            return
        if isinstance(value, Tensor) and kept is not None and value.shape == kept.shape:
            if isinstance(is_good, Tensor) and is_good.device != value.device:
                is_good = is_good.to(value.device)
            if value is self.value:
                _choose(is_good, value, kept)
                return
            if isinstance(is_good, Tensor) and _is_like(value, kept):
                # It may be a view of another tensor, and is not written to.
                self.owner[self.name] = self.value = torch.where(is_good, value, kept)
                kept.copy_(self.value)
                return
        if not is_good:
            self.owner[self.name] = self.value = None if kept is None else kept.clone()
        elif _is_plain(value):  # it was made, replaced, or grew
            self.value, self.kept = value, value.clone()
        elif value is not None:  # what cannot be kept is looked at no more
            self.owner, self.value, self.kept = {}, None, None
        else:
            self.value = self.kept = None


def _parts(whole: Any) -> Iterator[Any]:
    return whole.modules() if isinstance(whole, torch.nn.Module) else iter([whole])


def _places(part: Any) -> Iterator[_Place]:
    """Where the tensors of a module or object lie that a step may change, or that a first forward makes.

    torch's own modules have such tensors in buffers alone: weight_norm's weight, an attribute, is computed anew.
    """
    is_module = isinstance(part, torch.nn.Module)
    own = {} if type(part).__module__.startswith("torch.") else getattr(part, "__dict__", {})
    for owner in (part._buffers, own) if is_module else (own,):
        for name, value in owner.items():
            if not (is_module and name in _OF_MODULES) and (value is None or _is_plain(value)):
                yield _Place(owner, name)


def _is_like(value: Tensor, kept: Tensor) -> bool:
    return value.dtype == kept.dtype and value.device == kept.device and not value.requires_grad


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor that training may change, and that can be copied."""
    is_tensor = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
    return is_tensor and not value.requires_grad and value.layout == torch.strided and 0 not in value.stride()


def _parts_of(step: _Step) -> tuple[str, str]:
    """Of a step with several optimizers, those whose gradients are not finite, and which had stepped before them."""
    is_good = {name: math.isfinite(float(norm)) for name, norm in step.parts.items()}
    names = [*is_good]
    before = names[: [*is_good.values()].index(False)] if False in is_good.values() else []
    bad = ", ".join(name for name in names if not is_good[name])
    return bad, f"{', '.join(before)} had stepped before" if before else ""


def _named(steps: list[tuple[_Step, float]]) -> str:
    numbers = [step.number for step, _ in steps]
    if len(numbers) > _MOST_NAMED:
        return f"{len(numbers)} steps from {numbers[0]} to {numbers[-1]}"
    return f"step{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
