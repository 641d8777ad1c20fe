"""What all programs train: random vectors, a small MLP, SGD with a clock in it. Plain torch; knows no dtrain."""

from collections.abc import Callable

import torch
from clock import turns
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
    """SGD that tells the bench when its first step was done, and times the turns that it is given; all programs use it.

    Without a bench it is SGD.
    """

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, lr=lr)  # type: ignore[arg-type]
        self.steps_done = 0
        self.turns = turns()
        self.next_stop = next(self.turns, 0)

    def step(self, closure: Callable[[], object] | None = None) -> object:  # type: ignore[override]
        loss = super().step(closure)  # type: ignore[arg-type]
        self.steps_done += 1
        if self.steps_done == self.next_stop:
            self.next_stop = next(self.turns, 0)
        return loss


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The metric of the runs that do without torchmetrics."""
    return (output.argmax(1) == target).float().mean()


accuracy.higher_is_better = True  # type: ignore[attr-defined]
