"""Predicts volumes or items into files, or whole volumes for metrics."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.weights import load_for_use
from dtrain.config.errors import ConfigError, first_few
from dtrain.data import rng
from dtrain.data.space import difference, space_of
from dtrain.dataloader import Loaders
from dtrain.predict.inference import Inference, Result, StoppedError
from dtrain.predict.items import predict_items
from dtrain.predict.members import Ensemble, Members, checkpoints_of, folds_of
from dtrain.predict.plan import Task, left_at, plan, share_of
from dtrain.predict.source import Source
from dtrain.predict.stitching import Run, stitched
from dtrain.predict.work_folder import opened
from dtrain.predict.writer import VolumeWriter
from dtrain.tracking.run_folder import RunFolder, read_run

LARGE = 1 << 17  # voxels of a patch


def predict(
    inference: Inference,
    loaders: Loaders,
    checkpoints: Checkpoints,
    checkpoint: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path | None,
    overwrite: bool,
    folds: Mapping[str, Any] | None = None,
) -> Result:
    """Predict what `loaders.predict` holds, else `loaders.test`, into files. All ranks call it.

    Of a dataset with `volumes`, the dataset itself is read rather than its loader. The model gets the weights of
    `checkpoint`, a folder or a weight file, else the predictor's own, else the run's best or last. Of several ones the
    probabilities are averaged; with `folds`, settings of `fold_settings`, checkpoint k predicts fold k alone. Files go
    to `output_dir`, else the predictor's own, else `predictions` in the run folder; `overwrite` makes those anew that
    were made with another model or other settings.

    Raises:
        ConfigError: There is nothing to predict, no checkpoint, or a file that is not to be written.
        PredictionError: A file cannot be written.
    """
    predictor, ranks, module = inference.predictor, inference.ranks, inference.forward.module
    loader: Any = loaders.test if loaders.predict is None else loaders.predict  # it may be empty on this rank
    if ranks.strategy.is_sharded:
        raise ConfigError("a sharded model cannot predict: use create_trainer(..., purpose='predict')")
    if loaders.predict is None and len(loaders.of("test")) > 1:
        raise ConfigError("loaders.test: holds several sets; name what is predicted: loaders.predict: {...}")
    if loader is None:
        raise ConfigError("loaders: has neither 'predict' nor 'test', so there is nothing to predict")
    dataset = loader.dataset.dataset  # the loader's own wraps it
    wish = checkpoint or predictor.checkpoint
    wishes = [] if wish is None else [wish] if isinstance(wish, str | Path) else list(wish)
    paths: list[Path | None] = [*ranks.decide(lambda: checkpoints_of(wishes))] or [None]

    def load(number: int) -> None:
        load_for_use(module, ranks, checkpoints, paths[number], not inference.has_weights)

    members = _members(inference, paths, load, dataset, folds)
    folder = Path(output_dir or predictor.output_dir or RunFolder(inference.run_folder).predictions)
    compare_with_training(inference, loader, paths[0])
    with rng.untouched(), inference.channels_last():
        inference.model.eval()
        if not hasattr(dataset, "volumes"):
            return predict_items(inference, loader, folder, overwrite, members)
        return volumes(inference, dataset, loader.batch_sampler.batch_size, folder, overwrite, members)


def _members(
    inference: Inference,
    paths: Sequence[Path | None],
    load: Callable[[int], None],
    dataset: Any,
    folds: Mapping[str, Any] | None,
) -> Members:
    """What predicts, with what tells the weights apart; the first ones are loaded."""
    ranks, weights = inference.ranks, []
    for number in reversed(range(len(paths))):
        load(number)
        state = inference.forward.module.state_dict()
        weights.append(ranks.broadcast(_digest(state) if ranks.is_main else None))
    if len(paths) > 1 and ranks.is_main:
        what = f"out of fold: {len(paths)} checkpoints" if folds else f"an ensemble of {len(paths)} checkpoints"
        inference.progress.note(f"{what}: {first_few([str(path) for path in paths], 5)}")
    numbers = None if folds is None else ranks.decide(lambda: folds_of(dataset, folds))
    return Members(weights[::-1], load, numbers)


def compare_with_training(inference: Inference, loader: Any, checkpoint: Path | None) -> None:
    """Say in one line how a loader's files lie differently in space than those that the weights were trained on."""
    folders = checkpoint.resolve().parents[:3] if checkpoint else [inference.run_folder]  # or a file in a checkpoint
    trained = next((space for folder in folders if (space := read_run(folder).get("space"))), None)
    line = difference({"training": trained, "now": space_of(loader.dataset.dataset)})
    if inference.ranks.is_main and line:
        inference.progress.note(line)


