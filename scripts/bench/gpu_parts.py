"""What gpu.py trains, by hand and by dtrain: data that lie in memory, and the clock of both. Knows no dtrain."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Volumes(Dataset[tuple[Tensor, Tensor]]):
    """Random volumes (1, D, H, W) and whether a voxel is high; a few of them, again and again."""

    def __init__(self, samples: int, size: Sequence[int]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.volumes, self.samples = torch.randn(8, 1, *size, generator=draw), samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        volume = self.volumes[index % 8]
        return volume, (volume > 0).float()


class Scenes(Dataset[tuple[Tensor, tuple[Tensor, Tensor]]]):
    """Random images (3, H, W), a class of 19 for each pixel, and boundaries (H, W)."""

    def __init__(self, samples: int, size: Sequence[int]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.images, self.samples = torch.randn(8, 3, *size, generator=draw), samples
        self.labels = torch.randint(19, (8, *size), generator=draw)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        label = self.labels[index % 8]
        return self.images[index % 8], (label, (label == 0).float())


class Clock:
    """Ticks once per optimizer step: the time of some steps after a warm-up, then a trace of some more.

    Waits for the device at the edges of the steps that are timed, and nowhere else.
    """

    def __init__(self, device: str, warm_up: int, steps: int, traced: int) -> None:
        self.is_gpu, self.ticks = device == "cuda", 0
        self.first, self.last, self.end = warm_up, warm_up + steps, warm_up + steps + traced
        self.began = self.ended = (0.0, 0.0)
        self.profiler: Any = None

    def tick(self, *_: Any) -> None:
        """A step is done, or, on a GPU, asked for."""
        self.ticks += 1
        if self.ticks == self.first:
            self._wait()
            self.began = time.perf_counter(), time.thread_time()
        elif self.ticks == self.last:
            host = time.thread_time()  # before it waits
            self._wait()
            self.ended = time.perf_counter(), host
            self._trace()
        elif self.ticks == self.end and self.profiler is not None:
            self._wait()
            self.profiler.stop()

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _trace(self) -> None:
        if self.is_gpu and self.end > self.last:
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()

    def figures(self) -> dict[str, float | None]:
        """Milliseconds of a step, microseconds of the host's thread in it, and the share in which the device idles."""
        if self.ticks < self.end:
            raise RuntimeError(f"{self.ticks} steps were taken, expected {self.end}")
        steps = self.last - self.first
        seconds, host = (end - begin for begin, end in zip(self.began, self.ended, strict=True))
        idle = None if self.profiler is None else idle_share(kernels(self.profiler))
        return {"step_ms": seconds / steps * 1e3, "host_us": host / steps * 1e6, "idle": idle}


def kernels(profiler: Any) -> list[tuple[float, float]]:
    """When the device was at work, as (begin, end) of each kernel and copy."""
    events = profiler.profiler.kineto_results.events()
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device]


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end in which no span is at work."""
    if not spans:
        return 1.0
    ordered = sorted(spans)
    busy, until = 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    whole = until - ordered[0][0]
    return 1 - busy / whole if whole else 0.0
