"""What it costs a training that MLflow's server is away: the same steps with the server there and away, in turn.

    python scripts/bench/outage.py [--rounds 6] [--seconds 10] [--json FILE]

A real `mlflow server` on this machine, and a training of an MLP with AdamW that logs 21 figures at each step through
dtrain's journal and its sender. In every round the server is frozen (it takes connections and never answers) and killed
(it refuses them), each time between two spans in which it is there. A step's time while it is away is compared with the
mean of the spans before and after; the first two seconds of each span do not count. Figures are medians over the
rounds. 'CPU' is the processor time of the training's thread: the server takes its share of this machine as long as it
is there, and that is not the training's. What the sender takes of a processor is told, too: all that an outage could
add to a training is what the sender does more, since the training itself does nothing else than before.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from overhead import Verdict, environment, machine

MOST_RATIO = 1.01
MOST_LOG_SECONDS = 0.05
SETTLE_SECONDS = 2.0
START_TIMEOUT_SECONDS = 150.0
WAYS = ("frozen", "killed")


@dataclass
class Span:
    """Some seconds of the training in which the server was all the time there, or away in one way."""

    server: str
    begin: float
    end: float
    steps: int = 0
    step_us: float = 0.0
    step_cpu_us: float = 0.0
    worst_log_s: float = 0.0
    sender_share: float = 0.0  # of one processor


class Server:
    """`mlflow server` with a sqlite store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "--artifacts-destination", str(self.folder / "artifacts")],
                env=environment(self.folder, 1) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_TIMEOUT_SECONDS
        while not self.answers():
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"mlflow's server did not start:\n{(self.folder / 'server.log').read_text()[-4000:]}")
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def leave(self, how: str) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
        if how == "killed":
            self.process.wait()

    def come_back(self, how: str) -> None:
        if how == "frozen":
            os.killpg(self.process.pid, signal.SIGCONT)
        else:
            self.start()


def train(folder: str, uri: str) -> None:
    """Rank 0: trains until its standard input ends; tells the time and cost of each step."""
    import threading

    import torch

    from dtrain.tracking.journal import Journal

    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(64, 512)
    journal = Journal(Path(folder), experiment="outage", run_name="outage", tracking_uri=uri, exit_timeout_seconds=60)
    journal.start({"lr": 1e-3}, {}, world_size=1)
    stop = threading.Thread(target=sys.stdin.read)
    stop.start()
    steps = []
    while stop.is_alive():
        begin, cpu = time.perf_counter(), time.thread_time()
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        between = time.perf_counter()
        journal.log(len(steps), {"train/loss": float(loss.detach()), **{f"m/{n}": n for n in range(20)}})
        end = time.perf_counter()
        steps.append((time.time(), end - begin, time.thread_time() - cpu, end - between))
    hint = journal.finish("FINISHED")
    print(json.dumps({"steps": steps, "hint": hint}))


def measure(rounds: int, seconds: float, folder: Path) -> tuple[list[Span], str]:
    """Take the server away and give it back, while a training runs; and what the training said of the delivery."""
    server = Server(folder)
    words = [sys.executable, str(Path(__file__).resolve()), "--train", str(folder / "run"), server.uri]
    pipe = subprocess.PIPE
    training = subprocess.Popen(words, cwd=folder, env=environment(folder, 1), stdin=pipe, stdout=pipe, text=True)
    spans = []

    def span(kind: str) -> None:
        time.sleep(SETTLE_SECONDS)
        begin, used = time.time(), sum(sender.cpu_times()[:2])
        time.sleep(seconds)
        one = Span(kind, begin, time.time())
        one.sender_share = (sum(sender.cpu_times()[:2]) - used) / (one.end - one.begin)
        spans.append(one)

    try:
        end = time.monotonic() + START_TIMEOUT_SECONDS
        while not (folder / "run" / "mlflow.json").exists():  # nothing has been delivered yet
            if time.monotonic() > end or training.poll() is not None:
                raise SystemExit("the training did not start")
            time.sleep(0.2)
        (sender,) = psutil.Process(training.pid).children()
        span("there")
        for _ in range(rounds):
            for how in WAYS:
                server.leave(how)
                span(how)
                server.come_back(how)
                span("there")
        found = json.loads(training.communicate()[0])
    finally:
        training.kill()
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    for one in spans:
        inside = [step[1:] for step in found["steps"] if one.begin <= step[0] < one.end]
        walls, cpus, logs = zip(*inside, strict=True)
        one.steps, one.worst_log_s = len(inside), max(logs)
        one.step_us, one.step_cpu_us = 1e6 * statistics.median(walls), 1e6 * statistics.median(cpus)
    return spans, found["hint"]


def ratios(spans: list[Span], how: str, what: str) -> list[float]:
    """The time of a step in each span of this kind, over the mean of those before and after it."""
    return [
        getattr(one, what) / statistics.mean((getattr(before, what), getattr(after, what)))
        for before, one, after in zip(spans, spans[1:], spans[2:], strict=False)
        if one.server == how
    ]


def main() -> None:
    """Measure, and print what was found and what is promised."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/outage.py --rounds 3"
    )
    parser.add_argument("--rounds", type=int, default=6, help="how often the server goes away in each way (default 6)")
    parser.add_argument("--seconds", type=float, default=10, help="how long a span is measured (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "URI"), help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.train:
        train(*wish.train)
        return
    with tempfile.TemporaryDirectory(prefix="outage-", dir=os.curdir) as folder:
        spans, hint = measure(wish.rounds, wish.seconds, Path(folder).resolve())
    print(f"{wish.rounds} rounds with spans of {wish.seconds:g} s; {machine()}\n")
    print(f"{'server':<10}{'steps':>8}{'us per step':>14}{'CPU us':>10}{'worst log, ms':>16}{'sender':>9}")
    for one in spans:
        figures = f"{one.step_us:>14.0f}{one.step_cpu_us:>10.0f}{1000 * one.worst_log_s:>16.2f}"
        print(f"{one.server:<10}{one.steps:>8}{figures}{one.sender_share:>9.1%}")
    print(f"\nat the end: {hint or 'MLflow has every figure'}")
    verdicts = []
    for how in ("there", *WAYS):
        share = statistics.median(one.sender_share for one in spans if one.server == how)
        print(f"the sender, server {how}: {share:.1%} of a processor")
    for how in WAYS:
        for what, name in (("step_us", "step"), ("step_cpu_us", "step, CPU")):
            found = ratios(spans, how, what)
            print(f"{how}, {name}: ratios {' '.join(f'{one:.3f}' for one in sorted(found))}")
            verdicts.append(Verdict(f"{name}, server {how} / there", statistics.median(found), MOST_RATIO))
        worst = max(one.worst_log_s for one in spans if one.server == how)
        verdicts.append(Verdict(f"the longest wait for the journal, server {how}", worst, MOST_LOG_SECONDS, " s"))
    print("\nwhat is promised: what was found, and the most that it may be")
    print("\n".join(verdict.line() for verdict in verdicts))
    if wish.json:
        data = {"machine": machine(), "spans": list(map(asdict, spans)), "verdicts": list(map(asdict, verdicts))}
        wish.json.write_text(json.dumps(data | {"hint": hint}, indent=1) + "\n")


if __name__ == "__main__":
    main()
