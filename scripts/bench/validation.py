"""One validation of many small samples on one rank and on several: processor time of each rank.

    python scripts/bench/validation.py [--samples 1000000] [--batch-size 256] [--ranks 2] [--rounds 3] [--dataset Items]

What half a validation costs is half of one rank's time; what several ranks do together comes on top. Ratios are of the
busiest rank's processor time to one rank's, divided by the number of ranks, the median of each round's; 1.00 is ideal.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from overhead import HERE, machine
from scale import TORCHRUN, run


def measure(options: argparse.Namespace, ranks: int, folder: Path) -> float:
    """Seconds of processor time of the busiest rank."""
    words = [str(options.samples), str(options.batch_size), options.dataset]
    command = [*TORCHRUN, f"--nproc_per_node={ranks}", str(HERE / "validation.py"), "--rank", *words]
    said = run(command, folder, 1)
    return max(map(float, re.findall(r"cpu_s=([0-9.]+);", said)))  # lines of two ranks may be one


def on_a_rank(samples: str, batch_size: str, dataset: str) -> None:
    """Validate, after a small test to warm up, and print what that took."""
    import dtrain

    of_train: dict[str, Any] = {"name": dataset, "samples": 64, "seed": 0}
    val = {"name": dataset, "samples": int(samples), "seed": 1, "batch_size": int(batch_size)}
    test = val | {"samples": 4 * int(batch_size)}
    config = {
        "experiment": "validation", "modules": ["workload"], "device": "cpu",
        "model": {"name": "MLP"}, "loss": {"name": "CrossEntropyLoss"}, "metrics": {"name": "accuracy"},
        "loaders": {"train": of_train, "val": val, "test": test}, "optimizer": {"name": "SGD", "lr": 0.01},
        "trainer": {"max_epochs": 1, "checkpoint_dir": f"run-{time.time_ns()}", "pictures": False},
    }  # fmt: skip
    trainer = dtrain.create_trainer(config)
    trainer.metrics.prepare()
    loaders: Any = trainer.loaders
    clocks = []
    for name, loader in (("test", loaders.test), ("val", loaders.val)):
        began = time.process_time()
        trainer._evaluate_set(name, loader, trainer.module)
        clocks.append(time.process_time() - began)
    print(f"cpu_s={clocks[-1]};", flush=True)


def main() -> None:
    """Measure in turn, and print the ratio."""
    if sys.argv[1:2] == ["--rank"]:
        on_a_rank(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/validation.py --rounds 1"
    )
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset", default="Items", help="Items (default) or tensors")
    wish = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="validation-") as name:
        for number in range(wish.rounds):
            turn = (1, wish.ranks) if number % 2 == 0 else (wish.ranks, 1)
            seconds = {ranks: measure(wish, ranks, Path(name)) for ranks in turn}
            found.append((seconds[1], seconds[wish.ranks], seconds[wish.ranks] * wish.ranks / seconds[1]))
            print(f"round {number + 1}: " + ", ".join(f"{value:.2f}" for value in found[-1]), file=sys.stderr)
    one, each, ratio = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"{machine()}; {wish.samples:,} samples in batches of {wish.batch_size}, {wish.dataset}")
    print(f"one rank {one:.2f} s, each of {wish.ranks} {each:.2f} s of processor time: {ratio:.3f} of its share")


if __name__ == "__main__":
    main()
