"""What dtrain costs: the same training by a hand-written loop and by dtrain with everything on, in turn.

    python scripts/bench/overhead.py [--rounds 5] [--steps 2000] [--ranks 1 2] [--dataset tensors] [--json FILE]

The training: an MLP 64-256-256-10, 32 random samples per rank and step, SGD, on the CPU; one process, and gloo ranks
under torchrun, one thread each. By hand: by_hand.py. By dtrain: its own command line with overhead.yaml: the bar (each
program runs on a pseudo-terminal), metrics, journal, MLflow on a fresh sqlite store with the sender process, a
checkpoint at the end.

Time per step is taken inside the processes and in the same way for both, by the optimizer that both use
(workload.py): from step 101 to the last one. Start-up has its own figure: from the start of the command to the end of
the first optimizer step. Figures are medians over the rounds, ratios the medians of each round's ratio; of several
ranks the slowest or largest counts. 'CPU' is the processor time of the rank itself: on a busy machine it says more than
the clock on the wall.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import platform
import pty
import shutil
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from workload import peak_mb

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 32
VAL_SAMPLES = 320
WARM_UP_STEPS = 100
TIMEOUT_SECONDS = 300.0
BY_HAND, DTRAIN = "by hand", "dtrain"
WITH = " + torchmetrics"

MOST_RATIO = 1.05
MOST_LATER_SECONDS = 3.5
MOST_MORE_MB = {"": 60.0, WITH: 170.0}
MOST_SENDER_MB = 350.0


@dataclass
class Run:
    """One run of one program; of several ranks the slowest or the largest."""

    program: str
    ranks: int
    step_us: float
    step_cpu_us: float  # of which a processor was at work for this process
    first_step_s: float
    first_step_cpu_s: float
    peak_mb: list[float]  # by rank
    whole_s: float  # from the start of the command to its end
    sender_mb: float = math.nan  # its peak; nan where none was seen
    sender_is_gone: bool = True


@dataclass
class Verdict:
    """One promise, and whether it was kept."""

    what: str
    found: float
    most: float
    unit: str = ""
    kept: bool = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.found <= self.most

    def line(self) -> str:
        return f"{'ok  ' if self.kept else 'MISS'}  {self.what:<58} {self.found:8.2f}  <= {self.most:g}{self.unit}"


def command(program: str, ranks: int, steps: int, dataset: str) -> list[str]:
    """The command line of one program."""
    samples = steps * ranks * BATCH_SIZE
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    if program.startswith(BY_HAND):
        words = [str(HERE / "by_hand.py"), dataset, str(samples), str(VAL_SAMPLES)]
        return [*launcher, *words, *(["torchmetrics"] if program.endswith(WITH) else [])]
    overrides = [f"loaders.name={dataset}", f"loaders.train.samples={samples}", f"loaders.val.samples={VAL_SAMPLES}"]
    if program.endswith(WITH):
        overrides.append("metrics={name: Accuracy, task: multiclass, num_classes: 10}")
    return [*launcher, "-m", "dtrain", str(HERE / "overhead.yaml"), "device=cpu", *overrides]


def environment(folder: Path, steps: int) -> dict[str, str]:
    """The same for both loops."""
    foreign = ("MLFLOW_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_")
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(foreign)},
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
        "OMP_NUM_THREADS": "1",  # the fastest for so small a model, and threads that wait for one another are all noise
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm-256color",
        "BENCH_FOLDER": str(folder),
        "BENCH_STEPS": str(steps),
        "BENCH_BEGIN": str(min(WARM_UP_STEPS + 1, max(1, steps // 2))),
    }


def measure(program: str, ranks: int, steps: int, dataset: str) -> Run:
    """Run one program in a fresh folder, on a pseudo-terminal."""
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    try:
        with terminal(folder / "terminal") as slave:
            started = time.perf_counter()
            process = subprocess.Popen(
                command(program, ranks, steps, dataset),
                cwd=folder,
                env={**environment(folder, steps), "BENCH_STARTED": str(started)},
                stdin=subprocess.DEVNULL,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
            )
            try:
                senders = watched(process)
            finally:
                kill(process)
            seconds = time.perf_counter() - started
        return result(program, ranks, folder, process.returncode, seconds, senders)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def terminal(copy: Path) -> Iterator[int]:
    """A pseudo-terminal of 120 columns, whose contents go to a file, as fast as they come."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def drain() -> None:
        with copy.open("wb") as file, contextlib.suppress(OSError):  # EIO: the last one closed it
            while block := os.read(master, 65536):
                file.write(block)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        yield slave
    finally:
        os.close(slave)
        reader.join(10)
        os.close(master)


