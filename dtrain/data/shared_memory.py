"""Whether /dev/shm, by which loader workers pass their batches on, has space for those that are loaded ahead."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

PLACE = Path("/dev/shm")
DOCKERS_BYTES = 64 * 2**20  # of a container that nobody gave more
_CURE = "docker run --shm-size=8g or --ipc=host, fewer loaders.num_workers, a smaller prefetch_factor"


def too_little_at_all(num_workers: int, place: Path = PLACE) -> str:
    """A line where it is as small as Docker makes it, before a worker ends with a bus error; '' elsewhere."""
    if not num_workers or not place.is_dir() or shutil.disk_usage(place).total > DOCKERS_BYTES:
        return ""
    total = shutil.disk_usage(place).total / 2**20
    return f"{place} has {total:,.0f} MB, and the {num_workers} loader workers pass batches on by it: {_CURE}"


def too_little_for(batch: Any, loader: Any, ranks: int, place: Path = PLACE) -> str:
    """A line where it cannot hold the batches that are loaded ahead; '' where it can.

    Args:
        batch: One of this rank's.
        loader: The DataLoader that gave it.
        ranks: Of this node, which share it.
        place: Where it is mounted.
    """
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    if not ahead or not place.is_dir():
        return ""
    one, usage = sum(tensor.nbytes for tensor in tensors_in(batch)), shutil.disk_usage(place)
    needed = one * ahead * ranks
    if not usage.total or needed <= usage.total:
        return ""
    return (
        f"{place} has {usage.total / 1e6:,.0f} MB, and the batches that loader workers load ahead take up to "
        f"{needed / 1e6:,.0f} MB ({one / 1e6:,.1f} MB each, {ahead} of each of {ranks} rank(s)): {_CURE}"
    )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch of any form."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
