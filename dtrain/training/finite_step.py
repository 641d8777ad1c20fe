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
        self._buffers: list[tuple[Tensor, Tensor]] = []  # of floating point, each with its copy of the last good step

    def begin(self, module: torch.nn.Module) -> None:
        """The module is about to be trained: where bad steps are skipped, its buffers are put back after them.

        A forward with NaN would leave it in running statistics for good. Sparse and expanded ones are constants.
        """
        buffers = module.buffers() if self.on_nonfinite == "skip" else ()
        plain = [buffer for buffer in buffers if buffer.is_floating_point() and buffer.layout == torch.strided]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in plain if 0 not in buffer.stride()]

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
        for buffer, kept in self._buffers:
            kept.copy_(torch.where(is_good, buffer, kept))
            buffer.copy_(kept)
