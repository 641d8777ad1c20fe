"""For how long a checkpoint stops the loop: against the bare copy of its tensors, in one training.

    python scripts/bench/checkpoint.py [--parameters 100000000] [--checkpoints 8] [--device cuda] [--json FILE]

dtrain trains a model with AdamW and saves it every fourth step. The stall is the time from the end of such a step to
the begin of the next one, less the median of that time after the steps without a checkpoint. Halfway between two
checkpoints, when the last one is on the disk, weights and optimizer state are copied, into memory that is there
already, and the copy is timed (checkpoint_parts.py). The ratio is the median of each checkpoint's stall over the copy
before it. The step after a checkpoint, beside which the thread writes, is compared with the last one before the next
checkpoint, beside which nothing is written. After it the loop looks for how long it waits for Python's lock while the
thread still writes, and for as long without it. All of it by the clock, and in the processor time of the loop's
thread, which says more where other programs run; it takes in no wait, such as one for the writer.

Then that training's checkpoint is read again, in turn as a start of dtrain resumes (verified and loaded), in one bare
reading of its files into memory that is there already, and with torch.load, which verifies nothing, of the same tensors
in one file. Before each, the files are dropped from the page cache. Clock, processor time, and bytes read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from checkpoint_parts import EVERY
from overhead import Verdict, environment, machine

MOST_RATIO, MOST_LATER_S = 1.05, 0.5
TIMEOUT_SECONDS = 900.0


@dataclass
class Checkpoint:
    """One checkpoint's cost."""

    step: int
    stall_s: float
    copy_s: float
    stall_cpu_s: float
    copy_cpu_s: float
    next_step_s: float  # beside which the thread writes
    quiet_step_s: float  # beside which nothing is written
    next_step_cpu_s: float
    quiet_step_cpu_s: float
    lock_gap_s: float  # the longest wait for Python's lock while the thread writes
    quiet_lock_gap_s: float  # and while it does not


@dataclass
class Reading:
    """The checkpoint read once."""

    way: str
    seconds: float
    cpu_s: float
    read_mb: float


