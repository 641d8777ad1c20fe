"""What gpu_check.py trains: a dataset with noise, a small network that looks around itself. Plain torch, no dtrain."""

import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset


class NoisyImages(Dataset):
    """Images (1, 8, 8) of 10 classes with noise that is new in each epoch.

    Args:
        samples: How many.
        seed: Of the labels.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.patterns = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.targets = torch.randint(10, (samples,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.targets[index]
        return self.patterns[target] + 0.5 * torch.randn(1, 8, 8), target  # as an augmentation would draw


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, linear.

    Args:
        dropout: Its probability.
        batch_norm: Whether there is one; two ranks see other statistics than one process.
        expects: The type that autocast is to compute in (bfloat16, float16); None: no autocast.
        watch_every_steps: How often figures are logged. Between two log steps, what would make the host wait for the
            device is then an error. None: nothing is watched.
        accumulate: Batches per step, for counting steps.
        poison: The step whose outputs are NaN.
        killed: The step in which the process kills itself, unless the file `killed` says that it did so before.
    """

    def __init__(
        self,
        dropout: float = 0.2,
        batch_norm: bool = True,
        expects: str | None = None,
        watch_every_steps: int | None = None,
        accumulate: int = 1,
        poison: int | None = None,
        killed: int | None = None,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), norm, nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16 * 64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.expects = getattr(torch, expects) if expects else torch.float32
        self.watch_every_steps, self.accumulate, self.poison = watch_every_steps, accumulate, poison
        self.killed, self.batches = killed, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.batches += self.training
        step = -(-self.batches // self.accumulate) if self.training else 0
        if self.watch_every_steps and image.is_cuda:
            torch.cuda.set_sync_debug_mode("error" if self.is_watched(step) else "default")
        if step == self.killed and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        output = self.head(self.features(image))
        if output.dtype != self.expects:
            raise AssertionError(f"the network computed in {output.dtype}, expected {self.expects}")
        return output * torch.nan if step == self.poison else output

    def is_watched(self, step: int) -> bool:
        """Not the first steps, in which memory is got and kernels are chosen, nor a step after which is logged."""
        return step > 2 and step % (self.watch_every_steps or 1) != 0


class Large(Net):
    """The same with further parameters, so that the copy of a checkpoint takes longer than a step."""

    def __init__(self, ballast: int) -> None:
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(ballast))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) + (self.ballast - 1).square().mean()


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


accuracy.higher_is_better = True  # type: ignore[attr-defined]
