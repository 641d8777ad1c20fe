"""What dtrain and others cost: one training by a hand-written loop, by dtrain with everything on, by peers, in turn.

    python scripts/bench/overhead.py [--rounds 9] [--all] [--only accelerate Ignite] [--json FILE] [--write PAGE]

The training: an MLP 64-256-256-10, 32 random samples per rank and step, SGD, on the CPU; one process, and gloo ranks
under torchrun, one thread each; from a dataset class of the user's own (Items) and from a TensorDataset. By hand:
by_hand.py. By dtrain: its own command line with overhead.yaml: the bar (each program runs on a pseudo-terminal),
metrics, journal, MLflow on sqlite with the sender process, checkpoints. The others: peers/, each as its guides write
it, bare and with the same features as far as it has them (contestants.py); `pip install -e '.[bench]'` brings them, and
one that is not installed is named and left out.

Time per step is taken inside the processes and in the same way for all, by the optimizer that all use (workload.py).
All programs of one kind of run are there at the same time, and take turns of a thousand steps, so that each round has
them all on the same machine (turns.py); in much shorter ones, what happens once a second would happen in each. Figures
are medians over the rounds; ratios are medians of each round's ratio to the hand-written loop, with the quartiles
beside them; of several ranks the slowest or largest counts. Processor time is that of the rank itself; on a busy
machine it says more than the clock on the wall. Start-up is from the start of the command to the end of the first
optimizer step, one program at a time.

Without --all the peers are bare only where one process reads Items, and left out where two read a TensorDataset. The
figures of several shorter runs come into one set of tables by --json and --add; `--ranks --add FILE` measures nothing.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from clock import UNTIMED_STEPS, WARM_UP_STEPS
from contestants import BARE, BATCH_SIZE, DTRAIN, FULL, HAND, HERE, PEERS, TORCHMETRICS, Contestant, Peer, chosen
from overhead_tables import Measurement, from_plain, markdown, verdicts, write_between
from overhead_tables import Verdict as Verdict  # the other benches', too
from turns import Program, ProgramError, new_folder

LAST_STEPS = 20
DATASETS = ("Items", "tensors")
# (ranks, dataset) -> with which features the peers take part, without --all; by hand and dtrain always do.
SHORT = {(1, "Items"): (BARE, FULL), (1, "tensors"): (FULL,), (2, "Items"): (FULL,)}


@dataclass
class Session:
    """Programs that are there at the same time, and how many turns each of them has."""

    ranks: int
    dataset: str
    contestants: list[Contestant]
    rounds: int


@dataclass
class Entry:
    """A program that runs, and what is known of it so far."""

    contestant: Contestant
    program: Program
    found: Measurement


@dataclass
class Bench:
    """Carries out sessions; what was found, and who failed."""

    steps: int  # of a turn
    store: Path | None = None  # MLflow's, empty but for its tables; each program gets a copy
    found: list[Measurement] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    sessions: int = 0

    def measure(self, session: Session) -> None:
        """Start all programs of a session, let them take turns, end them."""
        self.sessions += 1
        with contextlib.ExitStack() as stack:
            entries = []
            for contestant in session.contestants:
                program = self._launched(contestant, session)
                stack.callback(program.close)
                entry = Entry(contestant, program, self._new(contestant, session))
                with self._failures_of(entry):
                    entry.found.start = program.start()
                    entries.append(entry)
                    say(f"{entry.found.where}: first step after {entry.found.start.first_step_s:.2f} s")
            for number in range(session.rounds):
                for entry in in_turn(entries, number):
                    with self._failures_of(entry):
                        entry.found.turns.append(entry.program.turn(self.steps))
                entries = [entry for entry in entries if entry.found.where not in self.failed]
            for entry in entries:
                with self._failures_of(entry):
                    self._end(entry)

    def add(self, file: Path) -> str:
        """Take over the figures of an earlier run; returns where it was measured."""
        data = json.loads(file.read_text())
        self.found += [from_plain(run | {"session": run["session"] + self.sessions}) for run in data["runs"]]
        self.sessions = max(run.session for run in self.found)
        return str(data["about"])

    def _new(self, contestant: Contestant, session: Session) -> Measurement:
        return Measurement(contestant.label, session.ranks, session.dataset, self.sessions)

    def _launched(self, contestant: Contestant, session: Session) -> Program:
        folder = new_folder()
        if self.store:
            shutil.copy(self.store, folder / "mlflow.db")
        steps = WARM_UP_STEPS + session.rounds * (UNTIMED_STEPS + self.steps) + LAST_STEPS
        env = environment(folder, steps) | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        return Program(contestant.command(session.ranks, steps, session.dataset), session.ranks, env, folder)

    def _end(self, entry: Entry) -> None:
        entry.found.end = entry.program.end()
        if entry.contestant.tracks and not has_mlflow_run(entry.program.folder):
            raise ProgramError("no run in MLflow that is finished")
        entry.program.close()
        self.found.append(entry.found)
        if entry.found.turns:
            say(f"{entry.found.where}: {entry.found.middle('step_us'):.0f} us per step")

    @contextlib.contextmanager
    def _failures_of(self, entry: Entry) -> Iterator[None]:
        """A peer that does not train is named and left out; without the two that all is about there is no bench."""
        try:
            yield
        except ProgramError as error:
            if entry.contestant.peer in (HAND, DTRAIN):
                sys.exit(f"{entry.found.where}: {error}")
            self.failed.append(entry.found.where)
            say(f"{entry.found.where} FAILED and is left out: {error}")
            entry.program.close()


def in_turn(entries: Sequence[Entry], number: int) -> list[Entry]:
    """The order of a round: everyone is first once, and neighbours follow one another in both orders."""
    first = number // 2 % max(1, len(entries))
    order = [*entries[first:], *entries[:first]]
    return order if number % 2 == 0 else order[::-1]


def sessions(wish: argparse.Namespace, peers: Sequence[Peer]) -> Iterator[Session]:
    """What is measured: the turns, then starts alone until there are enough of them."""
    for ranks in wish.ranks:
        for dataset in wish.datasets:
            features = (BARE, FULL) if wish.all else SHORT.get((ranks, dataset), ())
            hand = Contestant(HAND, BARE)
            if BARE in features and peers:
                yield Session(ranks, dataset, [hand, *(Contestant(peer, BARE) for peer in peers)], wish.rounds)
            others = [Contestant(peer, FULL) for peer in (HAND, *peers) if peers and FULL in features]
            yield Session(ranks, dataset, [hand, Contestant(DTRAIN, FULL), *others], wish.rounds)
        pair = [Contestant(HAND, BARE), Contestant(DTRAIN, FULL)]
        for _ in range(wish.starts - len(wish.datasets)):
            yield Session(ranks, wish.datasets[0], pair, 0)
        if wish.starts > 1:
            others = [Contestant(one.peer, TORCHMETRICS) for one in pair]
            yield Session(ranks, wish.datasets[0], [pair[0], *others], 0)


def new_store(folder: Path) -> Path:
    """A store of MLflow in sqlite with all its tables, as a user has one after the first run."""
    store = folder / "mlflow.db"
    code = "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); mlflow.search_experiments()"
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{store}"], check=True, capture_output=True, timeout=300)
    return store


def environment(folder: Path, steps: int) -> dict[str, str]:
    """The same for all programs; with it, Python keeps what it compiles, as it does for users."""
    foreign = ("MLFLOW_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_")
    foreign += ("PYTHONDONTWRITEBYTECODE",)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(foreign)},
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
        "OMP_NUM_THREADS": "1",  # the fastest for so small a model, and threads that wait for one another are all noise
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm-256color",
        "BENCH_FOLDER": str(folder),
        "BENCH_STEPS": str(steps),
    }


def has_mlflow_run(folder: Path) -> bool:
    """Whether MLflow's store holds the run, as finished."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return store.execute("select status from runs").fetchall() == [("FINISHED",)]
    return False


