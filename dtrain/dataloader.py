"""get_train_loaders: this rank's batches of each phase, from any position of an epoch.

The order of samples is a function of (seed, epoch), a sample's randomness of (seed, epoch, index): neither depends on
the number of ranks, workers or restarts. Progress is a position, counted in samples of the epoch's order.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ml_collections import ConfigDict
from torch.utils.data import IterableDataset

from dtrain.config.build import build
from dtrain.config.errors import mark_section
from dtrain.config.schema import PHASES, calls, refused
from dtrain.data.folds import split
from dtrain.data.loader_workers import fork_when_native_threads_are_idle
from dtrain.data.samplers import ORDER, EvaluationShard, ShuffledShard
from dtrain.data.seeded_samples import BatchLoader, SeededBatches, batch_loader

MOST_TRIED = 100  # batches, to find one with samples


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
        collate_fn: A function by name that makes a batch of a list of samples; see `kept_samples` for one that leaves
            samples out.
    """
    return dict(locals())


class MicroBatch(NamedTuple):
    """One batch of this rank, and its place in the optimizer step that it belongs to."""

    batch: Any  # None where a collate_fn left nothing of it on any rank, so that there is nothing to do
    weight: float  # this rank's share in the step's mean over samples, times the number of ranks (DDP averages)
    samples: int  # of this rank that count: 0 where it has none left and joins the collectives with a dummy batch
    closes: bool  # whether it is the last one of its optimizer step
    position: int  # samples of the epoch done by all ranks once that step is done
    start: int  # the position at which this batch of all ranks begins
    step_samples: int  # of that step, on all ranks, from which a collate_fn may have left some out


class LeftOut(NamedTuple):
    """What a collate_fn has left out of a step, on all ranks."""

    samples: int = 0
    batches: int = 0  # of which nothing is left


