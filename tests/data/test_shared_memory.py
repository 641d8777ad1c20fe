"""Whether /dev/shm has room for what loader workers load ahead; on small file systems in memory."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from dtrain.data.shared_memory import DOCKERS_BYTES, tensors_in, too_little_at_all, too_little_for

MB = 2**20
BATCH = {"image": torch.zeros(MB // 4), "rest": [(torch.zeros(MB, dtype=torch.uint8), "name"), 3]}  # 2 MiB


def test_the_batches_that_are_loaded_ahead_are_compared_with_what_there_is(mounted: Callable[[str], Path]) -> None:
    place = mounted(f"size={16 * MB}")
    loader = SimpleNamespace(num_workers=4, prefetch_factor=2)
    assert too_little_for(BATCH, loader, 1, place) == "", "8 batches of 2 MiB"
    line = too_little_for(BATCH, loader, 2, place)
    assert (
        f"{place} has 17 MB, and the batches that loader workers load ahead take up to 34 MB (2.1 MB each, 8 of" in line
    )
    assert "--shm-size" in line and "loaders.num_workers" in line
    assert too_little_for(BATCH, SimpleNamespace(num_workers=0, prefetch_factor=None), 8, place) == ""
    assert too_little_for(BATCH, loader, 2, place / "missing") == ""


def test_what_docker_gives_is_told_before_a_worker_starts(mounted: Callable[[str], Path]) -> None:
    place = mounted(f"size={DOCKERS_BYTES}")
    assert f"{place} has 64 MB, and the 4 loader workers" in too_little_at_all(4, place)
    assert too_little_at_all(0, place) == ""
    assert too_little_at_all(4, place / "missing") == ""


def test_tensors_are_found_in_batches_of_any_form() -> None:
    assert sum(tensor.nbytes for tensor in tensors_in(BATCH)) == 2 * MB
    assert [*tensors_in("text")] == [*tensors_in(None)] == []
