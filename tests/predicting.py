"""What the tests of predictions share: volumes, models that count and stop, ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.components.datasets.patches import PatchDataset
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.datasets.volumes import ArrayVolume
from dtrain.data.samplers import EvaluationShard
from dtrain.data.seeded_samples import batch_loader
from dtrain.dataloader import loader_settings
from dtrain.distributed.ranks import Ranks
from dtrain.modelloader import Forward
from dtrain.predict.inference import Inference, Result
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import volumes
from dtrain.reporting.progress import Progress

torch.set_num_threads(1)


def random_volume(*shape: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((channels, *shape), dtype=np.float32)


def dataset_of(
    *images: np.ndarray,
    patch: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    halo: Sequence[int] | None = None,
    label: Callable[[np.ndarray], np.ndarray] | None = None,
    **more: Any,
) -> PatchDataset:
    volumes = [
        ArrayVolume(Path(f"volume-{number}.h5"), image, label(image) if label else None)
        for number, image in enumerate(images)
    ]
    builder = SliceBuilder(list(patch), list(stride or patch), list(halo or [0] * len(patch))) if patch else None
    return PatchDataset(volumes, [], builder, **more)


def identity(images: Tensor) -> Tensor:
    return images


class Counted:
    """A model that counts its patches and may stop the work."""

    def __init__(self, model: Callable[[Tensor], Tensor] = identity, stop_after: int | None = None) -> None:
        self.model, self.patches, self.stop_after = model, 0, stop_after

    def __call__(self, images: Tensor) -> Tensor:
        self.patches += len(images)
        return self.model(images)

    def is_to_stop(self) -> bool:
        return self.stop_after is not None and self.patches >= self.stop_after


class Group(Ranks):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, world_size: int, table: dict[str, Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, rank, world_size, torch.device("cpu"))
        self.table, self.barrier = table, barrier

    def gather(self, value: Any) -> list[Any] | None:
        self.table[self.rank] = value  # type: ignore[index]
        self.barrier.wait()
        values = [self.table[rank] for rank in range(self.world_size)] if self.is_main else None  # type: ignore[index]
        self.barrier.wait()
        return values

    def broadcast(self, value: Any = None) -> Any:
        if self.is_main:
            self.table["value"] = value
        self.barrier.wait()
        value = self.table["value"]
        self.barrier.wait()
        return value


def inference(predictor: Predictor, model: Any = identity, ranks: Ranks | None = None, weights: str = "a") -> Inference:
    ranks = ranks or Ranks(0, 0, 1, torch.device("cpu"))
    asked_to_stop = getattr(model, "is_to_stop", lambda: False)
    forward = Forward(nn.Identity(), ranks.device)
    identity = {"weights": weights}
    return Inference(predictor, forward, model, ranks, Progress(), Path(), identity, asked_to_stop=asked_to_stop)


def predicted(
    folder: Path, dataset: PatchDataset, model: Any = identity, overwrite: bool = False, weights: str = "a", **keys: Any
) -> Result:
    predictor = Predictor(**{"activation": "none"} | keys)
    surroundings = inference(predictor, model, weights=weights)
    return volumes(surroundings, dataset, predictor.batch_size or 2, folder, overwrite)


def predicted_by(world_size: int, folder: Path, dataset: PatchDataset, models: Sequence[Any], **keys: Any) -> Result:
    """The same by several ranks."""

    def one(ranks: Ranks) -> Result:
        predictor = Predictor(**{"activation": "none"} | keys)
        return volumes(inference(predictor, models[ranks.rank], ranks), dataset, 2, folder, False)

    return on_ranks(world_size, one)[0]


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of several ranks returns; the first error of one, if any."""
    table: dict[str, Any] = {}
    barrier = threading.Barrier(world_size, timeout=200)
    results: list[Any] = [None] * world_size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Group(rank, world_size, table, barrier))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def batches_of(dataset: Any, rank: int = 0, world_size: int = 1, batch_size: int = 4) -> Any:
    """The batches of a dataset that are predicted by one of several ranks."""
    settings = loader_settings(pin_memory=False)
    options = {
        key: settings[key] for key in settings.keys() - {"batch_size", "global_batch_size", "shuffle", "drop_last"}
    }
    return batch_loader(dataset, 0, EvaluationShard(len(dataset), rank, world_size, batch_size), options)


def read(path: Path, name: str = "predictions") -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[name])


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, patch, stride, halo."""
    dims = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    patch = tuple(draw(st.integers(1, 10)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, length)) for length in patch)
    return shape, patch, stride, tuple(draw(st.integers(0, 3)) for _ in range(dims))


def convolutions(seed: int = 0, dims: int = 3, out: int = 2) -> nn.Module:
    """Sees 2 voxels around each."""
    torch.manual_seed(seed)
    conv: Any = nn.Conv3d if dims == 3 else nn.Conv2d
    return nn.Sequential(conv(1, 4, 3, padding="same"), nn.Tanh(), conv(4, out, 3, padding="same")).eval()


def loader_of(dataset: Any) -> Any:
    """What is read of a loader where its dataset has volumes."""
    return SimpleNamespace(dataset=SimpleNamespace(dataset=dataset), batch_sampler=SimpleNamespace(batch_size=2))