def config(device: str, parameters: int, checkpoints: int, folder: Path) -> dict[str, object]:
    """A training of just as many steps, and two after the last checkpoint that counts."""
    return {
        "experiment": "checkpoint",
        "modules": ["checkpoint_parts"],
        "device": device,
        "model": {"name": "Wide", "parameters": parameters},
        "loaders": {"name": "tensors", "batch_size": 1, "train": {"samples": EVERY * checkpoints + 2}},
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
    gaps, steps = ({int(step): pair for step, pair in figures[key].items()} for key in ("gaps", "steps"))
    plain, plain_cpu = (statistics.median(pair[at] for step, pair in gaps.items() if step % EVERY) for at in (0, 1))
    found = []
    saved = [step for step in gaps if step % EVERY == 0]
    for step, copy, locked in zip(saved, figures["copies"], figures["lock_gaps"], strict=True):
        (stall, stall_cpu), after, quiet = gaps[step], steps[step + 1], steps[step - 1]
        more = (after[0], quiet[0], after[1], quiet[1])
        found.append(Checkpoint(step, stall - plain, copy[0], stall_cpu - plain_cpu, copy[1], *more, *locked))
    return found


def read_in_turn(checkpoint: Path, folder: Path, rounds: int) -> list[Reading]:
    """As dtrain reads it, in one bare reading, and by torch.load, in turn."""
    import torch

    from dtrain.checkpoint import checkpoint_files

    path = checkpoint.resolve()
    files = [each for each in path.iterdir() if each.suffix != ".json"]
    loaded = checkpoint_files.load(path)
    torch.save({"model": loaded.weights, "optimizer": loaded.state["optimizer"]}, folder / "plain.pt")
    del loaded
    buffer = memoryview(bytearray(4 << 20))

    def resumed() -> None:
        checkpoint_files._seals.clear()
        contents: dict[Path, Any] = {}
        if problems := checkpoint_files.verify(path, contents):
            raise SystemExit(f"damaged: {problems}")
        checkpoint_files.load(path, is_verified=True, contents=contents)

    def bare() -> None:
        for each in files:
            with open(each, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    ways = {"dtrain": resumed, "one reading": bare, "torch.load": lambda: torch.load(folder / "plain.pt")}
    found = []
    for number in range(rounds):
        for way in list(ways) if number % 2 == 0 else list(reversed(ways)):
            for each in (*files, folder / "plain.pt"):
                drop(each)
            began = time.perf_counter(), time.process_time(), bytes_read()
            ways[way]()
            ended = time.perf_counter(), time.process_time(), bytes_read()
            seconds, cpu, size = (end - begin for begin, end in zip(began, ended, strict=True))
            found.append(Reading(way, seconds, cpu, size / 1e6))
    return found


def drop(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """What this process has asked of the system."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def main() -> None:
    """Measure, and print what was found and what is promised."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python scripts/bench/checkpoint.py --checkpoints 4",
    )
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of the model (default 100000000)")
    parser.add_argument("--checkpoints", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--device", default="cpu", help="where the model lies (default cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="of readings (default 7; 0: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=os.curdir) as name:
        folder = Path(name).resolve()
        found = measure(wish.device, wish.parameters, wish.checkpoints, folder)
        readings = read_in_turn(folder / "run" / "checkpoints" / "last", folder, wish.rounds) if wish.rounds else []
    print(f"{wish.parameters / 1e6:g} million parameters, AdamW, {wish.device}; {machine()}\n")
    verdicts = told(found) + (told_of_reading(readings) if readings else [])
    print("\nwhat is promised: what was found, and the most that it may be", *(v.line() for v in verdicts), sep="\n")
    if wish.json:
        data = {"machine": machine(), "checkpoints": [*map(asdict, found)], "readings": [*map(asdict, readings)]}
        wish.json.write_text(json.dumps(data | {"verdicts": [*map(asdict, verdicts)]}, indent=1) + "\n")


def told(found: list[Checkpoint]) -> list[Verdict]:
    """Print each checkpoint, and return what is to be judged."""
    print(f"{'step':>6}{'stall, s':>12}{'copy, s':>10}{'ratio':>8}{'CPU: stall':>13}{'copy':>8}{'ratio':>8}", end="")
    print(f"{'next step':>12}{'quiet one':>11}{'ratio':>8}{'lock, ms':>11}{'without':>9}")
    for one in found:
        print(f"{one.step:>6}{one.stall_s:>12.4f}{one.copy_s:>10.4f}{one.stall_s / one.copy_s:>8.2f}", end="")
        print(f"{one.stall_cpu_s:>13.4f}{one.copy_cpu_s:>8.4f}{one.stall_cpu_s / one.copy_cpu_s:>8.2f}", end="")
        ratio = one.next_step_cpu_s / one.quiet_step_cpu_s
        print(f"{one.next_step_cpu_s:>12.4f}{one.quiet_step_cpu_s:>11.4f}{ratio:>8.2f}", end="")
        print(f"{one.lock_gap_s * 1e3:>11.1f}{one.quiet_lock_gap_s * 1e3:>9.1f}")
    by_clock = statistics.median(one.stall_s / one.copy_s for one in found)
    by_cpu = statistics.median(one.stall_cpu_s / one.copy_cpu_s for one in found)
    text = "a checkpoint's stall / the bare copy of its tensors"
    return [Verdict(text, by_clock, MOST_RATIO), Verdict(f"{text}, CPU", by_cpu, MOST_RATIO)]


def told_of_reading(readings: list[Reading]) -> list[Verdict]:
    """Print the medians of each way, and return what is to be judged."""
    middle = {}
    print(f"\n{'read by':>12}{'clock, s':>12}{'CPU, s':>10}{'MB':>9}")
    for way in ("dtrain", "one reading", "torch.load"):
        own = [one for one in readings if one.way == way]
        middle[way] = statistics.median(one.seconds for one in own)
        cpu, size = (statistics.median(getattr(one, key) for one in own) for key in ("cpu_s", "read_mb"))
        print(f"{way:>12}{middle[way]:>12.2f}{cpu:>10.2f}{size:>9.0f}")
    rounds = [[one.seconds for one in readings if one.way == way] for way in ("dtrain", "one reading")]
    later = statistics.median(ours - bare for ours, bare in zip(*rounds, strict=True))
    return [Verdict("read as a start resumes, later than one reading", later, MOST_LATER_S, " s")]


if __name__ == "__main__":
    main()
