"""For how long a checkpoint stops the loop: against the bare copy of its tensors, in one training.

    python scripts/bench/checkpoint.py [--parameters 100000000] [--checkpoints 8] [--device cuda] [--json FILE]

dtrain trains a model with AdamW and saves it every fourth step. The stall is the time from the end of such a
step to the begin of the next one, less the median of that time after the steps without a checkpoint. Halfway between
two checkpoints, when the last one is on the disk, weights and optimizer state are copied, into memory that is there
already, and the copy is timed (checkpoint_parts.py). The ratio is the median of each checkpoint's stall over the copy
before it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from checkpoint_parts import EVERY
from overhead import Verdict, environment, machine

MOST_RATIO = 1.2
TIMEOUT_SECONDS = 900.0


@dataclass
class Checkpoint:
    """One checkpoint's cost."""

    step: int
    stall_s: float
    copy_s: float


def config(device: str, parameters: int, checkpoints: int, folder: Path) -> dict[str, object]:
    """A training of just as many steps, and one after the last checkpoint that counts."""
    return {
        "experiment": "checkpoint",
        "modules": ["checkpoint_parts"],
        "device": device,
        "model": {"name": "Wide", "parameters": parameters},
        "loaders": {"name": "tensors", "batch_size": 1, "train": {"samples": EVERY * checkpoints + 1}},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "ClockedAdamW", "lr": 1e-6},
        "trainer": {
            "max_epochs": 1,
            "checkpoint_every_steps": EVERY,
            "checkpoint_dir": str(folder / "run"),
            "keep_last": 1,
        },
    }


def measure(device: str, parameters: int, checkpoints: int, folder: Path) -> list[Checkpoint]:
    """Train, and read what the optimizer noted."""
    path, found = folder / "config.yaml", folder / "figures.json"
    path.write_text(yaml.safe_dump(config(device, parameters, checkpoints, folder)))
    env = environment(folder, 1) | {"BENCH_FILE": str(found)}
    if device != "cpu":
        del env["CUDA_VISIBLE_DEVICES"]  # hidden from the other benchmarks
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", str(path)], cwd=folder, env=env, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the training ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    figures = json.loads(found.read_text())
    gaps = {int(step): seconds for step, seconds in figures["gaps"].items()}
    plain = statistics.median(seconds for step, seconds in gaps.items() if step % EVERY)
    steps = [step for step in gaps if step % EVERY == 0]
    return [Checkpoint(step, gaps[step] - plain, copy) for step, copy in zip(steps, figures["copies"], strict=True)]


def main() -> None:
    """Measure, and print what was found and what is promised."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python scripts/bench/checkpoint.py --checkpoints 4",
    )
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of the model (default 100000000)")
    parser.add_argument("--checkpoints", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--device", default="cpu", help="where the model lies (default cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=os.curdir) as folder:
        found = measure(wish.device, wish.parameters, wish.checkpoints, Path(folder).resolve())
    print(f"{wish.parameters / 1e6:g} million parameters, AdamW, {wish.device}; {machine()}\n")
    print(f"{'step':>6}{'stall, s':>12}{'copy, s':>12}{'ratio':>9}")
    for one in found:
        print(f"{one.step:>6}{one.stall_s:>12.4f}{one.copy_s:>12.4f}{one.stall_s / one.copy_s:>9.2f}")
    ratio = statistics.median(one.stall_s / one.copy_s for one in found)
    verdict = Verdict("a checkpoint's stall / the bare copy of its tensors", ratio, MOST_RATIO)
    print(f"\nwhat is promised: what was found, and the most that it may be\n{verdict.line()}")
    if wish.json:
        data = {"machine": machine(), "checkpoints": list(map(asdict, found)), "verdict": asdict(verdict)}
        wish.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
