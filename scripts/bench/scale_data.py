"""What grows with the size of the data: samples in a memory-mapped file, and files of volumes.

    python scripts/bench/scale_data.py [--samples 1000000 100000000] [--files 100 10000] [--ranks 4] [--json FILE]

Each rank is a process of its own, one after the other, so that processor time says what it costs. Of samples: the time
from the config to a rank's first batch, what that takes in private memory, and a checksum of the first batches of all
ranks. Of HDF5 files, of 16 x 16 x 16 voxels each, with statistics of every file: the first start, which reads them, and
a later one, or that of another rank. The files are sparse or small: 400 MB and 200 MB at the sizes above.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from overhead import machine

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 900.0
BATCHES = 50


class Mapped:
    """Rows of a memory-mapped file, as many projects have them."""

    def __init__(self, path: str, samples: int) -> None:
        self.rows = np.memmap(path, np.float32, "r", shape=(samples, 1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self.rows[index]), index


def private_mb() -> float:
    """Memory of this process alone, in 10^6 bytes: pages of a mapped file belong to all."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e6


def samples_of(path: str, samples: int, rank: int, ranks: int) -> dict[str, Any]:
    """One rank's start on a file of so many samples."""
    from dtrain.config.load import from_mapping
    from dtrain.dataloader import get_train_loaders

    own = {"name": "scale_data.Mapped", "path": path, "samples": samples, "batch_size": 32}
    config = from_mapping({"modules": ["scale_data"], "loaders": {"train": own}})
    began, before = time.process_time(), private_mb()
    loader = get_train_loaders(config, rank, ranks, 0).train
    assert loader is not None
    batches = [micro.batch[1].tolist() for micro in islice(loader.epoch(0), 1)]
    seconds = time.process_time() - began
    batches += [micro.batch[1].tolist() for micro in islice(loader.epoch(1), BATCHES)]
    return {"cpu_s": seconds, "mb": private_mb() - before, "indices": batches}


def files_of(folder: str, count: int) -> dict[str, Any]:
    """A start on so many files of volumes."""
    from dtrain.components.datasets.hdf5 import LazyHDF5Dataset
    from dtrain.components.datasets.slices import SliceBuilder

    files = [f"{folder}/{number}.h5" for number in range(count)]
    began, clock, before = time.process_time(), time.perf_counter(), private_mb()
    LazyHDF5Dataset(files, slice_builder=SliceBuilder([8, 8, 8]), global_normalization=True)
    return {
        "cpu_s": time.process_time() - began,
        "clock_s": time.perf_counter() - clock,
        "mb": private_mb() - before,
    }


def in_process(*arguments: Any) -> dict[str, Any]:
    """What another process of this script finds."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_samples(folder: Path, samples: int, ranks: int) -> dict[str, Any]:
    """All ranks' starts on one size."""
    path = folder / "samples"
    with path.open("wb") as file:
        file.truncate(4 * samples)
    found = [in_process("samples", path, samples, rank, ranks) for rank in range(ranks)]
    indices = [index for one in found for batch in one["indices"][1:] for index in batch]
    assert len(set(indices)) == len(indices), "a sample came twice"
    return {
        "samples": samples,
        "cpu_s": max(one["cpu_s"] for one in found),
        "mb": max(one["mb"] for one in found),
        "order": zlib.crc32(np.array(indices, np.int64).tobytes()),
    }


def measure_files(folder: Path, count: int) -> dict[str, Any]:
    """The first start on so many files, and a later one."""
    import h5py

    own, draw = folder / f"volumes-{count}", np.random.default_rng(0)
    own.mkdir()
    for number in range(count):
        with h5py.File(own / f"{number}.h5", "w") as file:
            file["raw"] = draw.standard_normal((16, 16, 16), dtype=np.float32)
            file["label"] = (draw.random((16, 16, 16)) < 0.1).astype(np.uint8)
    return {"files": count, "first": in_process("files", own, count), "later": in_process("files", own, count)}


def child(kind: str, *arguments: str) -> dict[str, Any]:
    """What is asked of a process of this script."""
    if kind == "files":
        return files_of(arguments[0], int(arguments[1]))
    return samples_of(arguments[0], *(int(each) for each in arguments[1:]))


def main() -> None:
    """Measure, and print the two tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/scale_data.py --files 100"
    )
    parser.add_argument("--samples", type=int, nargs="*", default=[10**6, 10**7, 10**8])
    parser.add_argument("--files", type=int, nargs="*", default=[100, 10_000])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.child:
        print(json.dumps(child(*wish.child)))
        return
    sizes, files = [], []
    print(f"{machine()}\n\n{'samples':>12}{'CPU s':>10}{'MB':>10}{'order':>14}")
    with tempfile.TemporaryDirectory(prefix="scale-data-") as name:
        for samples in wish.samples:
            sizes.append(one := measure_samples(Path(name), samples, wish.ranks))
            print(f"{samples:>12}{one['cpu_s']:>10.3f}{one['mb']:>10.1f}{one['order']:>14}", flush=True)
        print(f"\n{'files':>12}{'start':>10}{'CPU s':>10}{'clock s':>10}{'MB':>10}")
        for count in wish.files:
            files.append(one := measure_files(Path(name), count))
            for kind in ("first", "later"):
                own = one[kind]
                line = f"{count:>12}{kind:>10}{own['cpu_s']:>10.2f}{own['clock_s']:>10.2f}{own['mb']:>10.1f}"
                print(line, flush=True)
    if wish.json:
        wish.json.write_text(json.dumps({"machine": machine(), "samples": sizes, "files": files}, indent=1) + "\n")


if __name__ == "__main__":
    main()