def _digest(weights: Mapping[str, Any]) -> str:
    """One short text for weights, the same on any device."""
    result = hashlib.sha256()
    for name, value in weights.items():
        result.update(name.encode())
        if isinstance(value, torch.Tensor):
            result.update(f"{value.dtype}{tuple(value.shape)}".encode())
            result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def volumes(
    inference: Inference,
    dataset: Any,
    batch_size: int,
    folder: Path,
    overwrite: bool,
    members: Members | None = None,
) -> Result:
    """Predict every volume of a dataset into a file of its own; see `predict`, and `at_once` for the batch size.

    Of several members each predicts its volumes, all of them, before the next one is loaded.
    """
    source, ranks, members = inference.predictor.source(dataset), inference.ranks, members or Members()
    several, batch_size = len(members.weights) > 1, at_once(inference, source, batch_size)
    with opened(folder, ranks, lambda: plan(inference, source, folder, overwrite, members)) as tasks:
        writer = VolumeWriter(inference, source, tasks, members)
        for member in range(len(members.weights)):
            left: Sequence[Task] = tasks
            if several:
                left = ranks.decide(functools.partial(left_at, tasks, member, members))
                if not any(task.missing for task in left):
                    continue
                members.load(member)
            own = share_of(left, source, ranks)
            patches = [len(source.grids[run.volume].touching(run.begin, run.end)) for run in own]
            inference.progress.start_patches(sum(patches))
            stopped = True
            with contextlib.suppress(StoppedError):
                for run, planes in stitched(source, own, inference, batch_size):
                    writer.write_run(run, own[run], planes, member)
                stopped = False
            if several and ranks.broadcast(any(ranks.gather(stopped) or ())):
                break
        return writer.result(stopped=writer.join_rest())


def at_once(inference: Inference, source: Source, batch_size: int) -> int:
    """How many patches the model gets: what the predictor says, else the loader's batch size.

    On a CPU large patches go one by one, but in a training, whose layers are as they are: what the model makes of
    several does not fit into a cache, which takes up to 1.6 times as long.
    """
    least = min((prod(grid.patch) for grid in source.grids), default=0)
    is_slower = inference.forward.device.type == "cpu" and least >= LARGE and not inference.is_training
    return inference.predictor.batch_size or (1 if is_slower else batch_size)


def logits(inference: Inference, loader: Any) -> Iterator[tuple[int, Tensor, Any]]:
    """This rank's volumes, whole: the number, logits (1, K, *spatial) and target, see `Source.target`.

    Volume v is rank v modulo the number of ranks' own. One volume and its logits are in memory at a time. A request to
    stop ends them.

    Raises:
        ValueError: A volume has no label.
    """
    ranks, dataset = inference.ranks, loader.dataset.dataset
    source = inference.predictor.source(dataset)
    batch_size = at_once(inference, source, loader.batch_sampler.batch_size)
    own = range(ranks.rank, len(source.volumes), ranks.world_size)
    runs = [Run(number, 0, source.volumes[number].shape[0]) for number in own]
    team = inference.model if isinstance(inference.model, Ensemble) else None
    count = sum(len(source.grids[number]) for number in own)
    inference.progress.start_patches(count * (len(team.states) if team else 1))
    with contextlib.suppress(StoppedError), inference.channels_last():
        if team is None:
            for run, planes in stitched(source, runs, inference, batch_size):
                yield run.volume, _whole(source, run, planes), source.target(run.volume)
            return
        for run in runs:  # each member's volume is put together before the mean is taken, as in a prediction
            total: Any = 0
            for number in range(len(team.states)):
                member = replace(inference, model=team.load(number))
                for _, planes in stitched(source, [run], member, batch_size):
                    total = total + inference.predictor.activated(_whole(source, run, planes))
            yield run.volume, team.logits(total / len(team.states)), source.target(run.volume)


def _whole(source: Source, run: Run, planes: Iterator[tuple[int, np.ndarray]]) -> Tensor:
    """All planes of a volume, (1, K, *spatial)."""
    whole = None
    for low, chunk in planes:
        if whole is None:
            whole = torch.empty((1, len(chunk), *source.volumes[run.volume].shape))
        whole[0, :, low : low + chunk.shape[1]] = torch.from_numpy(chunk)
    assert whole is not None
    return whole


def first_planes(inference: Inference, loader: Any) -> Iterator[tuple[int, Tensor, Any]]:
    """The same for the first planes of the first volume alone, as far as one patch reaches."""
    source = inference.predictor.source(loader.dataset.dataset)
    batch_size = at_once(inference, source, loader.batch_sampler.batch_size)
    shape = source.volumes[0].shape
    depth = min(source.grids[0].patch[0], shape[0])
    with inference.channels_last():
        for _, planes in stitched(source, [Run(0, 0, depth)], inference, batch_size):
            chunk = torch.cat([torch.from_numpy(chunk).clone() for _, chunk in planes], dim=1)
            target = source.target(0)
            parts = target if isinstance(target, tuple) else (target,)
            first = tuple(part.narrow(part.ndim - len(shape), 0, depth) for part in parts)
            yield 0, chunk[None], first if isinstance(target, tuple) else first[0]
