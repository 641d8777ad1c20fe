"""dtrain check: what a training does only after hours, tried once: writes nothing, and its weights are thrown away."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from ml_collections import ConfigDict

from dtrain.checkpoint.checkpoint_files import LOSS
from dtrain.checkpoint.contents import take_snapshot
from dtrain.checkpoint.weights import misfits_of
from dtrain.config.errors import ConfigError, first_few
from dtrain.config.metric_rules import VOLUMES, not_given
from dtrain.config.optimizers import ONE
from dtrain.config.schema import refused
from dtrain.data.samplers import BatchShard
from dtrain.loss import get_loss_criterion
from dtrain.modelloader import get_model
from dtrain.predict.run import first_planes
from dtrain.trainer import Trainer
from dtrain.training.evaluate import evaluate, evaluate_volumes
from dtrain.training.evidence import Evidence
from dtrain.training.optimizer import freeze, get_optimizers, require_trained, shown
from dtrain.training.setup import make_lazy_parts
from dtrain.training.state import capture


def rehearse(trainer: Trainer, config: ConfigDict) -> Iterator[str]:
    """One optimizer step, the epoch's smallest batch, a batch of the other phases, and a state that can be resumed.

    Yields a line for each. An error says which sample it is about.

    Raises:
        ConfigError: What failed fails for the config's own reasons.
    """
    try:
        yield from _parts(trainer, config)
    except Exception as error:
        Evidence(trainer.parts, trainer.activity, trainer.state, trainer.last_step).locate(error)
        raise


def _parts(trainer: Trainer, config: ConfigDict) -> Iterator[str]:
    for text in trainer.trainables.freezing.lines() if trainer.trainables.freezing else ():
        yield f"frozen: {text}"
    for label, text in shown(trainer.trainables.built):
        yield f"{label}: {text}"
    if trainer.train_loader.sampler is not None:
        yield f"train: sampled by {trainer.train_loader.described}"
    yield _first_step(trainer)
    if line := _smallest_batch(trainer, config):
        yield line
    for phase in ("val", "test"):
        for name, loader in trainer.loaders.of(phase).items():
            every = trainer.inference.whole_volumes.get(name)
            yield from (_evaluation(trainer, name, loader, kind) for kind in _kinds(every))
    _require_resumable(trainer, config)
    yield "state: can be saved and resumed"


def _first_step(trainer: Trainer) -> str:
    """The first optimizer step of a training, as the loop takes it."""
    parts: Any = trainer.trainables
    trainer.model.train()
    trainer.finite_step.begin(parts.all, parts.loss_objects)
    count = samples = 0
    for micro in trainer.train_loader.epoch(0):
        if micro.batch is not None:
            trainer.learn(micro)
            count, samples = count + 1, samples + micro.samples
        if micro.closes and count:
            break
    require_trained(parts.optimizers.values(), parts.module, parts.loss_now)
    loss = float(trainer.state.sums["loss"]) / samples
    trainer.take_step()
    of = "one batch" if count == 1 else f"{count} batches"
    return f"train: {of} forward and backward, loss {loss:.4g}, and an optimizer step"


def _smallest_batch(trainer: Trainer, config: ConfigDict) -> str:
    """The smallest batch of an epoch, mostly its last one: statistics over one sample are an error."""
    shard = trainer.train_loader.shard
    which = "smallest" if isinstance(shard, BatchShard) else "last"
    start = shard.smallest()
    if not start:
        return ""
    micro = next(iter(trainer.train_loader.epoch(0, start)))
    if micro.batch is None:
        return ""
    count = f"{micro.samples} sample{'s' if micro.samples > 1 else ''}"
    trainer.state.clear()
    try:
        trainer.learn(micro._replace(closes=False))  # gradients alone, of which no step is taken
    except Exception as error:
        cure = "leave it out with drop_last: true, or choose another batch_size"
        text = f"the {which} batch of each epoch has {count}, with which the model fails ({error}); {cure}"
        raise refused(config, ("loaders", "train"), text) from error
    trainer.own.end()
    for optimizer in trainer.trainables.optimizers.values():
        optimizer.zero_grad()
    loss = float(trainer.state.sums["loss"]) / max(1, micro.samples)
    return f"train: the epoch's {which} batch of {count}, loss {loss:.4g}"


def _kinds(every_epochs: int | None) -> list[bool]:
    """Whether an evaluation is of whole volumes: in none, in all, or in every so many epochs."""
    return [False] if every_epochs is None else [True] if every_epochs == 1 else [False, True]


def _evaluation(trainer: Trainer, name: str, loader: Any, of_volumes: bool) -> str:
    """One batch, or of whole volumes the first planes of one, with all metrics."""
    parts, phase = trainer.trainables, name.partition("/")[0]
    trainer.activity.enter({"val": "validation", "test": "test"}[phase])
    trainer.activity.data_set = name
    with parts.evaluating(parts.compiled):
        if of_volumes:
            is_val = phase == "val"
            inference = trainer.inference.of_training(parts.compiled, name) if is_val else trainer.inference
            planes, forward = first_planes(inference, loader), trainer.forward if is_val else None
            figures = evaluate_volumes(parts.compiled, planes, trainer.metrics, trainer.ranks, forward=forward)
        else:
            batch = islice((counted for counted in loader.counted() if counted[1]), 1)
            trainer.evaluated = parts.compiled
            measured = evaluate(
                lambda _, batch: trainer.evaluation_step(batch), parts.compiled, batch, trainer.metrics, trainer.ranks
            )
            figures = measured and measured.figures
    kind = f"{name}/{VOLUMES}" if of_volumes and phase == "val" else f"{name}/"
    given = [f"{kind}{figure}" for figure in figures or {}]
    is_judged = trainer.monitor.startswith(kind) and trainer.monitor.startswith(f"{name}/{VOLUMES}") == of_volumes
    if phase == "val" and is_judged and trainer.monitor not in given:
        raise ConfigError(not_given(trainer.monitor, given))
    what = "the first planes of a volume" if of_volumes else "one batch"
    return f"{name}: {what}, {', '.join(f'{figure} {value:.4g}' for figure, value in (figures or {}).items())}"


def _require_resumable(trainer: Trainer, config: ConfigDict) -> None:
    """What a checkpoint would hold now can be written, and fits a model and an optimizer that are made anew."""
    trainer.ranks.strategy.saves_shards = False  # whole weights, to be loaded by a model that is made anew
    values, weights, ema, others = capture(trainer.state, trainer.trainables, trainer.ranks, trainer.parts.seed)
    if not trainer.ranks.is_main:  # of a sharded model it is complete on the main rank alone
        return
    take_snapshot(weights, values, ema, others=others)
    module, loss = get_model(config), get_loss_criterion(config) if config.get("loss") else None
    on_cpu = replace(trainer.forward, module=module, criterion=loss, device=torch.device("cpu"), precision="fp32")
    make_lazy_parts(on_cpu, trainer.loaders)
    _require_fit(config, "model", module, weights)
    of_loss = loss.module if loss else None
    if of_loss is not None and LOSS in others:
        _require_fit(config, "loss", of_loss, others[LOSS])
    try:
        thawed_later = freeze(config, module, of_loss).thawed_later
        for name, built in get_optimizers(config, module, of_loss, thawed_later).items():
            built.optimizer.load_state_dict(values["optimizer"] if name == ONE else values["optimizer"][name])
    except Exception as error:
        raise refused(config, ("optimizer",), f"could not be resumed: load_state_dict raised {error}") from error


def _require_fit(config: ConfigDict, section: str, module: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    if misfits := misfits_of(module, weights):
        cure = "make all modules in __init__, and register buffers in their final size"
        text = f"could not be resumed: after one step its state no longer fits the {section} as built; {cure}"
        raise refused(config, (section,), f"{text} ({first_few(misfits, 5, '; ')})")
    try:
        module.load_state_dict(weights)
    except Exception as error:
        raise refused(config, (section,), f"could not be resumed: load_state_dict raised {error}") from error
