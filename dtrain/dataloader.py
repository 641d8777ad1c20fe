"""get_train_loaders: this rank's batches of each phase, from any position of an epoch.

The order of samples is a function of (seed, epoch), a sample's randomness of (seed, epoch, index): neither depends on
the number of ranks, workers or restarts. Progress is a position, counted in samples of the epoch's order. A start with
another number of ranks than the training is meant for deals the samples of each optimizer step to those that it has.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from ml_collections import ConfigDict
from torch.utils.data import IterableDataset, Subset

from dtrain.config.build import build, defaults
from dtrain.config.errors import KeyPath, is_mapping, mark_section
from dtrain.config.schema import PHASES, SAMPLERS, calls, refused, set_names
from dtrain.data.folds import split
from dtrain.data.loader_workers import fork_when_native_threads_are_idle
from dtrain.data.orders import Endless, Shuffled, order_of, require_same_on_ranks
from dtrain.data.samplers import ORDER, BatchShard, EvaluationShard, ShuffledShard, limited
from dtrain.data.seeded_samples import BatchLoader, SeededBatches, batch_loader
from dtrain.distributed import by_node

MOST_TRIED = 100  # batches, to find one with samples
_Count = tuple[Sequence[int] | torch.Tensor, Any]  # samples and empty batches, and the sum over ranks that is under way


def loader_settings(  # noqa: PLR0913
    *,
    batch_size: int | None = None,
    global_batch_size: int | None = None,
    num_workers: int = 0,
    shuffle: bool | None = True,
    sampler: dict | None = None,
    batch_sampler: dict | None = None,
    drop_last: bool = False,
    pin_memory: bool | None = None,
    persistent_workers: bool = True,
    prefetch_factor: int | None = None,
    timeout: float = 0,
    multiprocessing_context: str | None = None,
    collate_fn: Callable | None = None,
    whole_volumes: Literal["mirrored"] | bool = False,
    every_epochs: int | None = None,
) -> dict[str, Any]:
    """The loader's own keys under `loaders`; the other keys are the dataset's.

    Args:
        batch_size: Samples per rank and batch (default 1).
        global_batch_size: Samples per batch over all ranks; instead of `batch_size`.
        num_workers: Processes that load, per rank.
        shuffle: For `train` only; the other phases keep the dataset's order.
        sampler: Which samples come, and in which order; for `train` only, in place of `shuffle`.
        batch_sampler: Which samples make up a batch; for `train` only, in place of `batch_size` and `shuffle`.
        drop_last: For `train` only: leave out the last samples of an epoch where they fill no batch of all ranks.
        pin_memory: Default: yes on a GPU.
        persistent_workers: Keep the workers from epoch to epoch.
        prefetch_factor: Batches that each worker loads ahead.
        timeout: Seconds to wait for a batch from a worker; 0 waits for ever.
        multiprocessing_context: fork, spawn or forkserver. Default: fork on Linux, else Python's own choice.
        collate_fn: A function by name that makes a batch of a list of samples; see `kept_samples` for one that leaves
            samples out.
        whole_volumes: For `val` only: measure whole volumes, put together as a prediction's, in place of patches; true
            leaves `predictor.mirror` out, mirrored does not.
        every_epochs: Do so in every so many epochs, and measure patches in the others. Default: in each validation.
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
    end: int = 0  # the position at which this batch of all ranks ends


class LeftOut(NamedTuple):
    """What a collate_fn has left out of a step, on all ranks."""

    samples: int = 0
    batches: int = 0  # of which nothing is left


