"""Predictions of a dataset without volumes: item by item, in order, into one file."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.config.errors import ConfigError
from dtrain.distributed.ranks import Ranks
from dtrain.predict.formats import write
from dtrain.predict.inference import Inference, Result, StoppedError
from dtrain.predict.members import Members
from dtrain.predict.predictor import Predictor
from dtrain.predict.work_folder import PredictionFile, are_finished, digest, explained, opened, write_part

FORMATS: dict[str, str] = {
    **{"hdf5": "predictions.h5", "npy": "predictions.npy", "zarr": "predictions.zarr", "csv": "predictions.csv"}
}


def predict_items(
    inference: Inference, loader: Any, folder: Path, overwrite: bool, members: Members | None = None
) -> Result:
    """Predict each item of a dataset once. All ranks call it; each predicts the batches that its loader deals to it.

    The file has one row per item: predictions (N, K, ...), or classes (N, ...) with save_segmentation. A CSV file has
    the item's number, its class, and a column per channel. `overwrite` makes the file anew where it was made with
    another model or other settings. Of several members each goes through all items, one after another, and adds its
    share to what the ones before it have predicted.

    Raises:
        ConfigError: Settings that make no sense here, or a file that is not to be written.
        PredictionError: The file cannot be written.
    """
    predictor, ranks, size = inference.predictor, inference.ranks, len(loader.dataset)
    members = members or Members()
    file_format = _format(predictor)
    settings: list[Any] = [
        file_format,
        predictor.activation,
        list(predictor.choice),
        predictor.dtype,
        predictor.output_dataset,
    ]
    settings += ["mirror", *sorted(predictor.mirror)] if predictor.mirror else []
    weights = members.weights[0] if len(members.weights) == 1 else [*members.weights, digest(members.folds)]
    known = {"weights": weights} if any(members.weights) else {}
    stamp = {**inference.identity, **known, "settings": digest([*settings, predictor.compression]), "items": size}
    file = PredictionFile(folder / FORMATS[file_format], stamp)
    with opened(folder, ranks, lambda: are_finished([file], overwrite)) as (is_finished,):
        if is_finished:
            return Result([file.path], 0, False, {})
        own = sum(len(request) - 1 for request in loader.batch_sampler)  # a request begins with its epoch
        part = file.part(ranks.rank, ranks.world_size)
        targets = [part.with_name(f"{part.stem}.sum-{member}.npy") for member in range(len(members.weights) - 1)]
        targets.append(part)
        first = _first_to_do(ranks, targets, bool(own))
        stopped = False
        for member in range(first, len(targets)):
            if len(targets) > 1:
                members.load(member)
            inference.progress.start_patches(own)
            stopped = True
            with contextlib.suppress(StoppedError), explained(file.path):
                if own:
                    earlier = targets[member - 1] if member else None
                    rows = _rows(inference, loader, members, member, earlier)
                    kept = (np.ascontiguousarray(predictor.choice.of(np.swapaxes(each, 0, 1))) for each in rows)
                    write_part(targets[member], kept if member == len(targets) - 1 else rows, own)
                stopped = False
            stopped = ranks.broadcast(any(ranks.gather(stopped) or ()))
            if stopped:
                break
            if member:
                targets[member - 1].unlink(missing_ok=True)
        if ranks.is_main and not stopped:
            parts = [file.part(rank, ranks.world_size) for rank in range(ranks.world_size)]
            _join(predictor, file, parts, size, loader.batch_sampler.batch_size)
        stopped = ranks.broadcast(stopped)
    return Result([] if stopped else [file.path], int(not stopped), stopped, {})


def _first_to_do(ranks: Ranks, targets: Sequence[Path], has_own: bool) -> int:
    """The first member of which not all ranks have what it adds up; the last one's part is made anew."""
    reached = {number for number, target in enumerate(targets[:-1]) if not has_own or target.exists()}
    everybody = ranks.gather(reached)
    return ranks.broadcast(max(set.intersection(*everybody), default=-1) + 1 if everybody else None)


