"""Batches of a dataset, each sample with random numbers of its own, loaded in this process or in workers."""

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from dtrain.data import rng
from dtrain.data.loader_workers import begin_worker, signals_blocked


def batch_loader(dataset: Any, seed: int, batch_sampler: Any, options: dict[str, Any]) -> DataLoader:
    """A loader of the batches whose [epoch, index, ...] the sampler yields, with DataLoader's options."""
    method = options["multiprocessing_context"] or multiprocessing.get_start_method(allow_none=True)
    if method is None:  # forks share the data set's memory; Python's own choice differs from version to version
        method = "fork" if sys.platform == "linux" else multiprocessing.get_all_start_methods()[0]
    own = {"collate_fn": _already_collated, "multiprocessing_context": method}
    if not options["num_workers"]:
        own |= {"multiprocessing_context": None, "persistent_workers": False, "prefetch_factor": None, "timeout": 0}
    parent = 0 if method == "forkserver" else os.getpid()
    return (DataLoader if method == "forkserver" else _SignalSafeLoader)(
        SeededBatches(dataset, seed, options["collate_fn"]),
        batch_sampler=batch_sampler,
        worker_init_fn=functools.partial(begin_worker, parent),
        generator=torch.Generator(),  # else each epoch would draw a seed from the generator that dropout uses
        **options | own,
    )


class _SignalSafeLoader(DataLoader):
    """Its workers survive the signals to all processes of a job also while they are being started.

    Not for a fork server: it would have the signals blocked for good, and so would all that it starts.
    """

    def __iter__(self) -> Any:
        if self.num_workers and self.multiprocessing_context.get_start_method() == "spawn":
            resource_tracker.ensure_running()  # else it is started meanwhile, which unblocks SIGTERM
        with signals_blocked():
            return super().__iter__()


class SeededBatches(Dataset):
    """A dataset as the loaders see it: asked for [epoch, index, ...], it gives that batch, collated.

    The generators are seeded for each sample; what the collate function draws follows the last one's numbers. Seeding
    takes 25 us a sample, so it is done only where something is drawn: of a dataset that does not say (`random`, True or
    False) a batch is made without, and made again with it as soon as a first one turns out to have drawn.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate or default_collate
        declared = getattr(dataset, "random", None)  # the dataset speaks for its items alone, not for `collate`
        self.random: bool | None = declared if declared is True or (declared is False and collate is None) else None
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
        except (KeyboardInterrupt, SystemExit) as error:
            if get_worker_info() is None:
                raise
            # At these torch's workers end without saying so; a worker gets no Ctrl-C.
            where = f"while loading sample {index} of {type(self.dataset).__name__}"
            raise RuntimeError(f"{type(error).__name__} was raised by the program itself {where}") from error


def _already_collated(batch: Any) -> Any:
    return batch
