"""How long a training step takes, and where its time goes: a few steps, timed; and how fast samples are loaded."""

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dtrain.dataloader import MicroBatch
from dtrain.launch.memory_forecast import narrowed
from dtrain.trainer import Trainer

WARM_UP_STEPS = 2  # the first ones start workers, choose kernels, make the optimizer's state
LEAST, MOST = 3, 20  # steps that are timed
SECONDS = 1.5  # that they may take


class Timing(NamedTuple):
    """Seconds of one optimizer step, and of the loading of one batch."""

    data: float  # the step waits for its batches
    forward: float  # with the way to the device; with all of a training_step that takes its steps itself
    backward: float
    optimizer: float
    load: float  # of one batch, by one process
    samples: int  # of the step, on this rank

    @property
    def step(self) -> float:
        """The whole step."""
        return self.data + self.work

    @property
    def work(self) -> float:
        """The step without waiting for data."""
        return self.forward + self.backward + self.optimizer


def timed(trainer: Trainer, per_rank: int | None) -> Timing:
    """Take some steps as the loop does, and time them. All ranks call it.

    Args:
        trainer: Its weights change.
        per_rank: Samples of a batch, where a rank of another world would have fewer; None: as they come.
    """
    trainer.model.train()
    clock = _Clock(trainer)
    seconds: list[tuple[float, float, float, float]] = []
    samples, count = 0, LEAST + WARM_UP_STEPS
    began = time.perf_counter()
    for of_step in _steps(trainer, clock, per_rank):
        samples = max(samples, of_step)
        seconds.append(clock.take())
        if len(seconds) == WARM_UP_STEPS + 1:  # all ranks take as many
            left = SECONDS - (time.perf_counter() - began)
            more = max(LEAST - 1, min(MOST, int(left / max(sum(seconds[-1]), 1e-6))))
            count = len(seconds) + int(trainer.ranks.broadcast(more))
        if len(seconds) >= count:
            break
    data, forward, backward, optimizer = map(statistics.median, zip(*seconds[WARM_UP_STEPS:] or seconds, strict=True))
    return Timing(data, forward, backward, optimizer, load_seconds(trainer, per_rank), samples)


class _Clock:
    """Seconds since the last look, of a device that has done all that it was given."""

    def __init__(self, trainer: Trainer) -> None:
        self._waits = trainer.device.type == "cuda"
        self.parts = [0.0, 0.0, 0.0, 0.0]  # data, forward, backward, optimizer
        self._since = time.perf_counter()

    def mark(self, part: int) -> None:
        if self._waits:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self._since
        self._since = now

    def take(self) -> tuple[float, float, float, float]:
        """The seconds of a step, with which the next one begins."""
        data, forward, backward, optimizer = self.parts
        self.parts = [0.0, 0.0, 0.0, 0.0]
        return data, forward, backward, optimizer


def _steps(trainer: Trainer, clock: _Clock, per_rank: int | None) -> Iterator[int]:
    """Takes a step; yields this rank's samples in it."""
    step = trainer.training_step

    def timed_step(batch: Any) -> Any:
        result = step(batch)
        clock.mark(1)
        return result

    trainer.training_step = timed_step  # type: ignore[method-assign]
    try:
        for epoch in range(1 + MOST + WARM_UP_STEPS):  # each has a step at least
            trainer.state.clear()
            samples = 0
            clock.mark(0)
            clock.take()
            for micro in trainer.train_loader.epoch(epoch):
                clock.mark(0)
                if micro.batch is not None:
                    micro = _as_rank(micro, per_rank)
                    trainer.learn(micro)
                    samples += micro.samples
                clock.mark(2)
                if micro.closes:
                    if samples:
                        trainer.take_step()
                    clock.mark(3)
                    yield samples
                    samples = 0
                    clock.mark(3)
    finally:
        del trainer.training_step


def _as_rank(micro: MicroBatch, per_rank: int | None) -> MicroBatch:
    if per_rank is None or per_rank >= micro.samples:
        return micro
    return micro._replace(batch=narrowed(micro.batch, micro.samples, per_rank), samples=per_rank)


def load_seconds(trainer: Trainer, per_rank: int | None, batches: int = 3) -> float:
    """Seconds of one process for one batch: the median of a few, after a first that may open files.

    Args:
        trainer: Whose training data they are.
        per_rank: Samples of each, at most.
        batches: How many.
    """
    loader, seconds = trainer.train_loader, []
    for epoch, *indices in loader.shard.requests_from(0, 0, batches + 1):
        indices = indices[:per_rank]
        if isinstance(epoch, tuple):  # with the samples' positions
            epoch = epoch[: 1 + len(indices)]
        began = time.perf_counter()
        loader.batches.batch(epoch, *indices)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > SECONDS:
            break
    return statistics.median(seconds[1:] or seconds)
