"""An optimizer step that is not taken where a gradient is not finite, and what such a step must not leave behind."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.config.errors import mark_section
from dtrain.training.state import TrainState


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the weights are those of before that step."""


class FiniteStep:
    """Steps unless a gradient is not finite; counts the steps that are skipped, or ends the training.

    With fp16 it steps through the loss's scaler; `say` is given a line for skipped steps.
    """

    def __init__(
        self,
        optimizer: Any,
        scaler: torch.amp.GradScaler | None,
        state: TrainState,
        on_nonfinite: Literal["stop", "skip"],
        say: Callable[[str], None],
    ) -> None:
        self.optimizer, self.scaler, self.state = optimizer, scaler, state
        self.on_nonfinite, self._say = on_nonfinite, say
        self._bad_steps = torch.zeros((), device=state.device)  # since the last look at them
        # Of floating point, by the module that has it and its name, each with its copy of the last good step.
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []

    def begin(self, module: torch.nn.Module) -> None:
        """The module is about to be trained: where bad steps are skipped, its buffers are put back after them.

        A forward with NaN would leave it in running statistics for good. A forward may also put a new tensor in a
        buffer's place, so they are looked up by name. Sparse and expanded ones are constants.
        """
        owners = [part._buffers for part in module.modules()] if self.on_nonfinite == "skip" else []
        named = [(owner, name, item) for owner in owners for name, item in owner.items() if item is not None]
        plain = [each for each in named if each[2].is_floating_point() and each[2].layout == torch.strided]
        self._buffers = [(*each, item.detach().clone()) for *each, item in plain if 0 not in item.stride()]  # type: ignore[misc]

    def take(self, norm: Tensor) -> None:
        """optimizer.step(), unless the norm of the reduced gradients, equal on all ranks, is not finite.

        Where the host knows of it, `judge` follows.
        """
        try:
            if self.scaler:  # skips a step that overflowed, and lowers its scale
                self.scaler.step(self.optimizer)
                self.scaler.update()
            elif getattr(self.optimizer, "_step_supports_amp_scaling", False):  # fused: the device skips, nobody waits
                bad = torch.isfinite(norm).logical_not().float()
                self.optimizer.found_inf = bad
                self.optimizer.step()
                self._bad_steps += bad
            elif math.isfinite(norm.item()):
                self.optimizer.step()
            else:
                self._bad_steps += 1
                self.judge()
        except Exception as error:
            mark_section(error, "optimizer")
            raise
        if self._buffers:
            self._keep_or_put_back(norm)

    def judge(self) -> None:
        """Count the steps skipped since the last look, or raise NonFiniteError for them; the same on every rank."""
        bad = int(self._bad_steps.item())
        if not bad:
            return
        self._bad_steps.zero_()
        self.state.skipped += bad
        norm = float(self.state.grad_norm)
        text = f"step {self.state.step + 1}: loss or gradient not finite (gradient norm {norm})"
        if self.on_nonfinite == "stop":
            cure = "trainer.on_nonfinite=skip would continue"
            raise NonFiniteError(f"{text}; the weights are those of before it. {cure}")
        self._say(f"{text}; skipped, {self.state.skipped} so far")

    @torch.no_grad()
    def _keep_or_put_back(self, norm: Tensor) -> None:
        """Keep the buffers, or put them back where the norm of the gradients is not finite; the host does not wait."""
        is_good = torch.isfinite(norm)
        for index, (owner, name, kept) in enumerate(self._buffers):
            buffer = owner[name]
            if buffer is not None and buffer.shape == kept.shape:
                kept.copy_(torch.where(is_good, buffer, kept))
                buffer.detach().copy_(kept)
            elif is_good and buffer is not None:  # it has grown
                self._buffers[index] = owner, name, buffer.detach().clone()
            else:
                owner[name] = kept.clone()
