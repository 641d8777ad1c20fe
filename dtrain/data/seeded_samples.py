"""Batches of a dataset, each sample with random numbers of its own, loaded in this process or in workers."""

import contextlib
import functools
import itertools
import multiprocessing
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, get_worker_info

from dtrain.data import rng
from dtrain.data.batch import kept_samples
from dtrain.data.loader_workers import begin_worker, signals_blocked
from dtrain.data.own_generators import generators_in
from dtrain.data.own_seeding import seeding_of
from dtrain.data.sample_files import file_of
from dtrain.data.sample_seeds import SampleSeeds, Seeds, seeds_ahead
from dtrain.data.worker_messages import Counted, Group, Groups, Made, collated, made, packed

# Which samples come, and what a validation is of: not torch's affair.
NOT_OF_TORCH = ("shuffle", "drop_last", "sampler", "batch_sampler", "whole_volumes", "every_epochs")
MOST_SEEDED = 4096  # samples whose seeds are computed at once; each one of a few hundred takes twice as long


def batch_loader(dataset: Any, seed: int, batch_sampler: Any, options: dict[str, Any]) -> "BatchLoader":
    """A loader of the batches whose [epoch, index, ...] the sampler yields, with DataLoader's options.

    Those that say which samples come are the sampler's.
    """
    options = {key: value for key, value in options.items() if key not in NOT_OF_TORCH}
    method = options["multiprocessing_context"] or multiprocessing.get_start_method(allow_none=True)
    if method is None:  # forks share the data set's memory; Python's own choice differs from version to version
        method = "fork" if sys.platform == "linux" else multiprocessing.get_all_start_methods()[0]
    own = {"collate_fn": packed, "multiprocessing_context": method}
    if not options["num_workers"]:
        own |= {"multiprocessing_context": None, "persistent_workers": False, "prefetch_factor": None, "timeout": 0}
    parent = 0 if method == "forkserver" else os.getpid()
    return BatchLoader(
        SeededBatches(dataset, seed, options["collate_fn"]),
        batch_sampler=batch_sampler,
        worker_init_fn=functools.partial(begin_worker, parent),
        generator=torch.Generator(),  # else each epoch would draw a seed from the generator that dropout uses
        **options | own,
    )


class BatchLoader(DataLoader):
    """Torch's loader of `SeededBatches`: it knows how many samples a batch has.

    Its workers survive the signals to all processes of a job also while they are being started. Not by a fork server:
    it would have the signals blocked for good, and so would all that it starts.
    """

    def __iter__(self) -> Any:
        return map(operator.itemgetter(0), self.counted())

    @functools.cached_property
    def groups(self) -> Groups:
        """The requests to workers."""
        return Groups(self.batch_sampler)

    @property
    def _index_sampler(self) -> Any:  # torch's own name for what its iterators ask
        return self.groups if self.num_workers else self.batch_sampler

    def counted(self) -> Iterator[Counted]:
        """Its batches, each with the number of samples in it that count; without any, the batch may be None."""
        batches, sampler = cast("SeededBatches", self.dataset), cast(Any, self.batch_sampler)
        words = np.random.SeedSequence((batches.seed, *sampler.place)).generate_state(2)
        # The base seed of workers that are started now.
        self.generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        if not self.num_workers:
            # Without pinned memory there is nothing that torch's iterator would add.
            return super().__iter__() if self.pin_memory else batches.in_turn(sampler)
        method = self.multiprocessing_context.get_start_method()
        if method == "spawn":
            resource_tracker.ensure_running()  # else it is started meanwhile, which unblocks SIGTERM
        with contextlib.nullcontext() if method == "forkserver" else signals_blocked():
            messages = super().__iter__()
        return itertools.chain.from_iterable(map(self.groups.batches_of, messages))


