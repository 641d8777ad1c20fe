"""Batches of a user's own dataset by torch's DataLoader with its defaults and by dtrain's loader, in turn.

    python scripts/bench/samples.py [--kinds Items Images Noise Crops ...] [--workers 0 2] [--rounds 5] [--batches 300]

Microseconds a batch: clock, processor time of this process, and of its workers. Ratios are medians of each round's,
of the processor time of all. Items are 64 numbers, Images 3 x 32 x 32; all others draw random numbers, which dtrain
gives each sample of its own and torch does not. Noise draws a vector from torch, NumPyNoise from NumPy's global
generator, PythonFlip a flip and a factor from Python's, Held... the same from a generator that the dataset holds; Crops
draws a flip, a crop and a brightness from torch, HeldCrops from a `numpy.random.Generator`.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import machine
from torch.utils.data import DataLoader, Dataset
from workload import Items

from dtrain.dataloader import TrainLoader, loader_settings

WARM_UP = 30  # batches
ROWS = 2000  # that are in memory; a longer epoch has them again


class Images(Dataset):
    """Small pictures."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples, self.rows = samples, torch.randn(ROWS, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index % ROWS], index % 10


class Noise(Items):
    """A vector with noise."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        vector, label = super().__getitem__(index)
        return vector + 0.1 * torch.randn(64), label


class HeldNoise(Items):
    """A vector with noise from a generator that the dataset holds."""

    def __init__(self, samples: int, held: Any = np.random) -> None:
        super().__init__(samples)
        self.held = held

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        vector, label = super().__getitem__(index)
        if isinstance(self.held, torch.Generator):
            return vector + 0.1 * torch.randn(64, generator=self.held), label
        return vector + 0.1 * torch.from_numpy(self.held.normal(size=64)).float(), label


class Flip(Items):
    """A vector, turned round or not, and a factor, by Python's generator or one of its kind."""

    def __init__(self, samples: int, held: Any = random) -> None:
        super().__init__(samples)
        self.held = held

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        vector, label = super().__getitem__(index)
        vector = vector.flip(0) if self.held.random() < 0.5 else vector
        return vector * self.held.uniform(0.8, 1.2), label


class Crops(Images):
    """Flip, crop and brightness, as for CIFAR."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = torch.randint(0, 9, (2,)).tolist()
        return self.crop(index, torch.rand(()) < 0.5, top, left, torch.rand(()))

    def crop(self, index: int, is_flipped: Any, top: int, left: int, brightness: Any) -> tuple[torch.Tensor, int]:
        """What was drawn, applied."""
        image, label = super().__getitem__(index)
        image = image.flip(-1) if is_flipped else image
        padded = torch.nn.functional.pad(image[None], (4, 4, 4, 4), mode="reflect")[0]
        return padded[:, top : top + 32, left : left + 32] * (0.8 + 0.4 * brightness), label


class HeldCrops(Crops):
    """The same by a generator of NumPy's."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.rng = np.random.default_rng(1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = self.rng.integers(0, 9, 2).tolist()
        return self.crop(index, self.rng.random() < 0.5, top, left, self.rng.random())


KINDS: dict[str, Callable[[int], Any]] = {
    "Items": Items,
    "Images": Images,
    "Noise": Noise,
    "NumPyNoise": HeldNoise,
    "PythonFlip": Flip,
    "HeldGenerator": lambda samples: HeldNoise(samples, np.random.default_rng(1)),
    "HeldRandomState": lambda samples: HeldNoise(samples, np.random.RandomState(1)),
    "HeldTorch": lambda samples: HeldNoise(samples, torch.Generator()),
    "HeldPython": lambda samples: Flip(samples, random.Random(1)),
    "Crops": Crops,
    "HeldCrops": HeldCrops,
}


def theirs(dataset: Any, workers: int, batch_size: int) -> Iterator[Any]:
    """What a researcher writes."""
    return iter(DataLoader(dataset, batch_size, shuffle=True, num_workers=workers))


def ours(dataset: Any, workers: int, batch_size: int) -> Iterator[Any]:
    """What dtrain makes of `loaders.train`."""
    options = loader_settings(num_workers=workers) | {"pin_memory": False}
    own = {key: value for key, value in options.items() if key not in ("batch_size", "global_batch_size")}
    return TrainLoader(dataset, 0, 0, 1, batch_size, **own).epoch(0)


def of_workers() -> float:
    """Seconds of processor time of this process's workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[Any], count: int) -> list[float]:
    """Microseconds a batch: clock, this process, its workers."""
    for _ in islice(batches, WARM_UP):
        pass
    before = time.perf_counter(), time.process_time(), of_workers()
    for _ in islice(batches, count):
        pass
    after = time.perf_counter(), time.process_time(), of_workers()
    return [1e6 * (end - begin) / count for begin, end in zip(before, after, strict=True)]


def main() -> None:
    """Measure, and print a line for each kind and number of workers."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/samples.py --kinds Items"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    wish = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; batches of {wish.batch_size}; us a batch: clock, process, workers")
    for kind in wish.kinds:
        dataset = KINDS[kind]((wish.batches + 2 * WARM_UP) * wish.batch_size)
        for workers in wish.workers:
            found: list[dict[Any, list[float]]] = []
            for number in range(wish.rounds):
                turn = (theirs, ours) if number % 2 == 0 else (ours, theirs)
                found.append({each: measure(each(dataset, workers, wish.batch_size), wish.batches) for each in turn})
            shown = [[f"{statistics.median(column):7.0f}" for column in zip(*(one[each] for one in found), strict=True)]
                     for each in (theirs, ours)]  # fmt: skip
            ratios = sorted(sum(one[ours][1:]) / sum(one[theirs][1:]) for one in found)
            spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            times = f"torch {' '.join(shown[0])}, dtrain {' '.join(shown[1])}"
            print(f"{kind:>15}, {workers} workers: {times}, ratio {spread}", flush=True)


if __name__ == "__main__":
    main()
