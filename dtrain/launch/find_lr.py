"""dtrain check --find-lr: the learning-rate range test (Smith, 2015), on weights that are put back afterwards."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map

from dtrain.data import rng
from dtrain.dataloader import MicroBatch
from dtrain.reporting.png_drawing import curve, png
from dtrain.tracking.whole_file import write_bytes
from dtrain.trainer import Trainer
from dtrain.training.finite_step import NonFiniteError

LEAST, MOST, STEPS = 1e-7, 10.0, 100  # rates, and steps from one to the other; as in fastai's lr_find
_SMOOTHING = 0.98  # of the losses, as there and in Lightning's LRFinder
_DIVERGED = 4.0  # times the least smoothed loss, at which the test ends
_UNUSED = 10  # first steps, in which the mean over the losses says little yet
PICTURE = "find-lr.png"


class Kept(NamedTuple):
    """All that a test changes."""

    states: dict[str, Any]  # state_dicts
    generators: Any


def keep(trainer: Trainer) -> Kept:
    """A copy of weights, optimizer and random numbers, as they are now."""
    return Kept({name: _copied(part.state_dict()) for name, part in _changing(trainer).items()}, rng.get_state())


def _changing(trainer: Trainer) -> dict[str, Any]:
    """What a step changes, by name."""
    parts: Any = trainer.trainables
    changing = {"model": parts.module, "loss": parts.loss, "scaler": parts.scaler, "optimizer": parts.optimizer}
    return {name: part for name, part in changing.items() if part is not None}


def _copied(tree: Any) -> Any:
    """The same nested containers with copies of the tensors; Python's deepcopy fails for shards."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def put_back(trainer: Trainer, kept: Kept) -> None:
    """Let all be as it was."""
    for name, part in _changing(trainer).items():
        part.load_state_dict(_copied(kept.states[name]))
    trainer.optimizer.zero_grad()
    rng.set_state(kept.generators)
    trainer.state.clear()


def find_lr(trainer: Trainer, kept: Kept) -> Iterator[str]:
    """Take steps with ever higher rates from the weights that were kept; a line with what to take, and a picture.

    All ranks call it. Warm-up and schedule have no part in it; groups keep the ratios of their rates.
    """
    if len(trainer.optimizers) > 1:
        yield f"learning rate: no suggestion: there are several optimizers ({', '.join(trainer.optimizers)})"
        return
    put_back(trainer, kept)
    rates, losses = ramp(trainer)
    put_back(trainer, kept)
    smooth = smoothed(losses)
    index = steepest(rates, smooth)
    if index is None:
        yield f"learning rate: no suggestion: the loss does not fall from {LEAST:g} to {rates[-1]:.2g}"
    else:
        lowest = rates[int(np.argmin(smooth[_UNUSED:])) + _UNUSED]
        diverges = f", and diverges by {rates[-1]:.2g}" if len(rates) < STEPS else ""
        text = f"the loss falls fastest; it is lowest at {lowest:.2g}{diverges}"
        yield f"learning rate: optimizer.lr={rates[index]:.2g} is suggested, at which {text}"
    if trainer.ranks.is_main:
        image = curve("loss by learning rate", rates, smooth, index, ("learning rate", "loss, smoothed"))
        facts = {"rates": json.dumps(rates), "losses": json.dumps(losses)}
        write_bytes(Path(PICTURE), png(image, facts))
        yield f"learning rate: the curve is in {PICTURE}"


def ramp(trainer: Trainer) -> tuple[list[float], list[float]]:
    """The rate and the loss of each step, equal on all ranks, until the loss diverges."""
    groups = trainer.optimizer.param_groups
    ratios = [group["lr"] / (groups[0]["lr"] or 1.0) for group in groups]
    warmup_steps, trainer.schedule.warmup_steps = trainer.schedule.warmup_steps, 0
    rates: list[float] = []
    losses: list[float] = []
    trainer.model.train()
    try:
        for micros in itertools.islice(_steps(trainer), STEPS):
            rates.append(LEAST * (MOST / LEAST) ** (len(rates) / (STEPS - 1)))
            for group, ratio in zip(groups, ratios, strict=True):
                group["lr"] = rates[-1] * ratio
            losses.append(_step(trainer, micros))
            smooth = smoothed(losses)
            if not math.isfinite(smooth[-1]) or smooth[-1] > _DIVERGED * min(smooth):
                break
    except NonFiniteError:
        losses.append(math.inf)
    finally:
        trainer.schedule.warmup_steps = warmup_steps
    finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    return [rates[number] for number in finite], [losses[number] for number in finite]


def _steps(trainer: Trainer) -> Iterator[list[MicroBatch]]:
    """The batches of each optimizer step, epoch after epoch."""
    for epoch in itertools.count():
        micros: list[MicroBatch] = []
        for micro in trainer.train_loader.epoch(epoch):
            micros.append(micro)
            if micro.closes:
                yield micros
                micros = []


def _step(trainer: Trainer, micros: list[MicroBatch]) -> float:
    """One optimizer step; its loss over the samples of all ranks."""
    trainer.state.clear()
    for micro in micros:
        if micro.batch is not None:
            trainer.learn(micro)
    total = float(trainer.ranks.sum_(trainer.state.stacked_sums)[0])
    trainer.take_step()
    return total / micros[-1].step_samples


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving averages without the bias of their beginning."""
    average, result = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        result.append(average / (1 - _SMOOTHING**number))
    return result


def steepest(rates: list[float], smooth: list[float]) -> int | None:
    """Where the loss falls fastest over the logarithm of the rate; None where it does not fall."""
    if len(rates) < _UNUSED + 3:
        return None
    slopes = np.gradient(smooth[_UNUSED:-1])
    index = int(np.argmin(slopes))
    return index + _UNUSED if slopes[index] < 0 else None
