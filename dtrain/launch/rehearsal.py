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
from dtrain.config.metric_rules import not_given
from dtrain.config.schema import refused
from dtrain.loss import get_loss_criterion
from dtrain.modelloader import get_model
from dtrain.predict.run import first_planes
from dtrain.trainer import Trainer
from dtrain.training.evaluate import evaluate, evaluate_volumes
from dtrain.training.evidence import Evidence
from dtrain.training.optimizer import get_optimizer, require_trained
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
    yield _first_step(trainer)
    if line := _smallest_batch(trainer, config):
        yield line
    for phase in ("val", "test"):
        if getattr(trainer.loaders, phase) is not None:
            yield _evaluation(trainer, phase)
    _require_resumable(trainer, config)
    yield "state: can be saved and resumed"


def _first_step(trainer: Trainer) -> str:
    """The first optimizer step of a training, as the loop takes it."""
    parts: Any = trainer.trainables
    trainer.model.train()
    trainer.finite_step.begin(parts.all, parts.criterion.objects)
    losses = []
    for micro in trainer.train_loader.epoch(0):
        if micro.batch is not None:
            loss, terms = trainer.training_step(micro.batch)
            trainer.backward(loss, terms, micro)
            losses.append(float(loss.detach()))
        if micro.closes and losses:
            break
    require_trained(parts.optimizer, parts.module, parts.criterion.modules_now())
    trainer.optimizer_step()
    of = "one batch" if len(losses) == 1 else f"{len(losses)} batches"
    return f"train: {of} forward and backward, loss {sum(losses) / len(losses):.4g}, and an optimizer step"


def _smallest_batch(trainer: Trainer, config: ConfigDict) -> str:
    """The last batch of an epoch where it is shorter than the others: statistics over one sample are an error."""
    shard = trainer.train_loader.shard
    start = (shard.end(0) - 1) // shard.global_batch * shard.global_batch
    if not start or shard.end(0) - start == shard.global_batch:
        return ""
    micro = next(iter(trainer.train_loader.epoch(0, start)))
    if micro.batch is None:
        return ""
    count = f"{micro.samples} sample{'s' if micro.samples > 1 else ''}"
    try:
        loss, terms = trainer.training_step(micro.batch)
        trainer.backward(loss, terms, micro)
    except Exception as error:
        cure = "leave it out with drop_last: true, or choose another batch_size"
        text = f"the last batch of each epoch has {count}, with which the model fails ({error}); {cure}"
        raise refused(config, ("loaders", "train"), text) from error
    trainer.trainables.optimizer.zero_grad()  # type: ignore[union-attr]
    return f"train: the epoch's last batch of {count}, loss {float(loss.detach()):.4g}"


def _evaluation(trainer: Trainer, phase: str) -> str:
    """One batch, or for a test of whole volumes the first planes of one, with all metrics."""
    parts, loader = trainer.trainables, getattr(trainer.loaders, phase)
    trainer.activity.phase = {"val": "validation", "test": "test"}[phase]
    of_volumes = phase == "test" and trainer.inference.tests_volumes
    with parts.evaluating(parts.compiled):
        if of_volumes:
            planes = first_planes(trainer.inference, loader)
            figures = evaluate_volumes(parts.compiled, planes, trainer.metrics, trainer.ranks)
        else:
            batch = islice((counted for counted in loader.counted() if counted[1]), 1)
            measured = evaluate(trainer.forward, parts.compiled, batch, trainer.metrics, trainer.ranks)
            figures = measured and measured.figures
    given = [f"val/{name}" for name in figures or {}]
    if phase == "val" and trainer.monitor not in given:
        raise ConfigError(not_given(trainer.monitor, given))
    what = "the first planes of a volume" if of_volumes else "one batch"
    return f"{phase}: {what}, {', '.join(f'{name} {value:.4g}' for name, value in (figures or {}).items())}"


def _require_resumable(trainer: Trainer, config: ConfigDict) -> None:
    """What a checkpoint would hold now can be written, and fits a model and an optimizer that are made anew."""
    values, weights, ema, others = capture(trainer.state, trainer.trainables, trainer.ranks, trainer.parts.seed)
    if not trainer.ranks.is_main:  # of a sharded model it is complete on the main rank alone
        return
    take_snapshot(weights, values, ema, others=others)
    module, loss = get_model(config), get_loss_criterion(config)
    on_cpu = replace(trainer.forward, module=module, criterion=loss, device=torch.device("cpu"), precision="fp32")
    make_lazy_parts(on_cpu, trainer.loaders)
    _require_fit(config, "model", module, weights)
    if loss.module is not None and LOSS in others:
        _require_fit(config, "loss", loss.module, others[LOSS])
    try:
        get_optimizer(config, module, loss.module).load_state_dict(values["optimizer"])
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
