"""What all tests share: real command lines, run with a limit, and the proof that they leave no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import Forked, Forks

pytest_plugins = ["machines", "published", "stores", "whole_runs"]  # fixtures that several folders use

REPOSITORY = Path(__file__).resolve().parent.parent
TAG = "DTRAIN_TEST_TAG"
# What a shell, a batch system or a developer may have set, and no test may depend on.
FOREIGN = {"CLICOLOR_FORCE", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "RANK", "WORLD_SIZE"}
FOREIGN_PREFIXES = (
    *("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "MLFLOW_", "NODE_"),
    *("OMPI_", "PMI", "ROLE_", "SLURM_", "TORCHELASTIC_"),
)


# Tests with these start processes, trainings or stores of MLflow, each for seconds: --fast leaves them out.
STARTS_PROCESSES = {"client_settings", "here", "place", "pytester", "tagged", "uri"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak: minutes of repetitions each")
    parser.addoption("--fast", action="store_true", help="only tests that take little time: not slow, in this process")


def pytest_configure() -> None:
    # A shell that runs the tests in the background has them, and what they start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        left_out = [item for item in items if not _is_fast(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_fast(item)]
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="a soak test: run with --soak"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A test that failed and then passed depends on something that it should not: what it said is not lost."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"failed at first: {report.nodeid}")
        terminalreporter.line(report.longreprtext)


def _is_fast(item: pytest.Item) -> bool:
    is_marked = any(item.get_closest_marker(name) for name in ("slow", "soak")) or item.path.parent.name == "runs"
    return not is_marked and STARTS_PROCESSES.isdisjoint(getattr(item, "fixturenames", ()))


@dataclass(frozen=True)
class Result:
    """How a command line ended.

    Attributes:
        rc: Exit status; negative: the signal that ended it.
        stdout: All it wrote, and all that its ranks wrote.
        stderr: The same for standard error.
    """

    rc: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Both, for an assertion's message."""
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Tagged:
    """The processes of one test, wherever they went: each carries the tag in its environment.

    A process group is not enough: every rank of torchrun, and MLflow's sender, is a session of its own.
    """

    def __init__(self) -> None:
        self.tag = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes] | Forked] = []
        self.sessions: set[int] = set()  # of what was forked in a shell

    def pids(self) -> list[int]:
        """Living processes that carry the tag, or are of the session of one that was forked."""
        wanted = f"{TAG}={self.tag}".encode()
        forked = [process for process in self.started if isinstance(process, Forked)]
        # The kernel keeps a number as long as a session has it. A process that has it after that is another's.
        sessions = {each.pid for each in forked if each.poll() is None or not Path(f"/proc/{each.pid}").exists()}
        sessions |= {pid for pid in self.sessions if not Path(f"/proc/{pid}").exists()}
        processes = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [int(entry.name) for entry in processes if _is_ours(entry, wanted, sessions)]

    def command_lines(self) -> list[str]:
        return [f"{pid}: {_command_line(pid)}" for pid in self.pids()]

    def stacks(self) -> list[str]:
        """Where each of them is, a line for each thread: its innermost calls, those of C included."""
        spy = [str(Path(sys.executable).with_name("py-spy")), "dump", "--native", "--pid"]
        lines = []
        for pid in self.pids():
            try:
                dump = subprocess.run([*spy, str(pid)], capture_output=True, text=True, timeout=10, check=False)
                threads = re.split(r"\nThread ", dump.stdout + dump.stderr)
            except (OSError, subprocess.SubprocessError) as error:
                threads = [str(error)]
            lines += [f"{pid} {' < '.join(thread.split(chr(10))[:10])}" for thread in threads[1:] or threads]
        return lines

    def wait_gone(self, timeout_seconds: float) -> bool:
        """True as soon as none is left, False when some are after the time."""
        end = time.monotonic() + timeout_seconds
        looks = 0  # one look is not enough: /proc shows a process that is being started with no environment
        while looks < 2:
            looks = 0 if self.pids() else looks + 1
            if not looks and time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """Kills all of them, those included that are started meanwhile."""
        end = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < end:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)


