"""What a start takes beside what it is compared with, in turn: help, a mistake, the first step, a long journal.

    python scripts/bench/start.py [--rounds 7] [--lines 1000000]

Figures are seconds of processor time, of the command and its ranks together, and medians; the first step's is that of
the rank itself (overhead.py has it by the clock, too, and for several ranks). The sender, a process of its own, is not
in it. A resumed training is one of the same config that was stopped after its first steps.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from contestants import HERE
from overhead import environment, machine
from turns import Program, new_folder

from dtrain.tracking.earlier_starts import read_earlier

STEPS = 120
PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
CONFIG = [str(HERE / "overhead.yaml"), "device=cpu", "loaders.name=Items", f"loaders.train.samples={STEPS * 2 * 32}"]
MISTAKE = ["-m", "dtrain", *CONFIG, "optimizer.lrr=1"]


def command(words: list[str], folder: Path, status: int | None = 0) -> float:
    """The processor time of a command and of what it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, cwd=folder, env=environment(folder, STEPS), capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status is not None and done.returncode != status:
        sys.exit(f"{words}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def first_step(words: list[str], *earlier: list[str]) -> float:
    """The processor time of a training up to its first step, in a fresh folder, after earlier commands in it."""
    place = new_folder()
    try:
        for each in earlier:
            command(each, place)
        with contextlib.closing(Program(words, 1, environment(place, STEPS), place)) as program:
            return program.start().first_step_cpu_s
    finally:
        shutil.rmtree(place, ignore_errors=True)


def journal(file: Path, lines: int) -> None:
    """One of a training that logged so often: four figures, every 100th line those of a validation."""
    with file.open("w") as out:
        for step in range(1, lines + 1):
            train = {"train/loss": 1 / step, "learning_rate": 1e-3 / step, "grad_norm": 0.5, "samples_per_second": 1e3}
            values = train if step % 100 else {"val/loss": 1 / step, "val/accuracy": 0.5}
            out.write(json.dumps({"kind": "metrics", "time": 1.7e9 + step / 8, "step": step, "values": values}) + "\n")


def taken_up(file: Path) -> float:
    """The processor time of reading how far a journal's figures came."""
    began = time.process_time()
    read_earlier(file)
    return time.process_time() - began


def contestants(folder: Path, lines: int) -> dict[str, Callable[[], float]]:
    """What is measured, by its name."""
    ends = folder / "ends.py"
    ends.write_text("raise SystemExit(2)\n")
    journal(folder / "metrics.jsonl", lines)
    training = [*PYTHON, "-m", "dtrain", *CONFIG]
    begun = [*training, f"trainer.max_steps={STEPS}"]
    return {
        "dtrain --help": lambda: command([*PYTHON, "-m", "dtrain", "--help"], folder),
        "a mistake": lambda: command([*PYTHON, *MISTAKE], folder, 2),
        "a mistake, torchrun with 2 ranks": lambda: command([*TORCHRUN, *MISTAKE], folder, 1),
        "torchrun with 2 ranks that only end": lambda: command([*TORCHRUN, str(ends)], folder, 1),
        "first step, by hand": lambda: first_step([*PYTHON, str(HERE / "by_hand.py"), "Items", str(STEPS * 32), "320"]),
        "first step, dtrain": lambda: first_step(begun),
        "first step, dtrain resumed": lambda: first_step([*training, f"trainer.max_steps={2 * STEPS}"], begun),
        f"a journal of {lines:,} lines": lambda: taken_up(folder / "metrics.jsonl"),
    }


def main() -> None:
    """Measure all in turn, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (default 7)")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the journal (default 1000000)")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name")
    wish = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="start-"))
    try:
        run = {name: one for name, one in contestants(folder, wish.lines).items() if wish.only in name}
        taken: dict[str, list[float]] = {name: [] for name in run}
        for number in range(wish.rounds):
            for name in run if number % 2 == 0 else reversed(run):
                taken[name].append(run[name]())
                print(f"round {number + 1}, {name}: {taken[name][-1]:.2f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{wish.rounds} rounds; {machine()}; load {os.getloadavg()[0]:.1f}")
    for name, seconds in taken.items():
        print(f"{name:<40} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
