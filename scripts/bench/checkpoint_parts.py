"""What checkpoint.py trains: a large model of which a step uses all, an optimizer with a clock. Knows no dtrain."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH = 2048
EVERY = 4  # steps from checkpoint to checkpoint
WRITER = "checkpoint"  # dtrain's thread that writes one


def tensors(samples: int) -> TensorDataset:
    """Scalars, each with one."""
    return TensorDataset(torch.ones(samples), torch.ones(samples))


def wait_for_device() -> None:
    """Return once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Wide(nn.Module):
    """Matrices of 2048 x 2048, about `parameters` numbers in all; the output depends on each of them."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        rows = max(1, min(WIDTH, parameters // WIDTH))
        count = max(1, round(parameters / (rows * WIDTH)))
        self.matrices = nn.ParameterList(torch.full((rows, WIDTH), 1e-3) for _ in range(count))

    def forward(self, value: Tensor) -> Tensor:
        ClockedAdamW.began()
        return value * sum(matrix.mean() for matrix in self.matrices)


def writes() -> bool:
    """Whether dtrain's thread writes a checkpoint."""
    return any(thread.name == WRITER for thread in threading.enumerate())


def largest_gap(goes_on: Callable[[], bool]) -> float:
    """The longest wait, in seconds, of a thread that lets go of Python's lock and takes it again, for as long."""
    most, last = 0.0, time.perf_counter()
    while goes_on():
        time.sleep(0)
        now = time.perf_counter()
        most, last = max(most, now - last), now
    return most


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this thread's processor time."""
    return time.perf_counter(), time.thread_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Both, from then on."""
    clock, cpu = now()
    return clock - began[0], cpu - began[1]


class ClockedAdamW(torch.optim.AdamW):
    """AdamW that takes the time of each step, from its end to the next one's begin, and of bare copies of all tensors.

    After the first step that follows a checkpoint it waits until that is written, and sees for how long the thread that
    writes holds Python's lock, and for as long without it. A copy is taken halfway from checkpoint to checkpoint. The
    figures go to $BENCH_FILE: pairs of seconds, by the clock and of the loop's thread; of the lock, beside the thread
    and without it.
    """

    gaps: ClassVar[dict[int, tuple[float, float]]] = {}  # step -> until the next step began
    steps: ClassVar[dict[int, tuple[float, float]]] = {}  # step -> from its forward to its end
    copies: ClassVar[list[tuple[float, float]]] = []
    lock_gaps: ClassVar[list[tuple[float, float]]] = []
    memory: ClassVar[list[Tensor]] = []
    done = 0
    begin = ended = (0.0, 0.0)

    @classmethod
    def began(cls) -> None:
        """A step begins."""
        if cls.done and cls.done not in cls.gaps:
            cls.gaps[cls.done] = since(cls.ended)
            figures = {"gaps": cls.gaps, "copies": cls.copies, "steps": cls.steps, "lock_gaps": cls.lock_gaps}
            Path(os.environ["BENCH_FILE"]).write_text(json.dumps(figures))
        cls.begin = now()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        kind = type(self)
        kind.done += 1
        wait_for_device()
        kind.steps[kind.done] = since(kind.begin)
        if kind.done % EVERY == 1 and kind.done > 1:
            began = time.perf_counter()
            beside = largest_gap(writes)
            ended = time.perf_counter()
            alone = largest_gap(lambda: time.perf_counter() - ended < ended - began)
            kind.lock_gaps.append((beside, alone))
        if kind.done % EVERY == EVERY // 2:
            kind.copies.append(self.copied())
        kind.ended = now()

    def copied(self) -> tuple[float, float]:
        """What copying the weights and the optimizer's state takes, into memory that is there already."""
        values = [value.detach() for group in self.param_groups for value in group["params"]]
        values += [value for state in self.state.values() for value in state.values()]
        if not self.memory:
            self.memory.extend(value.to("cpu", copy=True) for value in values)
        wait_for_device()
        began = now()
        for copy, value in zip(self.memory, values, strict=True):
            copy.copy_(value)
        return since(began)