def watched(process: subprocess.Popen[bytes]) -> dict[int, float]:
    """Wait for the program's end; returns the peak memory of each sender that it had, by process id."""
    senders: dict[int, float] = {}
    look_again = 0.0
    end = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None:
        if time.monotonic() > end:
            kill(process)
        if not senders and time.monotonic() > look_again:  # looking through all processes takes milliseconds
            senders = dict.fromkeys(sender_pids(process.pid), 0.0)
            look_again = time.monotonic() + 1
        for pid in senders:
            with contextlib.suppress(OSError, IndexError):  # it is gone, or a zombie that has no memory any more
                senders[pid] = max(senders[pid], peak_mb(pid))
        time.sleep(0.05)
    return senders


def sender_pids(parent: int) -> list[int]:
    """The senders among a process's descendants."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "dtrain.tracking.sender" in process.cmdline():
                    found.append(process.pid)
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a program that takes too long or is not waited for, with its ranks; nothing where it has ended."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result(program: str, ranks: int, folder: Path, rc: int, seconds: float, senders: dict[int, float]) -> Run:
    """What the ranks wrote down, and what was seen of the sender."""
    files = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    missing = [file.name for file in files if not file.is_file()]
    delivered = program.startswith(BY_HAND) or has_mlflow_run(folder)
    if rc or missing or not delivered:
        shown = (folder / "terminal").read_text(errors="replace")[-3000:]
        log = folder / "run" / "logs" / "sender.log"
        shown += log.read_text(errors="replace")[-1000:] if log.exists() else ""
        sys.exit(f"{program}, {ranks} rank(s): exit status {rc}, no {missing}, in MLflow: {delivered}\n{shown}")
    figures = [json.loads(file.read_text()) for file in files]
    return Run(
        program,
        ranks,
        **{name: max(item[name] for item in figures) for name in figures[0].keys() - {"peak_mb"}},
        peak_mb=[item["peak_mb"] for item in figures],
        whole_s=seconds,
        sender_mb=max(senders.values(), default=math.nan),
        sender_is_gone=not any(is_sender(pid) for pid in senders),
    )


def has_mlflow_run(folder: Path) -> bool:
    """Whether MLflow's store holds the run, as finished."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return store.execute("select status from runs").fetchall() == [("FINISHED",)]
    return False


def is_sender(pid: int) -> bool:
    """Whether a process lives and is a sender; its number may be another's by now."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "dtrain.tracking.sender" in process.cmdline()
    except psutil.Error:
        return False


def schedule(rounds: int, ranks: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """(round, program, ranks): in turn, and in the other order every other round, so that no program is always first.

    By hand with torchmetrics is only for comparing memory: once.
    """
    for number in range(rounds):
        programs = [BY_HAND, DTRAIN, DTRAIN + WITH]
        for count in ranks:
            for program in programs if number % 2 == 0 else reversed(programs):
                yield number, program, count
            if number == 0:
                yield number, BY_HAND + WITH, count


def of(runs: Sequence[Run], program: str, ranks: int) -> list[Run]:
    """The runs of one program, in the order of rounds."""
    return [run for run in runs if (run.program, run.ranks) == (program, ranks)]


def middle(runs: Sequence[Run], figure: str) -> float:
    """The median of a figure."""
    return statistics.median(getattr(run, figure) for run in runs)


def ratio(own: Sequence[Run], hand: Sequence[Run], figure: str) -> float:
    """The median of each round's ratio: a machine that slows down between two rounds does not matter."""
    return statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in zip(own, hand, strict=False))


def rank_mb(runs: Sequence[Run]) -> list[float]:
    """The median of each rank's peak memory."""
    return [statistics.median(values) for values in zip(*(run.peak_mb for run in runs), strict=True)]


