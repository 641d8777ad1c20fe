"""What both loops train: random vectors, a small MLP, SGD with a clock in it. Plain torch; knows no dtrain."""

import atexit
import json
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def tensors(samples: int, seed: int = 0) -> TensorDataset:
    """`samples` vectors of 64 random numbers, each with one of 10 classes; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 64, generator=generator)
    return TensorDataset(inputs, torch.randint(10, (samples,), generator=generator))


class Items(Dataset):
    """The same as a dataset that somebody wrote, of which nobody knows whether its items are random."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.tensors = tensors(samples, seed).tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0][index], self.tensors[1][index]


class MLP(nn.Sequential):
    """64-256-256-10."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class ClockedSGD(torch.optim.SGD):
    """SGD that notes when its first, one early and its last step were done; both loops use it, so both pay for it.

    The figures go to $BENCH_FOLDER/rank-<rank>.json when the process ends. BENCH_STEPS is the number of the last step,
    BENCH_BEGIN that of the one from which on steps are timed: start-up, such as late imports, lies before it.
    """

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, lr=lr)  # type: ignore[arg-type]
        self.steps_done = 0
        self.begin, self.last = int(os.environ["BENCH_BEGIN"]), int(os.environ["BENCH_STEPS"])
        self.wanted = {1, self.begin, self.last}
        self.times: dict[int, tuple[float, float]] = {}  # step -> wall clock, processor time of this process
        atexit.register(self.report)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.steps_done += 1
        if self.steps_done in self.wanted:
            self.times[self.steps_done] = (time.perf_counter(), time.process_time())

    def report(self) -> None:
        """Write down the times and this process's peak memory, if the training came to its end."""
        if self.steps_done != self.last:
            return
        end, begin = self.times[self.last], self.times[self.begin]
        seconds, cpu_seconds = end[0] - begin[0], end[1] - begin[1]
        timed = self.last - self.begin
        figures = {
            "step_us": seconds / timed * 1e6,
            "step_cpu_us": cpu_seconds / timed * 1e6,
            # CLOCK_MONOTONIC: the same clock in all processes of a machine.
            "first_step_s": self.times[1][0] - float(os.environ["BENCH_STARTED"]),
            "first_step_cpu_s": self.times[1][1],
            "peak_mb": peak_mb("self"),
        }
        rank = os.environ.get("RANK", "0")
        Path(os.environ["BENCH_FOLDER"], f"rank-{rank}.json").write_text(json.dumps(figures))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The metric of the runs that do without torchmetrics."""
    return (output.argmax(1) == target).float().mean()


accuracy.higher_is_better = True  # type: ignore[attr-defined]


def peak_mb(pid: int | str) -> float:
    """A process's peak resident memory, in 10^6 bytes.

    Not getrusage's: that one begins with what the parent held when it forked.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