def machine() -> str:
    """Where this was measured."""
    cores = len(os.sched_getaffinity(0))
    memory_gb = psutil.virtual_memory().total / 1e9
    return f"{cores} cores, {memory_gb:.0f} GB, Python {platform.python_version()}, torch {metadata.version('torch')}"


def say(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/overhead.py --rounds 9"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each program (default 9)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a turn (default 1000)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS, help="see workload.py (all)")
    parser.add_argument("--only", nargs="*", choices=[peer.name for peer in PEERS], help="besides both loops")
    parser.add_argument("--all", action="store_true", help="each peer in each kind of run, bare and with its features")
    parser.add_argument("--starts", type=int, default=3, help="how often both loops start at least (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the verdicts there, too")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="figures of earlier --json")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables there, between the page's markers")
    wish = parser.parse_args()
    if min(wish.rounds, wish.steps, *wish.ranks) < 1:
        parser.error("--rounds, --steps and --ranks are at least 1")
    if not wish.ranks and not wish.add:
        parser.error("--ranks without numbers: only with --add")
    return wish


def main() -> None:
    """Measure, and print what was found and what was promised."""
    wish = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # not without ending what is stopped
    peers, missing = chosen(wish.only)
    if missing:
        say(f"not installed, left out: {', '.join(missing)} (pip install -e '.[bench]')")
    load = os.getloadavg()[0]  # before
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        bench = Bench(wish.steps, new_store(Path(folder)) if peers and wish.ranks else None)
        abouts = list(map(bench.add, wish.add))
        for session in sessions(wish, peers):
            bench.measure(session)
    about = f"{wish.rounds} turns of {wish.steps} steps, {BATCH_SIZE} samples per rank; {machine()}; load {load:.1f}"
    about = "; ".join(dict.fromkeys([*abouts, about] if wish.ranks else abouts))
    promised = verdicts(bench.found)
    tables = markdown(about, bench.found, missing + bench.failed)
    print(tables)
    print("\nwhat is promised: what was found, and the most that it may be")
    print("\n".join(verdict.line() for verdict in promised))
    if wish.json:
        data = {"about": about, "runs": list(map(asdict, bench.found)), "verdicts": list(map(asdict, promised))}
        wish.json.write_text(json.dumps(data | {"missing": missing, "failed": bench.failed}, indent=1) + "\n")
    if wish.write:
        write_between(wish.write, "overhead", tables)
    if bench.failed:
        sys.exit(f"failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