def table(runs: Sequence[Run], ranks: int) -> list[str]:
    """What was measured with one number of ranks, one line per program."""
    head = ("us per step", "least", "most", "ratio", "CPU us", "ratio", "first step s", "CPU s", "whole run s")
    lines = [f"{ranks} process(es)".ljust(23) + "".join(name.rjust(13) for name in head) + "  peak memory MB"]
    hand = of(runs, BY_HAND, ranks)
    for program in (BY_HAND, DTRAIN, DTRAIN + WITH, BY_HAND + WITH):
        own = of(runs, program, ranks)
        times = [run.step_us for run in own]
        cells = [f"{value:.0f}" for value in (statistics.median(times), min(times), max(times))]
        cells += [f"{ratio(own, hand, 'step_us'):.3f}"]
        cells += [f"{middle(own, 'step_cpu_us'):.0f}", f"{ratio(own, hand, 'step_cpu_us'):.3f}"]
        cells += [f"{middle(own, 'first_step_s'):.2f}", f"{middle(own, 'first_step_cpu_s'):.2f}"]
        cells += [f"{middle(own, 'whole_s'):.1f}"]
        memory = ", ".join(f"{value:.0f}" for value in rank_mb(own))
        if program.startswith(DTRAIN):
            memory += f"; sender {max(run.sender_mb for run in own):.0f}"
        lines.append(program.ljust(23) + "".join(cell.rjust(13) for cell in cells) + f"  {memory}")
    return lines


def verdicts(runs: Sequence[Run], ranks: int) -> list[Verdict]:
    """What is promised against what was found, with one number of ranks."""
    hand = of(runs, BY_HAND, ranks)
    found = []
    for extra, most_more_mb in MOST_MORE_MB.items():
        own = of(runs, DTRAIN + extra, ranks)
        later = middle(own, "first_step_s") - middle(hand, "first_step_s")
        more_mb = max(mine - its for mine, its in zip(rank_mb(own), rank_mb(hand), strict=True))
        name = f"{ranks} process(es){' with torchmetrics' if extra else ''}"
        found += [
            Verdict(f"{name}: time per step / by hand", ratio(own, hand, "step_us"), MOST_RATIO),
            Verdict(f"{name}: first step later", later, MOST_LATER_SECONDS, " s"),
            Verdict(f"{name}: a rank's memory, more", more_mb, most_more_mb, " MB"),
            Verdict(f"{name}: the sender's memory", max(run.sender_mb for run in own), MOST_SENDER_MB, " MB"),
            Verdict(f"{name}: senders left behind", sum(not run.sender_is_gone for run in own), 0),
        ]
    return found


def machine() -> str:
    """Where this was measured."""
    import torch

    cores = len(os.sched_getaffinity(0))
    memory_gb = psutil.virtual_memory().total / 1e9
    return f"{cores} cores, {memory_gb:.0f} GB, Python {platform.python_version()}, torch {torch.__version__}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/overhead.py --rounds 3"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each program runs (default 5)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a run (default 2000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument(
        "--dataset", default="tensors", choices=["tensors", "Items"], help="see workload.py (default tensors)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every run's figures and the verdicts there, too"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, and print what was found and what was promised."""
    wish = options()
    runs: list[Run] = []
    for number, program, ranks in schedule(wish.rounds, wish.ranks):
        run = measure(program, ranks, wish.steps, wish.dataset)
        runs.append(run)
        where = f"round {number + 1}, {ranks} process(es), {program}"
        print(f"{where}: {run.step_us:.0f} us per step, first step after {run.first_step_s:.2f} s", file=sys.stderr)
    print(f"{wish.rounds} rounds of {wish.steps} steps of {BATCH_SIZE} samples per rank ({wish.dataset}); {machine()}")
    for ranks in wish.ranks:
        print("\n" + "\n".join(table(runs, ranks)))
    found = [verdict for ranks in wish.ranks for verdict in verdicts(runs, ranks)]
    print("\nwhat is promised: what was found, and the most that it may be")
    print("\n".join(verdict.line() for verdict in found))
    if wish.json:
        data = {"machine": machine(), "runs": list(map(asdict, runs)), "verdicts": list(map(asdict, found))}
        wish.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