class SeededBatches(Dataset):
    """A dataset as the loaders see it: asked for [epoch, index, ...], it gives that batch, collated, and its samples.

    Where a sample may come more than once in an epoch, it is asked for [(epoch, position, ...), index, ...], and the
    positions are in its samples' seeds. A dataset with `set_epoch` is told each epoch before the first sample of it, in
    every process.
    The generators are seeded for each sample, those that the dataset or the collate function hold included; what the
    collate function draws follows the last one's numbers. Seeding takes 2 to 25 us a sample, so it is done only where
    something is drawn: of a dataset that does not say (`random`, True or False) and holds no generator, a batch is made
    without, and made again with it as soon as a first one turns out to have drawn.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or collated
        self.may_leave_out = collate is not None  # samples: only a collate function of the user's own can
        declared = getattr(dataset, "random", None)  # the dataset speaks for its items alone, not for `collate`
        self.random: bool | None = declared if declared is True or (declared is False and collate is None) else None
        self._gives_lists = hasattr(dataset, "__getitems__")
        # A class derived from TensorDataset may well transform its items.
        self.tensors = dataset.tensors if type(dataset) is TensorDataset and collate is None else None
        self.sample_seeds = SampleSeeds()
        self.generators: dict[str, Any] = {}  # that dataset and collate function hold, by where they are
        self.is_searched = True  # to the end for them
        self._process = 0  # in which they were looked for after a first batch, which may have made some
        self.has_epochs, self._epoch = _with_epochs(dataset) is not None, -1
        if self.random is not False and self.tensors is None:
            self._look_for_generators()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, epoch: Any, *indices: int) -> Any:
        """One batch as the loader gives it; None where nothing is left of it."""
        batch, samples = self.counted([epoch, *indices])
        return batch if samples else None

    def begin_epoch(self, epoch: int) -> None:
        """Tell the dataset which epoch comes, where it wants to know.

        Raises:
            ValueError: It has another number of samples now.
        """
        if not self.has_epochs or epoch == self._epoch:
            return
        before, self._epoch = len(self.dataset), epoch
        _with_epochs(self.dataset).set_epoch(epoch)
        if len(self.dataset) != before:
            text = f"{type(self.dataset).__name__}.set_epoch({epoch}) changed its length from {before} to"
            raise ValueError(f"{text} {len(self.dataset)}; an epoch's samples are chosen by loaders.train.sampler")

    def __getitems__(self, request: list[Any]) -> Counted | Made:
        """What torch's loader asks for: a batch, or in a worker several of them."""
        if not isinstance(request, Group):
            return self.counted(request)
        return made(self.in_turn(request), may_share=self.may_leave_out and len(request) > 1)

    def in_turn(self, requests: Iterable[list[Any]]) -> Iterator[Counted]:
        """Batches one after the other, whose seeds are computed for several at once."""
        requests = iter(requests)
        for request in requests:
            block = [request, *itertools.islice(requests, MOST_SEEDED // len(request))]
            if self.random is None:
                yield self.counted(block.pop(0))  # which may show that it draws
            seeds = seeds_ahead(self.seed, block) if self.random and block else itertools.repeat(None)
            yield from map(self.counted, block, seeds)

    def counted(self, request: list[Any], seeds: Seeds | None = None) -> Counted:
        """A batch, and how many of its samples count; with the samples' seeds, where they are known already."""
        epoch, *indices = request
        if self.has_epochs:
            self.begin_epoch(epoch[0] if isinstance(epoch, tuple) else epoch)
        if self.tensors is not None:
            rows = torch.tensor(indices)  # what collating its items gives, in a tenth of the time
            return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self.tensors], len(indices)
        if self.random is False:
            return self._loaded(indices)
        counted = self._made(request, seeds)
        if self._process != os.getpid():
            self._process = os.getpid()
            if self._look_for_generators():
                return self._made(request, seeds)
        return counted

    def _look_for_generators(self) -> bool:
        """Whether others were found than before."""
        before = self.generators
        self.generators, self.is_searched = generators_in(dataset=self.dataset, collate_fn=self.collate)
        if self.generators:
            self.random = True
        return any(before.get(name) is not generator for name, generator in self.generators.items())

    def _made(self, request: list[Any], seeds: Seeds | None) -> Counted:
        indices, in_rank = request[1:], get_worker_info() is None
        if self.random is True and not in_rank:
            return self._seeded(request, seeds)
        draws = rng.draws()
        marks = draws.marks()
        if marks != draws.known:
            draws.read_states(marks)
        states = draws.states
        if self.random is None:
            counted = self._loaded(indices)
            if draws.marks(marks) == marks:
                return counted
            draws.put_back(states)
            self.random = True
        of_monai = rng.seed_of_monai()
        try:
            return self._seeded(request, seeds)
        finally:
            if in_rank:  # whose generators belong to the model
                draws.put_back(states, marks)
                rng.set_seed_of_monai(of_monai)

    def _loaded(self, indices: list[int], seeding: Iterator[Any] | None = None) -> Counted:
        """The batch and how many samples count; before each, the next of `seeding` is taken, which seeds for it."""
        one_by_one = seeding is not None or not self._gives_lists
        items = self._one_by_one(indices, seeding or itertools.repeat(None)) if one_by_one else self._as_list(indices)
        if len(items) != len(indices) and not self.may_leave_out:
            text = f"{type(self.dataset).__name__}.__getitems__ gave {len(items)} samples for {len(indices)} indices"
            raise ValueError(f"{text}; a collate_fn may leave samples out, see docs/data.md")
        try:
            batch = self.collate(items)
        except Exception as error:
            self._name_odd_sample(error, items, indices)
            raise
        return batch, kept_samples(batch, items, len(indices)) if self.may_leave_out else len(indices)

    def _name_odd_sample(self, error: Exception, items: list[Any], indices: list[int]) -> None:
        """Name the sample that is not like most others of a batch that cannot be made."""
        forms = [_form(item) for item in items]
        usual, count = Counter(forms).most_common(1)[0]
        if len(items) == len(indices) and len(items) / 2 < count < len(items):
            odd = next(number for number, form in enumerate(forms) if form != usual)
            error.add_note(f"{self._while_loading(indices[odd])}: it is {forms[odd]}, most are {usual}")

    def _as_list(self, indices: list[int]) -> list[Any]:
        try:
            return self.dataset.__getitems__(indices)
        except Exception as error:
            error.add_note(f"while loading the samples {indices} of {type(self.dataset).__name__}")
            raise

    def _seeded(self, request: list[Any], known: Seeds | None) -> Counted:
        """A batch whose samples have random numbers of their own."""
        seeds, indices = known or seeds_ahead(self.seed, [request])[0], request[1:]

        def made(seeding: Iterator[Any]) -> Counted:
            held = [seeding_of(each, name, seeds) for name, each in self.generators.items()]
            return self._loaded(indices, zip(seeding, *held, strict=False) if held else seeding)

        return self.sample_seeds.made(seeds, made)

    def _one_by_one(self, indices: list[int], seeding: Iterator[Any]) -> list[Any]:
        """The samples; an error names its own."""
        items: list[Any] = []
        dataset = self.dataset
        try:
            for index, _ in zip(indices, seeding, strict=False):  # the second may continue for ever
                items.append(dataset[index])
        except Exception as error:
            error.add_note(self._while_loading(indices[len(items)]))
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            if get_worker_info() is None:
                raise
            # At these torch's workers end without saying so; a worker gets no Ctrl-C.
            where = self._while_loading(indices[len(items)])
            raise RuntimeError(f"{type(error).__name__} was raised by the program itself {where}") from error
        return items

    def _while_loading(self, index: int) -> str:
        file = ""
        with contextlib.suppress(Exception):  # of a dataset that has just raised, nothing is certain
            file = file_of(self.dataset, index)
        return f"while loading sample {index} of {type(self.dataset).__name__}{file and f', {file}'}"


def _form(item: Any) -> str:
    """What a sample consists of, with shapes: `(tensor (3, 8, 8), int)`."""
    if hasattr(item, "shape"):
        return f"{type(item).__name__.lower()} {tuple(item.shape)}"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{key}: {_form(value)}' for key, value in item.items())}}}"
    if isinstance(item, list | tuple):
        return f"({', '.join(map(_form, item))})"
    return "None" if item is None else type(item).__name__


def _with_epochs(dataset: Any) -> Any:
    """The dataset that wants to know the epoch, itself or the one that it is a subset of; None where none does."""
    while not callable(getattr(dataset, "set_epoch", None)):
        if not isinstance(dataset, Subset):
            return None
        dataset = dataset.dataset
    return dataset
