"""Memory that is freed within a prediction is used again; afterwards the system gets it back."""

import json
import os
import resource
import subprocess
import sys
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


def measured() -> dict[str, int]:
    """New pages while memory is kept, twice and once, and afterwards; and the memory that stays."""
    torch.zeros(8)
    before = resident()
    with memory_kept():
        with memory_kept():
            faults()  # where tensors come to lie
            twice = faults()
        once = faults()
    return {"twice": twice, "once": once, "stays": resident() - before, "afterwards": faults()}


def test_what_is_freed_is_used_again_until_the_last_one_ends() -> None:
    if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("the C library is not glibc")
    # A process of its own, as a prediction is: this one's memory is in pieces that other tests have left.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=True)
    found, pages = json.loads(done.stdout), SIZE // os.sysconf("SC_PAGE_SIZE")
    assert max(found["twice"], found["once"]) < pages // 10
    assert found["stays"] < SIZE // 2
    assert found["afterwards"] > pages  # as always, so what was asserted above was not true without it


if __name__ == "__main__":
    print(json.dumps(measured()))