class TrainLoader:
    """This rank's part of the training data, epoch by epoch, from any position."""

    def __init__(self, dataset: Any, seed: int, rank: int, world_size: int, batch_size: int, **options: Any) -> None:
        self.accumulate = options.pop("accumulate", 1)
        order = {key: options.pop(key) for key in ("shuffle", "drop_last")}
        self.shard = ShuffledShard(len(dataset), seed, rank, world_size, batch_size, **order)
        self.loader = batch_loader(dataset, seed, self.shard, options)
        self.may_leave_out: bool = self.batches.may_leave_out  # samples, so that ranks must count what they have
        self._counts: list[tuple[torch.Tensor, Any]] = []  # of this step's batches, each with its sum over ranks

    @property
    def batches(self) -> SeededBatches:
        """What makes a batch of given samples."""
        return self.loader.dataset  # type: ignore[return-value]

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.shard.global_batch * self.accumulate

    def steps(self, start: int = 0) -> int:
        """Optimizer steps from a position to the end of the epoch."""
        return -(-(self.shard.end(start) - start) // self.global_batch)

    def epoch(self, epoch: int, start: int = 0, order: int = ORDER) -> Iterator[MicroBatch]:
        """The batches of an epoch from a position on, in an order of that version; nothing before it is loaded."""
        self.shard.set_epoch(epoch, start, order)
        try:
            yield from self._agreed(self._dealt(start)) if self.may_leave_out else self._dealt(start)
        except Exception as error:
            mark_section(error, "loaders")
            raise

    def _dealt(self, start: int) -> Iterator[MicroBatch]:
        """This rank's batches; without any sample left, a batch is None."""
        rank, world, end = self.shard.rank, self.shard.world_size, self.shard.end(start)
        all_ranks, whole_step = self.shard.global_batch, self.global_batch
        for number, (batch, kept) in enumerate(self.loader.counted()):
            low = start + number * all_ranks
            high = min(low + all_ranks, end)
            step_low = start + number // self.accumulate * whole_step
            step_high = min(step_low + whole_step, end)
            samples = min(kept, max(0, -(-(high - low - rank) // world)))
            weight = samples * world / (step_high - step_low)
            of_step = step_high - step_low
            yield MicroBatch(batch if kept else None, weight, samples, high == step_high, step_high, low, of_step)

    def _agreed(self, micros: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same batches, with a dummy batch for a rank without samples where others have some.

        The sums over the ranks are started at once and read when they are needed: mostly after the step's backward.
        """
        world = self.shard.world_size
        spare: Any = None
        begins, kept = True, 0
        for micro in micros:
            self._counts = [] if begins else self._counts
            begins = micro.closes
            self._counts.append(self._sum_started(micro))
            if micro.batch is not None and world > 1:
                spare = micro.batch
            if not micro.samples:
                # DDP exchanges a step's gradients in the last backward, so that one is needed where there are any.
                joins = self._kept(self._counts[-1:]) or (world > 1 and micro.closes and self._kept(self._counts))
                if joins and spare is None:
                    spare = self._spare()
                micro = micro._replace(batch=spare if joins else None)
            yield micro
            kept += self._kept(self._counts) if micro.closes else 0
        if not kept and not self.shard.start:
            raise ValueError("collate_fn left out all samples of the epoch")

    def left_out(self, step_samples: int) -> LeftOut:
        """What is missing in the step of that many samples whose last batch was yielded; equal on all ranks."""
        kept = self._kept(self._counts)
        return LeftOut(step_samples - kept, sum(int(sums[1]) for sums, _ in self._counts))

    def _sum_started(self, micro: MicroBatch) -> tuple[torch.Tensor, Any]:
        """Samples and empty batches of all ranks, once the work beside them is done."""
        was_dealt = micro.start + self.shard.rank < self.shard.end(self.shard.start)
        sums = torch.tensor([micro.samples, int(was_dealt and not micro.samples)])
        return sums, dist.all_reduce(sums, async_op=True) if self.shard.world_size > 1 else None

    def _kept(self, counts: list[tuple[torch.Tensor, Any]]) -> int:
        for _, work in counts:
            if work is not None:
                work.wait()
        return sum(int(sums[0]) for sums, _ in counts)

    def _spare(self) -> Any:
        """Any batch with samples: the first that this rank has in the epoch."""
        shard = self.shard
        tried = shard.batches_from(shard.epoch, 0, MOST_TRIED)
        for samples in tried:
            if (batch := self.batches.batch(shard.epoch, *samples)) is not None:
                return batch
        raise ValueError(f"collate_fn leaves nothing of any of the {len(tried)} batches that were tried")


class Loaders(NamedTuple):
    """What each phase reads; None where the config has no such phase."""

    train: TrainLoader | None = None
    val: BatchLoader | None = None
    test: BatchLoader | None = None
    predict: BatchLoader | None = None

    def seeded(self) -> list[str]:
        """The generators that the datasets and collate functions hold and that are seeded for each sample."""
        held = ((phase, item) for phase, samples in self._samples() for item in samples.generators.items())
        return [f"{phase}: {name} ({type(generator).__name__})" for phase, (name, generator) in held]

    def not_searched(self) -> list[str]:
        """The phases whose datasets hold so much that the search for generators ended before it had seen all."""
        return [phase for phase, samples in self._samples() if not samples.is_searched]

    def _samples(self) -> list[tuple[str, Any]]:
        of_others = [(phase, loader.dataset) for phase, loader in self._asdict().items() if phase != "train" and loader]
        return [("train", self.train.batches), *of_others] if self.train else of_others

    def sample_counts(self) -> set[int]:
        """How many samples the batches have that collate functions of the user's own make, on this rank."""
        counts: set[int] = set()
        for loader in self:
            batches: Any = getattr(loader, "batches", None) or getattr(loader, "dataset", None)
            if batches is not None and batches.may_leave_out:
                shard: Any = loader.shard if isinstance(loader, TrainLoader) else loader.batch_sampler  # type: ignore[union-attr]
                counts |= {min(shard.batch_size, len(batches)), len(batches) % shard.batch_size}
        return counts


def first_batch(loaders: Loaders) -> Any:
    """A batch of the first phase that there is, loaded in this process."""
    for loader in loaders:
        if isinstance(loader, TrainLoader):
            return loader.batches.batch(0, *loader.shard.batches_from(0, 0, 1)[0])
        if loader is not None:
            return loader.dataset.batch(0, 0)  # type: ignore[attr-defined]
    raise ValueError("there are no data")


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
        fork_when_native_threads_are_idle()
    result: dict[str, Any] = {}
    for phase in PHASES:
        if phase not in phases or config.loaders.get(phase) is None:
            continue
        options = build(config, f"loaders.{phase}.loader")
        batch_size = _batch_size(config, phase, options, world_size)
        if options["pin_memory"] is None:
            options["pin_memory"] = pin_memory
        dataset = _checked(config, phase, _split(config, phase, build(config, f"loaders.{phase}")))
        if phase == "train":
            loader = TrainLoader(dataset, seed, rank, world_size, batch_size, accumulate=accumulate, **options)
            if not loader.steps():
                counts = f"{len(dataset)} samples, and a batch of all ranks has {loader.shard.global_batch}"
                raise refused(config, ("loaders", phase), f"drop_last leaves no batch: {counts}")
            result[phase] = loader
        else:
            shard = EvaluationShard(len(dataset), rank, world_size, batch_size)
            del options["shuffle"], options["drop_last"]
            result[phase] = batch_loader(dataset, seed, shard, options)
    if result.get("train") and result.get("val"):
        _refuse_shared_files(config, result["train"].loader.dataset.dataset, result["val"].dataset.dataset)
    return Loaders(**result)


def _split(config: ConfigDict, phase: str, dataset: Any) -> Any:
    """The part of a dataset that the phase has, where folds split it."""
    if phase not in ("train", "val") or "loaders.folds" not in calls(config):
        return dataset
    settings = build(config, "loaders.folds")
    try:
        return split(dataset, settings, phase)
    except ValueError as error:
        key = re.match(r"\w+", str(error))
        path = ("loaders", "folds", *([key[0]] if key and key[0] in settings else []))
        raise refused(config, path, str(error)) from None


def _refuse_shared_files(config: ConfigDict, train: Any, val: Any) -> None:
    """A validation score means nothing where the model was trained on the same file."""
    if shared := sorted(_files(train) & _files(val)):
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise refused(config, ("loaders", "val"), f"{shared[0]}{more} is also in train; no file may be in both")


def _files(dataset: Any) -> set[Path]:
    """The absolute paths in a dataset's tuple `files`; an attribute of that name of another kind lists none."""
    files = getattr(dataset, "files", None)
    listed = files if isinstance(files, tuple) else ()
    return {file.resolve() for file in listed if isinstance(file, Path) and file.is_absolute()}


def _batch_size(config: ConfigDict, phase: str, options: dict[str, Any], world_size: int) -> int:
    """Samples per rank and batch; takes both keys out of the options."""
    per_rank, of_all_ranks = options.pop("batch_size"), options.pop("global_batch_size")
    path = ("loaders", phase)
    if per_rank is not None and of_all_ranks is not None:
        raise refused(config, path, "'batch_size' and 'global_batch_size' are mutually exclusive; keep one of them")
    if of_all_ranks is not None:
        per_rank, rest = divmod(of_all_ranks, world_size)
        if rest:
            possible = (per_rank + 1) * world_size
            text = f"global_batch_size {of_all_ranks} is not divisible by {world_size} ranks; possible: {possible}"
            raise refused(config, path, text)
    per_rank = 1 if per_rank is None else per_rank
    if per_rank < 1:
        raise refused(config, path, f"a batch needs at least 1 sample, found {per_rank}")
    return per_rank


def _checked(config: ConfigDict, phase: str, dataset: Any) -> Any:
    path = ("loaders", phase)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        reason = "so that ranks can share it and a stopped training can resume"
        text = f"{type(dataset).__name__} has no length; a dataset here has __len__ and __getitem__, {reason}"
        raise refused(config, path, text)
    if not len(dataset):
        raise refused(config, path, f"{type(dataset).__name__} is empty")
    return dataset
