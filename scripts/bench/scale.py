"""What grows with ranks, samples and steps: the sampler, what ranks do together, what the journal gets.

    python scripts/bench/scale.py [--ranks 1 2 4 8 16] [--samples 1000000000] [--steps 500] [--json FILE]

The sampler is the training's own, of one rank of up to 8,000, whose first indices are drawn; its memory is what Python
allocated meanwhile and what the process grew by. Ranks are gloo processes of this machine under torchrun
(scale_rank.py): more of them than cores take turns, so their times are upper limits of what a core for each would give.
The journal is that of a training on two ranks by the command line (overhead.yaml), which logs every step.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path

from overhead import environment, machine

from dtrain.data.samplers import ShuffledShard

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MOST_RANKS, BATCH_SIZE, BATCHES = 8000, 32, 3500
TIMEOUT_SECONDS = 170.0


def sampler(samples: int) -> dict[str, float]:
    """A rank's first indices out of so many samples: microseconds for each, and the memory that it took."""
    world = min(MOST_RANKS, max(1, samples // (BATCH_SIZE * BATCHES)))  # so that each has enough of them
    shard = ShuffledShard(samples, 0, world - 1, world, BATCH_SIZE)
    began, drawn = time.perf_counter(), 0
    for _, *indices in islice(shard, BATCHES):
        drawn += len(indices)
        assert 0 <= min(indices) <= max(indices) < samples
    seconds = time.perf_counter() - began
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    tracemalloc.start()
    for _ in islice(shard, BATCHES // 10):
        pass
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before_mb
    return {"samples": samples, "us": 1e6 * seconds / drawn, "peak_mb": peak_mb, "grown_mb": grown_mb}


def run(command: list[str], folder: Path, steps: int) -> str:
    """Run a command to its end; what it printed."""
    env = environment(folder, steps) | {"BENCH_STARTED": str(time.time())}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def together(ranks: int, steps: int, folder: Path) -> dict[str, float]:
    """What so many ranks take for what they do together."""
    said = run([*TORCHRUN, f"--nproc_per_node={ranks}", str(HERE / "scale_rank.py")], folder, steps)
    return dict(json.loads(re.findall(r"^\{.*\}$", said, re.M)[-1]))


def journal(steps: int, folder: Path) -> dict[str, float]:
    """What a training leaves for MLflow: lines and bytes for each logged step, whatever the number of ranks."""
    samples = steps * 2 * BATCH_SIZE
    words = [f"loaders.train.samples={samples}", "trainer.log_every_steps=1", "device=cpu", "loaders.name=tensors"]
    config = str(HERE / "overhead.yaml")
    run([*TORCHRUN, "--nproc_per_node=2", "-m", "dtrain", config, *words, "loaders.val.samples=32"], folder, steps)
    (path,) = folder.rglob("metrics.jsonl")
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] == "metrics"]
    values = sum(len(json.loads(line)["values"]) for line in lines)
    size = sum(map(len, lines))
    return {"steps": steps, "lines": len(lines) / steps, "values": values / steps, "bytes": size / steps}


def main() -> None:
    """Measure, and print the three tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/scale.py --ranks 1 2"
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--samples", type=int, default=10**9, help="of the largest sampler (default 1000000000)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    wish = parser.parse_args()
    sizes = sorted({min(10**6, wish.samples), wish.samples})
    drawn = [sampler(size) for size in sizes]
    print(f"{machine()}\n\n{'samples':>12}{'us an index':>14}{'allocated, MB':>16}{'process grew, MB':>18}")
    for one in drawn:
        print(f"{one['samples']:>12}{one['us']:>14.3f}{one['peak_mb']:>16.2f}{one['grown_mb']:>18.1f}")
    names = ("joined_s", "vote_us", "broadcast_ms", "log_ms", "checkpoint_ms", "generators_kb", "rank_mb")
    print(f"\n{'ranks':>6}" + "".join(f"{name:>15}" for name in names))
    measured, left = [], {}
    with tempfile.TemporaryDirectory(prefix="scale-", dir=os.curdir) as name:
        folder = Path(name).resolve()
        for ranks in wish.ranks:
            measured.append(together(ranks, wish.steps, folder))
            print(f"{ranks:>6}" + "".join(f"{measured[-1][name]:>15.2f}" for name in names), flush=True)
        left = journal(wish.steps, folder)
    told = f"{left['lines']:.2f} lines, {left['values']:.2f} figures, {left['bytes']:.0f} bytes"
    print(f"\njournal, for each logged step: {told}")
    if wish.json:
        data = {"machine": machine(), "sampler": drawn, "together": measured, "journal": left}
        wish.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
