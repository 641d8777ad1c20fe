"""What shards.py trains: a large model in blocks, an optimizer that notes times and memory. Knows no dtrain."""

import json
import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH, ROWS = 2048, 8192
EVERY = 2  # steps from checkpoint to checkpoint
WRITER = "checkpoint"  # dtrain's thread that writes one


def tensors(samples: int) -> TensorDataset:
    """Scalars, each with one."""
    return TensorDataset(torch.ones(samples), torch.ones(samples))


class Block(nn.Module):
    """One matrix, of which the output depends on each number."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(rows, WIDTH, dtype=dtype))
        if os.environ.get("RANK", "0") == "0":  # the others are given their parts, and need no memory for the whole
            self.matrix.data.fill_(1e-3)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.matrix.mean()


class Blocks(nn.Module):
    """Blocks with about `parameters` numbers in all; each is gathered by itself."""

    def __init__(self, parameters: int, dtype: str) -> None:
        super().__init__()
        count = max(4, round(parameters / (WIDTH * ROWS)))
        rows = max(1, round(parameters / (WIDTH * count)))
        self.blocks = nn.Sequential(*(Block(rows, getattr(torch, dtype)) for _ in range(count)))

    def forward(self, value: Tensor) -> Tensor:
        ClockedSGD.began()
        return self.blocks(value)


def memory_mb(key: str) -> float:
    """A line of this process's /proc status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def forget_peak() -> None:
    """Let the peak begin with what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


class ClockedSGD(torch.optim.SGD):
    """SGD that takes the time from each step's end to the next one's begin, and its process's memory.

    The figures go to $BENCH_FOLDER/RANK.json.
    """

    facts: ClassVar[dict[str, float]] = {}
    gaps: ClassVar[dict[int, float]] = {}  # step -> seconds until the next step began
    done = 0
    ended = 0.0

    def __init__(self, params: object, **more: float) -> None:
        super().__init__(params, **more)  # type: ignore[arg-type]
        forget_peak()  # of the whole model, which each rank has built

    @classmethod
    def began(cls) -> None:
        """A step begins."""
        if not cls.done and "loaded_mb" not in cls.facts:
            cls.facts["loaded_mb"] = memory_mb("VmHWM")
        if cls.done and cls.done not in cls.gaps:
            cls.gaps[cls.done] = time.perf_counter() - cls.ended
            if cls.done % EVERY == 0:  # the copy is made, and being written; let this step not slow the writer
                began = time.perf_counter()
                while any(thread.name == WRITER for thread in threading.enumerate()):
                    time.sleep(0.01)
                cls.facts[f"written_{cls.done}_s"] = time.perf_counter() - began
        cls.facts |= {"peak_mb": memory_mb("VmHWM")}
        found = {**cls.facts, "gaps": cls.gaps}
        (Path(os.environ["BENCH_FOLDER"]) / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        kind = type(self)
        kind.done += 1
        if kind.done == EVERY - 1:
            kind.facts["before_mb"] = memory_mb("VmHWM")  # with gradients and optimizer state, before any checkpoint
        kind.ended = time.perf_counter()
