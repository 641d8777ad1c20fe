"""What checkpoint.py trains: a large model of which a step uses all, an optimizer with a clock. Knows no dtrain."""

import json
import os
import threading
import time
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


class ClockedAdamW(torch.optim.AdamW):
    """AdamW that takes the time from each step's end to the next one's begin, and of bare copies of all its tensors.

    A copy is taken halfway from checkpoint to checkpoint, when the last one is written. The figures go to $BENCH_FILE.
    """

    gaps: ClassVar[dict[int, float]] = {}  # step -> seconds until the next step began
    copies: ClassVar[list[float]] = []
    memory: ClassVar[list[Tensor]] = []
    done = 0
    ended = 0.0

    @classmethod
    def began(cls) -> None:
        """A step begins."""
        if cls.done and cls.done not in cls.gaps:
            cls.gaps[cls.done] = time.perf_counter() - cls.ended
            Path(os.environ["BENCH_FILE"]).write_text(json.dumps({"gaps": cls.gaps, "copies": cls.copies}))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        kind = type(self)
        kind.done += 1
        if kind.done % EVERY == EVERY // 2:
            while any(thread.name == WRITER for thread in threading.enumerate()):
                time.sleep(0.01)
            kind.copies.append(self.copy_seconds())
        wait_for_device()
        kind.ended = time.perf_counter()

    def copy_seconds(self) -> float:
        """What copying the weights and the optimizer's state takes, into memory that is there already."""
        values = [value.detach() for group in self.param_groups for value in group["params"]]
        values += [value for state in self.state.values() for value in state.values()]
        if not self.memory:
            self.memory.extend(value.to("cpu", copy=True) for value in values)
        wait_for_device()
        began = time.perf_counter()
        for copy, value in zip(self.memory, values, strict=True):
            copy.copy_(value)
        return time.perf_counter() - began
