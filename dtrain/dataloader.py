"""get_train_loaders: batches for this rank, exact and resumable; knows no model, no loop, no checkpoint.

The order of samples is a function of (seed, epoch), a sample's randomness of (seed, epoch, index): neither depends on
the number of ranks, workers or restarts. Progress is a position, counted in samples of the epoch's order.
"""

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from dtrain.config.build import build
from dtrain.config.schema import PHASES, refused
from dtrain.data import rng
from dtrain.data.loader_workers import begin_to_answer, calm_forks, held_back, leave_to_parent
from dtrain.data.samplers import EvaluationShard, ShuffledShard


def loader_settings(  # noqa: PLR0913
    *,
    batch_size: int | None = None,
    global_batch_size: int | None = None,
    num_workers: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    pin_memory: bool | None = None,
    persistent_workers: bool = True,
    prefetch_factor: int | None = None,
    timeout: float = 0,
    multiprocessing_context: str | None = None,
    collate_fn: Callable | None = None,
) -> dict[str, Any]:
    """The loader's own keys under `loaders`; the other keys are the dataset's.

    Args:
        batch_size: Samples per rank and batch (default 1).
        global_batch_size: Samples per batch over all ranks; instead of `batch_size`.
        num_workers: Processes that load, per rank.
        shuffle: For `train` only; the other phases keep the dataset's order.
        drop_last: For `train` only: leave out the last samples of an epoch where they fill no batch of all ranks.
        pin_memory: Default: yes on a GPU.
        persistent_workers: Keep the workers from epoch to epoch.
        prefetch_factor: Batches that each worker loads ahead.
        timeout: Seconds to wait for a batch from a worker; 0 waits for ever.
        multiprocessing_context: fork, spawn or forkserver. Default: fork on Linux, else Python's own choice.
        collate_fn: A function by name that makes a batch of a list of samples.
    """
    return dict(locals())


class Micro(NamedTuple):
    """One batch of this rank, and its place in the optimizer step that it belongs to."""

    batch: Any
    weight: float  # this rank's share in the step's mean over samples, times the number of ranks (DDP averages)
    samples: int  # of this rank that count: 0 where a rank has none left and lends a hand with weight 0
    closes: bool  # whether it is the last one of its optimizer step
    position: int  # samples of the epoch done by all ranks once that step is done
    start: int  # the position at which this batch of all ranks begins


