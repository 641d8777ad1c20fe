"""How long a training step takes, and where its time goes: a few steps, timed; and how fast samples are loaded."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dtrain.dataloader import MicroBatch
from dtrain.launch.memory_forecast import narrowed
from dtrain.trainer import Trainer
from dtrain.training.step_clock import PHASES, clock_of

WARM_UP_STEPS = 2  # the first ones start workers, choose kernels, make the optimizer's state
LEAST, MOST = 3, 20  # steps that are timed
SECONDS = 1.5  # that they may take
_PARTS = ("data_wait", "transfer", "forward", "backward", "optimizer")


class Timing(NamedTuple):
    """Seconds of one optimizer step, and of the loading of one batch."""

    data: float  # the step waits for its batches
    transfer: float  # of them to the device
    forward: float  # with all that a training_step does which takes its steps itself
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
        return self.transfer + self.forward + self.backward + self.optimizer


def timed(trainer: Trainer, per_rank: int | None) -> Timing:
    """Take some steps as the loop does, and time them: the median of each part. All ranks call it.

    Args:
        trainer: Its weights change.
        per_rank: Samples of a batch, where a rank of another world would have fewer; None: as they come.
    """
    clock = clock_of(trainer.device)
    kept = trainer.activity.clock
    trainer.activity.follow(clock)
    seconds: list[list[float]] = []
    samples, count = 0, LEAST + WARM_UP_STEPS
    began = time.perf_counter()
    trainer.model.train()
    for of_step in _steps(trainer, per_rank):
        clock.end_step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        clock.settle()
        samples = max(samples, of_step)
        seconds.append(clock.take()[0])
        if len(seconds) == WARM_UP_STEPS + 1:  # all ranks take as many
            left = SECONDS - (time.perf_counter() - began)
            more = max(LEAST - 1, min(MOST, int(left / max(sum(seconds[-1]), 1e-6))))
            count = len(seconds) + int(trainer.ranks.broadcast(more))
        if len(seconds) >= count:
            break
    trainer.activity.follow(kept)
    medians = dict(zip(PHASES, map(statistics.median, zip(*seconds[WARM_UP_STEPS:], strict=True)), strict=True))
    data, transfer, forward, backward, optimizer = (medians[kind] for kind in _PARTS)
    return Timing(data, transfer, forward, backward, optimizer, load_seconds(trainer, per_rank), samples)


def _steps(trainer: Trainer, per_rank: int | None) -> Iterator[int]:
    """Takes a step; yields this rank's samples in it."""
    activity = trainer.activity
    for epoch in itertools.count():
        trainer.state.clear()
        samples = 0
        activity.enter("waiting for data")
        for micro in trainer.train_loader.epoch(epoch):
            if micro.batch is not None:
                micro = _as_rank(micro, per_rank)
                trainer.learn(micro)
                samples += micro.samples
            if micro.closes:
                activity.enter("optimizer step")
                if samples:
                    trainer.take_step()
                yield samples
                samples = 0
            activity.enter("waiting for data")


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