def _format(predictor: Predictor) -> str:
    file_format = predictor.format or "hdf5"
    if file_format not in FORMATS:
        possible = ", ".join(FORMATS)
        raise ConfigError(f"predictor.format: {file_format} is for volumes and images; possible here: {possible}")
    for key in ("instances", "performance_metric"):
        if getattr(predictor, key):
            raise ConfigError(f"predictor.{key}: is for volumes and images, and this dataset has none")
    return file_format


def _rows(
    inference: Inference, loader: Any, members: Members, member: int, earlier: Path | None
) -> Iterator[np.ndarray]:
    """What a member predicts of each of this rank's items, (n, K, ...), a batch at a time, as its share of the mean.

    It is added to what the members before it have left, if any.

    Raises:
        ValueError: A batch has not all its samples, or the model gives another number of rows.
    """
    predictor, several, low = inference.predictor, len(members.weights) > 1, 0
    for (batch, samples), (_epoch, *indices) in zip(loader.counted(), loader.batch_sampler, strict=True):
        if samples != len(indices):
            text = f"collate_fn left out {len(indices) - samples} of the samples {indices}"
            raise ValueError(f"{text}, and a prediction has one row for each; give loaders.predict one that keeps all")
        with torch.inference_mode():
            logits = inference.output(inference.forward.inputs(batch)).float()
            predictions = predictor.activated(logits).cpu().numpy()
        if len(predictions) != samples:
            text = f"the model's output {tuple(logits.shape)} has not one row for each of the {samples} samples"
            raise ValueError(f"{text} of a batch: its first axis must be the samples'")
        if several:
            shares = [1 / len(own) if member in (own := members.of(index)) else 0.0 for index in indices]
            predictions = predictions * np.reshape(np.asarray(shares, np.float32), (-1, *(1,) * (predictions.ndim - 1)))
        if earlier is not None:
            predictions = predictions + np.load(earlier, mmap_mode="r")[low : low + len(predictions)]
        low += len(predictions)
        yield predictions
        inference.advance(len(predictions))


def _in_order(parts: Sequence[Path], size: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows as one process would have made them: batch k is the next one of rank k modulo their number."""
    used = [0] * len(parts)  # rows of each part
    for number, low in enumerate(range(0, size, batch_size)):
        rank, count = number % len(parts), min(batch_size, size - low)
        rows = np.load(parts[rank], mmap_mode="r")
        yield np.array(rows[used[rank] : used[rank] + count])
        used[rank] += count


def _join(predictor: Predictor, file: PredictionFile, parts: Sequence[Path], size: int, batch_size: int) -> None:
    chunks = _in_order(parts, size, batch_size)
    shape = np.load(parts[0], mmap_mode="r").shape[1:]  # of an item's prediction
    is_csv = file.path.suffix == ".csv"
    if is_csv and len(shape) > 1:
        raise ConfigError(f"predictor.format: csv holds one row per item, and an item's prediction is {shape}")
    with file.replaced() as temporary:
        if is_csv:
            _write_csv(predictor, temporary, chunks)
        else:
            spec = predictor.file_spec(file.path, (size, *shape))
            write(temporary, _format(predictor), chunks, spec)  # type: ignore[arg-type]
        file.note(temporary, {})


def _write_csv(predictor: Predictor, path: Path, chunks: Iterator[np.ndarray]) -> None:
    labels, threshold = predictor.choice.labels, predictor.choice.threshold
    with path.open("w", encoding="ascii") as file:
        for number, row in enumerate(row for chunk in chunks for row in chunk):
            if number == 0:
                channels = [] if labels else [f"p{channel}" for channel in range(len(row))]
                file.write(",".join(["index", "class", *channels]) + "\n")
            if labels:
                values = list(np.atleast_1d(row))
            else:
                values = [int(row.argmax() if len(row) > 1 else row[0] > threshold), *row]
            file.write(",".join(map(str, [number, *values])) + "\n")