def _is_ours(entry: Path, wanted: bytes, sessions: set[int]) -> bool:
    try:
        state, _parent, _group, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        # A zombie is dead: its parent has not asked for it yet, or never will.
        return state != "Z" and (int(session) in sessions or wanted in (entry / "environ").read_bytes().split(b"\0"))
    except OSError:
        return False


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(gone)"


@pytest.fixture
def tagged() -> Iterator[Tagged]:
    """The test's processes. The test fails when one of them outlives it by 30 s, MLflow's sender included."""
    processes = Tagged()
    yield processes
    gone = processes.wait_gone(200)
    left = [] if gone else processes.command_lines()
    processes.kill()
    for process in processes.started:
        process.wait(200)
    if left:
        pytest.fail("processes were left behind:\n" + "\n".join(left))


def neutral_env() -> dict[str, str]:
    """The environment of tests' processes: the CPU, one thread each, and nobody else's ranks or MLflow."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_PREFIXES) and k not in FOREIGN}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def clean_env(tagged: Tagged) -> dict[str, str]:
    """The same with the test's tag."""
    return {**neutral_env(), TAG: tagged.tag}


class Running:
    """A command line at work, for tests that disturb it.

    Its output goes to files: a pipe would fill up, or be kept open by a process that was left behind.

    Args:
        forks: What to fork it from; the command is then `python ...`.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        files: Path,
        tagged: Tagged,
        forks: Forks | None = None,
    ) -> None:
        self.command, self.tagged = list(command), tagged
        self.out, self.err = files / "stdout", files / "stderr"
        self.process: subprocess.Popen[bytes] | Forked
        if forks is not None:
            self.process = forks.start(self.command[1:], cwd, env, self.out, self.err)
        else:
            with self.out.open("wb") as out, self.err.open("wb") as err:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=cwd,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
        tagged.started.append(self.process)

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> Result:
        """What it wrote so far; rc is 0 while it runs."""
        texts = (path.read_text(errors="replace") for path in (self.out, self.err))
        return Result(self.process.poll() or 0, *texts)

    def result(self, timeout: float) -> Result:
        """Waits for its end; after the time all of the test's processes are killed and the test fails.

        Args:
            timeout: Seconds.
        """
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            left = "\n".join(self.tagged.command_lines() + self.tagged.stacks())
            self.tagged.kill()
            pytest.fail(f"still running after {timeout} s: {' '.join(self.command)}\n{left}\n{self.output().text}")
        return self.output()


StartCli = Callable[..., Running]
RunCli = Callable[..., Result]


@pytest.fixture
def start_cli(
    tagged: Tagged, clean_env: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> StartCli:
    """`start_cli(args, nproc=1, env=None, cwd=None, launcher=None)` starts the real command line, and returns at once.

    One process: `python -m dtrain ARGS`; more: the same under torchrun, which finds a free port itself. `launcher`
    replaces what stands before `-m dtrain`. `env` is added to the clean environment; a None takes a variable away.
    The current folder is tmp_path, so a store or a run folder with a relative name lands there.
    """

    def start(
        args: Sequence[str | os.PathLike[str]],
        nproc: int = 1,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        launcher: Sequence[str] | None = None,
    ) -> Running:
        if launcher is None:
            torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
            launcher = [sys.executable, *(torchrun if nproc > 1 else [])]
        full = {k: v for k, v in {**clean_env, **(env or {})}.items() if v is not None}
        command = [*launcher, "-m", "dtrain", *map(os.fspath, args)]
        return Running(command, cwd or tmp_path, full, tmp_path_factory.mktemp("cli"), tagged)

    return start


@pytest.fixture
def run_cli(start_cli: StartCli) -> RunCli:
    """`run_cli(args, nproc=1, env=None, timeout=250, cwd=None, launcher=None)`: start_cli to its end; a `Result`."""

    def run(args: Sequence[str | os.PathLike[str]], nproc: int = 1, timeout: float = 250, **more: Any) -> Result:
        return start_cli(args, nproc=nproc, **more).result(timeout)

    return run
