"""Memory that is freed within a prediction is used again; afterwards the system gets it back."""

import os
import resource
from pathlib import Path

import pytest
import torch

from dtrain.predict.kept_memory import memory_kept

SIZE = 48 << 20  # bytes, more than glibc ever keeps by itself


def faults() -> int:
    """Pages that were new while three tensors were made, one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.zeros(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_freed_is_used_again_until_the_last_one_ends() -> None:
    if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("the C library is not glibc")
    torch.zeros(8)
    before = resident()
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    with memory_kept():
        with memory_kept():
            torch.zeros(3 * SIZE, dtype=torch.uint8)  # where tensors come to lie, beside whatever else needs some of it
            assert faults() < pages // 10
        assert faults() < pages // 10
    assert resident() < before + SIZE // 2
    assert faults() > pages  # as always, so what was asserted above was not true without it
