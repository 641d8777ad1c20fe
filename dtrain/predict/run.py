"""Predicts volumes or items into files, or whole volumes for metrics."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.weights import load_for_use
from dtrain.config.errors import ConfigError
from dtrain.data import rng
from dtrain.data.space import difference, space_of
from dtrain.dataloader import Loaders
from dtrain.predict.inference import Inference, Result, StoppedError
from dtrain.predict.items import predict_items
from dtrain.predict.plan import plan, share_of
from dtrain.predict.stitching import Run, stitched
from dtrain.predict.work_folder import opened
from dtrain.predict.writer import VolumeWriter
from dtrain.tracking.run_folder import RunFolder, read_run


def predict(
    inference: Inference,
    loaders: Loaders,
    checkpoints: Checkpoints,
    checkpoint: str | Path | None,
    output_dir: str | Path | None,
    overwrite: bool,
) -> Result:
    """Predict what `loaders.predict` holds, else `loaders.test`, into files. All ranks call it.

    Of a dataset with `volumes`, the dataset itself is read rather than its loader. The model gets the weights of
    `checkpoint`, a folder or a weight file, else the predictor's own, else the run's best or last. Files go to
    `output_dir`, else the predictor's own, else `predictions` in the run folder; `overwrite` makes those anew that were
    made with another model or other settings.

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
    path = checkpoint or predictor.checkpoint
    load_for_use(module, ranks, checkpoints, Path(path) if path else None, not inference.has_weights)
    weights = ranks.broadcast(_digest(module.state_dict()) if ranks.is_main else None)
    inference = replace(inference, identity={"weights": weights, **inference.identity})
    folder = Path(output_dir or predictor.output_dir or RunFolder(inference.run_folder).predictions)
    dataset = loader.dataset.dataset  # the loader's own wraps it
    compare_with_training(inference, loader, Path(path) if path else None)
    with rng.untouched(), inference.channels_last():
        inference.model.eval()
        if not hasattr(dataset, "volumes"):
            return predict_items(inference, loader, folder, overwrite)
        return volumes(inference, dataset, predictor.batch_size or loader.batch_sampler.batch_size, folder, overwrite)


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


def volumes(inference: Inference, dataset: Any, batch_size: int, folder: Path, overwrite: bool) -> Result:
    """Predict every volume of a dataset into a file of its own, `batch_size` patches at once; see `predict`."""
    source = inference.predictor.source(dataset)
    with opened(folder, inference.ranks, lambda: plan(inference, source, folder, overwrite)) as tasks:
        writer = VolumeWriter(inference, source, tasks)
        own = share_of(tasks, source, inference.ranks)
        patches = [len(source.grids[run.volume].touching(run.begin, run.end)) for run in own]
        inference.progress.start_patches(sum(patches))
        with contextlib.suppress(StoppedError):
            for run, planes in stitched(source, own, inference, batch_size):
                writer.write_run(run, own[run], planes)
        return writer.result(stopped=writer.join_rest())


def logits(inference: Inference, loader: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's volumes, whole: the number, logits (1, K, *spatial) and label (1, *spatial) or (1, K, *spatial).

    Volume v is rank v modulo the number of ranks' own. One volume and its logits are in memory at a time. A request to
    stop ends them.

    Raises:
        ValueError: A volume has no label.
    """
    ranks, dataset = inference.ranks, loader.dataset.dataset
    source = inference.predictor.source(dataset)
    batch_size = inference.predictor.batch_size or loader.batch_sampler.batch_size
    own = range(ranks.rank, len(source.volumes), ranks.world_size)
    runs = [Run(number, 0, source.volumes[number].shape[0]) for number in own]
    inference.progress.start_patches(sum(len(source.grids[number]) for number in own))
    with contextlib.suppress(StoppedError), inference.channels_last():
        for run, planes in stitched(source, runs, inference, batch_size):
            whole = None
            for low, chunk in planes:
                if whole is None:
                    whole = torch.empty((1, len(chunk), *source.volumes[run.volume].shape))
                whole[0, :, low : low + chunk.shape[1]] = torch.from_numpy(chunk)
            assert whole is not None
            yield run.volume, whole, source.label(run.volume)


def first_planes(inference: Inference, loader: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The same for the first planes of the first volume alone, as far as one patch reaches."""
    source = inference.predictor.source(loader.dataset.dataset)
    batch_size = inference.predictor.batch_size or loader.batch_sampler.batch_size
    shape = source.volumes[0].shape
    depth = min(source.grids[0].patch[0], shape[0])
    with inference.channels_last():
        for _, planes in stitched(source, [Run(0, 0, depth)], inference, batch_size):
            chunk = torch.cat([torch.from_numpy(chunk).clone() for _, chunk in planes], dim=1)
            label = source.label(0)
            yield 0, chunk[None], label.narrow(label.ndim - len(shape), 0, depth)
