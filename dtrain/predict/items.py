"""Predictions of a dataset without volumes: item by item, in order, into one file; knows no config and no training."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.config.errors import ConfigError
from dtrain.predict.formats import Sheet, whole_file, write
from dtrain.predict.predictor import Predictor
from dtrain.predict.stitching import StoppedError
from dtrain.predict.work_folder import Folder, digest, write_part
from dtrain.predict.writer import Result, Work, agreed, told

FORMATS = {"hdf5": "predictions.h5", "npy": "predictions.npy", "csv": "predictions.csv"}


def predict_items(
    predictor: Predictor,
    loader: Any,
    inputs: Callable[[Any], Any],
    work: Work,
    path: Path,
    overwrite: bool,
    step: Callable[[int], None],
) -> Result:
    """Predict each item of a dataset once. All ranks call it; each predicts the batches that its loader deals to it.

    The file has one row per item: predictions (N, K, ...), or classes (N, ...) with save_segmentation. A CSV file has
    the item's number, its class, and a column per channel.

    Args:
        predictor: The settings.
        loader: This rank's batches, dealt in turn.
        inputs: A batch -> what the model takes.
        work: This rank's surroundings; the network's activation is applied.
        path: The folder.
        overwrite: Make the file anew where it was made with another model or other settings.
        step: Called after each batch with the number of its items; may raise `StoppedError`.

    Raises:
        ConfigError: Settings that make no sense here, or a file that is not to be written.
        PredictionError: The file cannot be written.
    """
    ranks, size = work.ranks, len(loader.dataset)
    kind = _format(predictor)
    folder = Folder(path)
    file = path / FORMATS[kind]
    settings = [kind, predictor.activation, list(predictor.choice), predictor.dtype, predictor.output_dataset]
    stamp = {**work.identity, "settings": digest([*settings, predictor.compression]), "items": size}

    with contextlib.ExitStack() as held:

        def open_folder() -> bool:
            held.enter_context(folder.opened())
            differs = folder.difference(file, stamp)
            if differs and not overwrite:
                raise ConfigError(f"{file} was made otherwise ({differs}); --overwrite makes it anew")
            folder.clear_foreign_parts(file, stamp)
            return differs == ""

        if agreed(ranks, open_folder):
            return Result([file], 0, False, {})
        parts = [folder.part(file, stamp, rank, ranks.world_size) for rank in range(ranks.world_size)]
        own = sum(len(request) - 1 for request in loader.batch_sampler)  # a request begins with its epoch
        stopped = False
        try:
            with told(file):
                if own:
                    write_part(parts[ranks.rank], _rows(predictor, loader, inputs, work, step), own)
        except StoppedError:
            stopped = True
        everybody = ranks.gather(stopped)
        if everybody is not None and not any(everybody):
            with told(file):
                _join(predictor, kind, file, _in_order(parts, size, loader.batch_sampler.batch_size), size,
                      lambda written: folder.note(file, written, stamp, {}))  # fmt: skip
            folder.clear_parts(file)
        stopped = ranks.broadcast(any(everybody or ()))
    return Result([] if stopped else [file], int(not stopped), stopped, {})


def _format(predictor: Predictor) -> str:
    kind = predictor.format or "hdf5"
    if kind not in FORMATS:
        raise ConfigError(f"predictor.format: {kind} is for volumes and images; possible here: {', '.join(FORMATS)}")
    for key in ("instances", "performance_metric"):
        if predictor.choice.instances if key == "instances" else predictor.performance_metric:
            raise ConfigError(f"predictor.{key}: is for volumes and images, and this dataset has none")
    return kind


def _rows(
    predictor: Predictor, loader: Any, inputs: Callable[[Any], Any], work: Work, step: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for batch in loader:
        with torch.inference_mode():
            output = work.network.activation(work.network.forward(inputs(batch)).float()).cpu().numpy()
        yield np.ascontiguousarray(predictor.choice.of(np.swapaxes(output, 0, 1)))
        step(len(output))


def _in_order(parts: list[Path], size: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows as one process would have made them: batch k is the next one of rank k modulo their number."""
    taken = [0] * len(parts)
    for number, low in enumerate(range(0, size, batch_size)):
        rank, count = number % len(parts), min(batch_size, size - low)
        rows = np.load(parts[rank], mmap_mode="r")
        yield np.array(rows[taken[rank] : taken[rank] + count])
        taken[rank] += count


def _join(
    predictor: Predictor,
    kind: str,
    file: Path,
    chunks: Iterator[np.ndarray],
    size: int,
    written: Callable[[Path], None],
) -> None:
    first = next(chunks)
    chunks = chain([first], chunks)
    if kind == "csv":
        if first.ndim > 2:
            raise ConfigError(f"predictor.format: csv holds rows, and an item's prediction is {first.shape[1:]}")
        whole_file(file, lambda target: _csv(predictor, target, chunks, written))
        return
    sheet = Sheet((size, *first.shape[1:]), False, predictor.dtype, predictor.output_dataset, predictor.compression)
    write(file, "hdf5" if kind == "hdf5" else "npy", chunks, sheet, written)


def _csv(predictor: Predictor, target: Path, chunks: Iterator[np.ndarray], written: Callable[[Path], None]) -> None:
    with target.open("w", encoding="ascii") as file:
        number = 0
        for chunk in chunks:
            rows = chunk if chunk.ndim == 2 else chunk[:, np.newaxis]
            classes = rows.argmax(1) if rows.shape[1] > 1 else rows[:, 0] > predictor.choice.threshold
            if not number:
                names = ["class"] if predictor.choice.labels else ["class", *(f"p{k}" for k in range(rows.shape[1]))]
                file.write(",".join(["index", *names]) + "\n")
            for row, found in zip(rows, classes, strict=True):
                values = row if predictor.choice.labels else [int(found), *row]
                file.write(",".join(map(str, [number, *values])) + "\n")
                number += 1
    written(target)