class TrainLoader:
    """This rank's part of the training data, epoch by epoch, from any position."""

    def __init__(self, dataset: Any, seed: int, rank: int, world_size: int, batch_size: int, **options: Any) -> None:
        self.accumulate = options.pop("accumulate", 1)
        self.shard = ShuffledShard(
            len(dataset), seed, rank, world_size, batch_size, options.pop("shuffle"), options.pop("drop_last")
        )
        self.loader = _data_loader(dataset, seed, self.shard, options)

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.shard.global_batch * self.accumulate

    def end(self, start: int = 0) -> int:
        """The position at which an epoch that begins at `start` ends."""
        return self.shard.end(start)

    def steps(self, start: int = 0) -> int:
        """Optimizer steps from a position to the end of the epoch."""
        return -(-(self.end(start) - start) // self.global_batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Micro]:
        """The batches of an epoch from position `start` on; nothing before it is loaded."""
        self.shard.set_epoch(epoch, start)
        world = self.shard.world_size
        end = self.shard.end(start)
        for number, batch in enumerate(self.loader):
            low = start + number * self.shard.global_batch
            high = min(low + self.shard.global_batch, end)
            group_low = start + number // self.accumulate * self.global_batch
            group_high = min(group_low + self.global_batch, end)
            samples = max(0, -(-(high - low - self.shard.rank) // world))
            weight = samples * world / (group_high - group_low)
            yield Micro(batch, weight, samples, high == group_high, group_high, low)


class _Batches(Dataset):
    """A dataset as the loaders see it: asked for [epoch, index, ...], it gives that batch, collated.

    The generators are seeded for each sample; what the collate function draws goes on from the last one. Seeding takes
    25 us a sample, so it is done only where something is drawn: of a dataset that does not say (`random`, True or
    False) a batch is made without, and made again with it as soon as a first one turns out to have drawn.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or default_collate
        said = getattr(dataset, "random", None)
        self.random: bool | None = said if isinstance(said, bool) else None
        if collate is not None and self.random is False:
            self.random = None  # the dataset speaks for its items alone
        # A class derived from TensorDataset may well transform its items.
        self.tensors = dataset.tensors if type(dataset) is TensorDataset and collate is None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, request: list[int]) -> Any:
        epoch, *indices = request
        if self.tensors is not None:
            rows = torch.tensor(indices)  # what collating its items gives, in a tenth of the time
            return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self.tensors]
        if self.random is False:
            return self.collate(self._items(indices))
        if self.random is None:
            drew_nothing, batch = rng.without_drawing(lambda: self.collate(self._items(indices)))
            if drew_nothing:
                return batch
            self.random = True
        if get_worker_info() is not None:
            return self.collate(self._seeded_items(epoch, indices))
        with rng.untouched():  # this process's generators belong to the model
            return self.collate(self._seeded_items(epoch, indices))

    def _items(self, indices: list[int]) -> list[Any]:
        if not hasattr(self.dataset, "__getitems__"):
            return [self._item(index) for index in indices]
        try:
            return self.dataset.__getitems__(indices)
        except Exception as error:
            error.add_note(f"while loading the samples {indices} of {type(self.dataset).__name__}")
            raise

    def _seeded_items(self, epoch: int, indices: list[int]) -> list[Any]:
        items = []
        for index in indices:
            rng.seed_sample(self.seed, epoch, index)
            items.append(self._item(index))
        return items

    def _item(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            error.add_note(f"while loading sample {index} of {type(self.dataset).__name__}")
            raise


def _as_it_is(batch: Any) -> Any:
    return batch


class _HeldLoader(DataLoader):
    """Its workers outlive the signals to all processes of a job also while they are being started.

    No fork server's do: it would have the signals blocked for good, and so would what others start by it.
    """

    def __iter__(self) -> Any:
        if self.num_workers and self.multiprocessing_context.get_start_method() == "spawn":
            resource_tracker.ensure_running()  # else it is started meanwhile, which lets SIGTERM through again
        with held_back():
            return super().__iter__()


def _data_loader(dataset: Dataset, seed: int, batches: Any, options: dict[str, Any]) -> DataLoader:
    workers = options["num_workers"]
    if not workers:
        options = options | {"prefetch_factor": None, "timeout": 0}
    options = options | {"persistent_workers": bool(workers) and options["persistent_workers"]}
    method = options["multiprocessing_context"] or multiprocessing.get_start_method(allow_none=True)
    if method is None:  # forks share the data set's memory; Python's own choice differs from version to version
        method = "fork" if sys.platform == "linux" else multiprocessing.get_all_start_methods()[0]
    options = options | {"multiprocessing_context": method if workers else None}
    parent = 0 if method == "forkserver" else os.getpid()
    return (DataLoader if method == "forkserver" else _HeldLoader)(
        _Batches(dataset, seed, options["collate_fn"]),
        batch_sampler=batches,
        worker_init_fn=functools.partial(_begin_worker, parent),
        generator=torch.Generator(),  # else each epoch would draw a seed from the generator that dropout uses
        **options | {"collate_fn": _as_it_is},
    )


def _begin_worker(parent: int, _worker: int) -> None:
    leave_to_parent(parent)
    begin_to_answer()


class Loaders(NamedTuple):
    """What each phase reads; None where the config has no such phase."""

    train: TrainLoader | None = None
    val: DataLoader | None = None
    test: DataLoader | None = None
    predict: DataLoader | None = None


def get_train_loaders(
    config: ConfigDict,
    rank: int,
    world_size: int,
    seed: int,
    pin_memory: bool = False,
    accumulate: int = 1,
    phases: Collection[str] = PHASES,
) -> Loaders:
    """Build the dataset and the loader of every phase under `loaders`, or of some of them.

    Raises:
        ConfigError: The batch size does not fit the ranks, or a dataset is empty or has no length.
    """
    if world_size > 1:
        calm_forks()
    result: dict[str, Any] = {}
    for phase in PHASES:
        if phase not in phases or config.loaders.get(phase) is None:
            continue
        options = build(config, f"loaders.{phase}.loader")
        batch_size = _batch_size(config, phase, options, world_size)
        if options["pin_memory"] is None:
            options["pin_memory"] = pin_memory
        dataset = _checked(config, phase, build(config, f"loaders.{phase}"))
        if phase == "train":
            loader = TrainLoader(dataset, seed, rank, world_size, batch_size, accumulate=accumulate, **options)
            if not loader.steps():
                batch = loader.shard.global_batch
                text = f"drop_last leaves nothing: {len(dataset)} samples, and a batch of all ranks takes {batch}"
                raise refused(config, ("loaders", phase), text)
            result[phase] = loader
        else:
            shard = EvaluationShard(len(dataset), rank, world_size, batch_size)
            del options["shuffle"], options["drop_last"]
            result[phase] = _data_loader(dataset, seed, shard, options)
    if result.get("train") and result.get("val"):
        _refuse_shared_files(config, result["train"].loader.dataset.dataset, result["val"].dataset.dataset)
    return Loaders(**result)


def _refuse_shared_files(config: ConfigDict, train: Any, val: Any) -> None:
    """A figure of validation says nothing where the model has learnt from the same file."""
    if both := sorted(_files(train) & _files(val)):
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise refused(config, ("loaders", "val"), f"{both[0]}{more} is also in train; no file may be in both")


def _files(dataset: Any) -> set[Path]:
    """What a dataset says that it reads: a tuple of absolute paths; a foreign `files` of another kind is none."""
    files = getattr(dataset, "files", None)
    listed = files if isinstance(files, tuple) else ()
    return {file.resolve() for file in listed if isinstance(file, Path) and file.is_absolute()}


def _batch_size(config: ConfigDict, phase: str, options: dict[str, Any], world_size: int) -> int:
    """Samples per rank and batch."""
    own, together = options.pop("batch_size"), options.pop("global_batch_size")
    path = ("loaders", phase)
    if own is not None and together is not None:
        raise refused(config, path, "'batch_size' and 'global_batch_size' exclude one another; keep one of them")
    if together is not None and together % world_size:
        below = together // world_size * world_size
        text = f"global_batch_size {together} cannot be divided over {world_size} ranks; possible: {below + world_size}"
        raise refused(config, path, text)
    size = together // world_size if together is not None else 1 if own is None else own
    if size < 1:
        raise refused(config, path, f"a batch needs at least 1 sample, found {size}")
    return size


def _checked(config: ConfigDict, phase: str, dataset: Any) -> Any:
    path = ("loaders", phase)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        text = (
            f"{type(dataset).__name__} has no length; a dataset here has __len__ and __getitem__, "
            "so that ranks can share it and a stopped training can go on"
        )
        raise refused(config, path, text)
    if not len(dataset):
        raise refused(config, path, f"{type(dataset).__name__} is empty")
    return dataset