class TrainLoader:
    """This rank's part of the training data, epoch by epoch, from any position.

    `sampler` or `batch_sampler` replaces the shuffled order; an epoch has `steps_per_epoch` steps of an endless one.
    A step has `accumulate` batches of each of `batch_ranks` ranks, on however many there are.
    """

    def __init__(self, dataset: Any, seed: int, rank: int, world_size: int, batch_size: int, **options: Any) -> None:
        accumulate, self.batch_ranks = options.pop("accumulate", 1), options.pop("batch_ranks", 0) or world_size
        own = {key: options.pop(key, None) for key in (*SAMPLERS, "steps_per_epoch")}
        shuffle, drop_last = options.pop("shuffle") is not False, options.pop("drop_last")
        of_batches, steps = own["batch_sampler"] is not None, own["steps_per_epoch"]
        self.sampler = own["batch_sampler"] if of_batches else own["sampler"]
        order = None if self.sampler is None else order_of(self.sampler, seed, len(dataset), of_batches)
        self.is_drawn = order is not None and not hasattr(self.sampler, "at")  # so that ranks could differ
        full = self.batch_ranks * (1 if of_batches else batch_size)
        sizes = {"full_batch": full, "step_size": full * accumulate}
        if steps is not None:
            order = Endless(order or Shuffled(len(dataset), seed, shuffle), steps * full * accumulate, of_batches)
        # Batches of each rank in a step, no larger than they are meant to be, and as equal as that allows.
        self.accumulate = -(-self.batch_ranks * accumulate // world_size)
        self.shard: ShuffledShard | BatchShard
        if of_batches:
            self.shard = BatchShard(order, rank, world_size, drop_last, **sizes)
        else:
            own = -(-full * accumulate // (self.accumulate * world_size))
            self.shard = ShuffledShard(
                len(dataset), seed, rank, world_size, own, shuffle=shuffle, drop_last=drop_last, source=order, **sizes
            )
        self.loader = batch_loader(dataset, seed, self.shard, options)
        self.may_leave_out: bool = self.batches.may_leave_out  # samples, so that ranks must count what they have
        self._counts: list[_Count] = []  # of this step's batches, each with its sum over ranks

    @property
    def batches(self) -> SeededBatches:
        """What makes a batch of given samples."""
        return self.loader.dataset  # type: ignore[return-value]

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all ranks; without a batch sampler."""
        assert isinstance(self.shard, ShuffledShard)
        return self.shard.step_size

    @property
    def step_size(self) -> str:
        """What an optimizer step works on: samples or batches, ranks, accumulation."""
        shard = self.shard
        world = f"{shard.world_size} rank(s)" + (f" x {self.accumulate} accumulated" if self.accumulate > 1 else "")
        held = "" if shard.world_size == self.batch_ranks else f", as on the {self.batch_ranks} that it began with"
        if isinstance(shard, BatchShard):
            return f"{shard.step_size} batches of the sampler, {world}{held}"
        exact = shard.step_size == shard.global_batch * self.accumulate
        return f"{self.global_batch} = {'' if exact else 'up to '}{shard.batch_size} x {world}{held}"

    @property
    def described(self) -> str:
        """The sampler as it says itself (its repr), and what it gives."""
        named = "__repr__" in {name for each in type(self.sampler).__mro__[:-1] for name in vars(each)}
        count = f"{self.shard.end(0):,} samples"
        if isinstance(self.shard, BatchShard):
            count = f"{len(self.shard.edges) - 1:,} batches of {count}"
        return f"{self.sampler if named else type(self.sampler).__name__}, {count} an epoch"

    def steps(self, start: int = 0) -> int:
        """Optimizer steps from a position to the end of the epoch."""
        return self.shard.steps(start)

    def steps_done(self, position: int) -> int:
        """Optimizer steps from the epoch's beginning to a position."""
        return self.shard.steps_done(position)

    def shard_as(self, state: Mapping[str, Any], rank: int) -> ShuffledShard | BatchShard:
        """What a rank has of the data, in a start with other ranks than this one's, of which `shard_state` is known."""
        shard, source = self.shard, self.shard.source
        world_size, batch_size = state["world_size"], state["batch_size"]
        full = state.get("full_batch") or world_size * max(
            1, batch_size
        )  # states of before have none: all ranks' batch
        if isinstance(source, Endless):
            source = replace(source, length=source.length // shard.full_batch * full)
        sizes = {"full_batch": full, "step_size": state.get("step_size") or full, "order": state.get("order", 1)}
        return replace(shard, rank=rank, world_size=world_size, batch_size=batch_size, source=source, **sizes)

    def shard_state(self) -> dict[str, int]:
        """What `shard_as` has to know of this start."""
        names = ("world_size", "batch_size", "full_batch", "step_size")
        return {"accumulate": self.accumulate} | {name: getattr(self.shard, name) for name in names}

    def steps_with(self, world_size: int, batch_size: int) -> int:
        """Optimizer steps of an epoch of a training that is meant for so many ranks, with a batch of samples each."""
        shard = self.shard
        if isinstance(shard.source, Endless):
            return shard.steps(0)
        full = world_size * batch_size
        step = full * (shard.step_size // shard.full_batch)
        return replace(shard, world_size=world_size, batch_size=batch_size, full_batch=full, step_size=step).steps(0)

    def begin(self, epoch: int, start: int = 0, order: int = ORDER) -> int:
        """Choose what `epoch` gives: an epoch from a position on, in an order of that version; returns its end."""
        self.shard.set_epoch(epoch, start, order)
        self.batches.begin_epoch(epoch)
        return self.shard.end(start)

    def epoch(self, epoch: int, start: int = 0, order: int = ORDER) -> Iterator[MicroBatch]:
        """The batches of an epoch from a position on, in an order of that version; nothing before it is loaded."""
        try:
            self.begin(epoch, start, order)
            if self.is_drawn:
                require_same_on_ranks(self.shard)
            yield from self._agreed(self._dealt(start)) if self.may_leave_out else self._dealt(start)
        except Exception as error:
            mark_section(error, "loaders")
            raise

    def _dealt(self, start: int) -> Iterator[MicroBatch]:
        """This rank's batches; without any sample left, a batch is None."""
        shard, accumulate = self.shard, self.accumulate
        world, high, step_low, step_high = shard.world_size, start, start, start
        dealt = zip(self.loader.counted(), shard.edges_from(start), strict=False)  # the second would continue for ever
        for number, ((batch, kept), edge) in enumerate(dealt):
            low, high = high, edge
            if number % accumulate == 0:
                step_low, step_high = low, shard.edge(start, number + accumulate) if accumulate > 1 else high
            samples = min(kept, shard.own_samples(low, high))
            of_step = step_high - step_low
            weight = samples * world / of_step
            yield MicroBatch(batch if kept else None, weight, samples, high == step_high, step_high, low, of_step, high)

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

    def _sum_started(self, micro: MicroBatch) -> _Count:
        """Samples and empty batches of all ranks, once the work beside them is done."""
        was_dealt = self.shard.own_samples(micro.start, micro.end) > 0
        own = [micro.samples, int(was_dealt and not micro.samples)]
        if self.shard.world_size == 1:
            return own, None
        sums = torch.tensor(own)
        return sums, by_node.all_reduce(sums, async_op=True)

    def _kept(self, counts: list[_Count]) -> int:
        for _, work in counts:
            if work is not None:
                work.wait()
        return sum(int(sums[0]) for sums, _ in counts)

    def _spare(self) -> Any:
        """Any batch with samples: the first that this rank has in the epoch."""
        shard = self.shard
        tried = shard.requests_from(shard.epoch, 0, MOST_TRIED)
        for request in tried:
            if (batch := self.batches.batch(*request)) is not None:
                return batch
        raise ValueError(f"collate_fn leaves nothing of any of the {len(tried)} batches that were tried")


class Loaders(NamedTuple):
    """What each phase reads; None where the config has no such phase. Of several sets of one, the first."""

    train: TrainLoader | None = None
    val: BatchLoader | None = None
    test: BatchLoader | None = None
    predict: BatchLoader | None = None
    sets: Mapping[str, BatchLoader] = {}  # all but train's by name: val, or of several val/near, val/far

    def of(self, phase: str) -> dict[str, BatchLoader]:
        """The sets of a phase other than train, by name."""
        named = {name: loader for name, loader in self.sets.items() if name.partition("/")[0] == phase}
        first = getattr(self, phase)
        return named if named or first is None else {phase: first}

    def by_name(self) -> dict[str, Any]:
        """Every loader that there is."""
        others = {name: loader for phase in PHASES[1:] for name, loader in self.of(phase).items()}
        return others if self.train is None else {"train": self.train, **others}

    def datasets(self) -> dict[str, Any]:
        """The user's own datasets, which the loaders wrap, by name."""
        return {name: samples.dataset for name, samples in self._samples()}

    def seeded(self) -> list[str]:
        """The generators that the datasets and collate functions hold and that are seeded for each sample."""
        held = ((phase, item) for phase, samples in self._samples() for item in samples.generators.items())
        return [f"{phase}: {name} ({type(generator).__name__})" for phase, (name, generator) in held]

    def not_searched(self) -> list[str]:
        """The phases whose datasets hold so much that the search for generators ended before it had seen all."""
        return [phase for phase, samples in self._samples() if not samples.is_searched]

    def used(self) -> str:
        """How many samples of each phase are used, where `limit_batches` or `overfit_batches` may leave some out."""
        counts = {"train": self.train.shard.end(0)} if self.train else {}
        of_others = {name: loader for phase in ("val", "test") for name, loader in self.of(phase).items()}
        counts |= {name: loader.batch_sampler.size for name, loader in of_others.items()}  # type: ignore[union-attr]
        return ", ".join(f"{phase} {count:,}" for phase, count in counts.items())

    def _samples(self) -> list[tuple[str, Any]]:
        return [(name, getattr(loader, "loader", loader).dataset) for name, loader in self.by_name().items()]

    def sample_counts(self) -> set[int]:
        """How many samples the batches have that collate functions of the user's own make, on this rank."""
        counts: set[int] = set()
        for loader in self.by_name().values():
            batches: Any = getattr(loader, "loader", loader).dataset
            if batches.may_leave_out:
                shard: Any = loader.shard if isinstance(loader, TrainLoader) else loader.batch_sampler
                counts |= shard.sample_counts()
        return counts


def first_batch(loaders: Loaders) -> Any:
    """A batch of the first phase that there is, loaded in this process."""
    for loader in loaders.by_name().values():
        if isinstance(loader, TrainLoader):
            return loader.batches.batch(*loader.shard.requests_from(0, 0, 1)[0])
        return loader.dataset.batch(0, 0)
    raise ValueError("there are no data")


def get_train_loaders(  # noqa: PLR0913
    config: ConfigDict,
    rank: int,
    world_size: int,
    seed: int,
    pin_memory: bool = False,
    accumulate: int = 1,
    phases: Collection[str] = PHASES,
    batch_ranks: int = 0,
) -> Loaders:
    """Build the dataset and the loader of every phase under `loaders`, or of some of them.

    `batch_ranks` is the number of ranks whose batches a step has, where the training began with others than these.

    Raises:
        ConfigError: The batch size does not fit the ranks, or a dataset is empty or has no length.
    """
    if world_size > 1:
        fork_when_native_threads_are_idle()
    batch_ranks = batch_ranks or world_size
    train: TrainLoader | None = None
    sets: dict[str, BatchLoader] = {}
    described = calls(config)
    overfits = (config.get("trainer") or {}).get("overfit_batches") is not None
    for name in (name for phase in PHASES if phase in phases for name in set_names(described, phase)):
        options = build(config, f"loaders.{name}.loader")
        path = described[f"loaders.{name}.loader"].path
        batch_size = _batch_size(config, path, options, batch_ranks)
        if options["pin_memory"] is None:
            options["pin_memory"] = pin_memory
        phase = name.partition("/")[0]
        if overfits and phase == "val" and train is not None:  # on the very samples that are trained on
            size: Any = train.shard.most
            shard = EvaluationShard(size, rank, world_size, batch_size)
            sets[name] = batch_loader(train.batches.dataset, seed, shard, options)
            continue
        dataset = _checked(config, path, _split(config, name, build(config, f"loaders.{name}")))
        limit = _limit(config, phase)
        if name == "train":
            # Overfitting takes the dataset's own order, in place of any sampler's.
            options |= {"accumulate": accumulate, "batch_ranks": batch_ranks}
            options |= {"shuffle": False} if overfits else _sampling(config, dataset)
            train = _train_loader(config, dataset, seed, rank, world_size, batch_size, options=options)
            if limit is not None:
                train.shard.limit(limit)
            continue
        size = len(dataset) if limit is None else limited(len(dataset), batch_size * batch_ranks, limit)
        shard = EvaluationShard(size, rank, world_size, batch_size)
        sets[name] = batch_loader(dataset, seed, shard, options)
        if train is not None and name.startswith("val"):
            _refuse_another_split(config, path, train.loader.dataset.dataset, dataset)  # type: ignore[attr-defined]
            _refuse_shared_files(config, path, train.loader.dataset.dataset, dataset)  # type: ignore[attr-defined]
    firsts = {
        phase: next((sets[name] for name in sets if name.partition("/")[0] == phase), None) for phase in PHASES[1:]
    }
    return Loaders(train, **firsts, sets=sets)


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


def _refuse_another_split(config: ConfigDict, path: KeyPath, train: Any, val: Any) -> None:
    """Folds of two sets of items that differ in size do not match: what one leaves out the other may train on."""
    if "loaders.folds" in calls(config) and isinstance(train, Subset) and isinstance(val, Subset):
        sizes = [len(each.dataset) for each in (train, val)]  # type: ignore[arg-type]
        if sizes[0] != sizes[1]:
            text = (
                f"has {sizes[1]:,} items to be split into folds, and train has {sizes[0]:,}; folds divide one set, so"
            )
            raise refused(config, path, f"{text} val may say only what is done with its items, such as transforms")


def _sampling(config: ConfigDict, dataset: Any) -> dict[str, Any]:
    """The samplers of the training data, and the steps of an epoch, as far as the config has them."""
    keys = [key for key in SAMPLERS if f"loaders.train.{key}" in calls(config)]
    steps = defaults(config, "trainer").get("steps_per_epoch")
    return {key: build(config, f"loaders.train.{key}", dataset) for key in keys} | {"steps_per_epoch": steps}


def _train_loader(config: ConfigDict, dataset: Any, *layout: int, options: dict[str, Any]) -> TrainLoader:
    """The loader of the training data; `layout` are seed, rank, world size and batch size."""
    key = next((key for key in SAMPLERS if options.get(key) is not None), None)
    path = ("loaders", "train")
    try:
        loader = TrainLoader(dataset, *layout, **options)
        steps = loader.steps()
    except Exception as error:  # of a sampler's own code, or of what it gives
        if key is None:
            raise
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise refused(config, (*path, key), what) from error
    if not steps:
        of = f"a batch of all ranks has {loader.shard.full_batch}"
        of = "each rank needs a batch" if key == "batch_sampler" else of
        text = f"drop_last leaves no batch: {loader.shard.samples} samples, and {of}"
        raise refused(config, path, text)
    return loader


def _limit(config: ConfigDict, phase: str) -> int | float | None:
    """How many batches of a phase are used, or which share of them; None: all."""
    trainer: Any = config.get("trainer") or {}
    overfit, limit = trainer.get("overfit_batches"), trainer.get("limit_batches")
    if phase == "predict" or (overfit is not None and phase == "train"):
        return overfit if phase == "train" else None
    return limit.get(phase) if is_mapping(limit) else limit


def _refuse_shared_files(config: ConfigDict, path: KeyPath, train: Any, val: Any) -> None:
    """A validation score means nothing where the model was trained on the same file."""
    if shared := sorted(_files(train) & _files(val)):
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise refused(config, path, f"{shared[0]}{more} is also in train; no file may be in both")


def _files(dataset: Any) -> set[Path]:
    """The absolute paths in a dataset's tuple `files`; an attribute of that name of another kind lists none."""
    files = getattr(dataset, "files", None)
    listed = files if isinstance(files, tuple) else ()
    return {file.resolve() for file in listed if isinstance(file, Path) and file.is_absolute()}


def batch_size_of(config: ConfigDict, name: str, world_size: int) -> int:
    """Samples in a batch of one rank among so many; a ConfigError where they cannot share it."""
    path = calls(config)[f"loaders.{name}.loader"].path
    return _batch_size(config, path, build(config, f"loaders.{name}.loader"), world_size)


def _batch_size(config: ConfigDict, path: KeyPath, options: dict[str, Any], world_size: int) -> int:
    """Samples per rank and batch; takes both keys out of the options."""
    per_rank, of_all_ranks = options.pop("batch_size"), options.pop("global_batch_size")
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


def _checked(config: ConfigDict, path: KeyPath, dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        reason = "so that ranks can share it and a stopped training can resume"
        text = f"{type(dataset).__name__} has no length; a dataset here has __len__ and __getitem__, {reason}"
        raise refused(config, path, text)
    if not len(dataset):
        raise refused(config, path, f"{type(dataset).__name__} is empty")
    return dataset
