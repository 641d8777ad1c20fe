"""Whole trainings for tests, through the real command line: where they are made, and what they left."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FOREIGN, REPOSITORY, TAG, Result, Running, Tagged, neutral_env
from filelock import FileLock
from forks import Forks
from ports import free_port

from dtrain.checkpoint.checkpoint_files import Loaded, load

TOY = Path(__file__).with_name("toy.py")
WAIT_SECONDS = 250

AUDIT = '''"""Notes what a process opens for writing in run folders, and that it imports mlflow. Run at its start."""
import os, sys

place = os.environ.get("TOY_AUDIT")
who = os.environ.get("RANK", "-") + " " + ("sender" if "dtrain.tracking.sender" in sys.orig_argv else "rank")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")

def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if not (flags or 0) & WRITES and not set(mode or "") & set("wax+"):
            return
    elif event == "import":
        path = "" if arguments[0] == "mlflow" else None
    elif event in CHANGES:
        path = arguments[1] if event in ("os.rename", "os.symlink") else arguments[0]
    else:
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(path)) if path else ""
        if not path or "/run" in path and "/__pycache__" not in path:
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{who}\\t{event}\\t{path}\\n".encode())
            os.close(fd)

if place:
    guard = []
    def hook(event, arguments):
        if not guard:
            guard.append(1)
            try:
                note(event, arguments)
            finally:
                guard.clear()
    sys.addaudithook(hook)
'''

# A training in which all that must come back after a stop is in use.
EXACT = {
    "model.dropout": 0.3, "model.norm": True, "loss.name": "Terms",
    "loaders.batch_size": 2, "loaders.num_workers": 2,
    "optimizer": {"name": "AdamW", "lr": 0.02}, "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step"},
    "trainer.accumulate": 2, "trainer.max_epochs": 3, "trainer.log_every_steps": 3, "trainer.ema_decay": 0.8,
    "trainer.clip_grad_norm": 1.0, "trainer.early_stop_patience": 9, "loaders.test": {"size": 7, "seed": 2},
}  # fmt: skip

NO_MLFLOW = "raise ImportError('kept out of this test')\n"


class Place:
    """A folder with the toy module, in which command lines are started; all workers of pytest-xdist share it."""

    def __init__(self, folder: Path, tagged: Tagged) -> None:
        self.folder, self.tagged = folder, tagged
        self.write("toy.py", TOY.read_text())
        self.write("stubs/mlflow/__init__.py", NO_MLFLOW)
        self.write("audit/sitecustomize.py", AUDIT)
        self.env = {**neutral_env(), TAG: tagged.tag}

    def write(self, name: str, text: str) -> Path:
        """A file that trainings of other workers may be reading: it is never there in part."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            if not path.exists() or path.read_text() != text:
                write_whole(path, text)
        return path

    def config(self, name: str, **changes: Any) -> str:
        """A config file of that name, whose run folder has it, too; `changes` has dots between keys.

        A second test that gives the name another content fails: another worker may run the first one meanwhile.
        """
        path, text = self.folder / f"{name}.yaml", config_text(self.folder, name, changes)
        writer, test = path.with_name(f".{name}.writer"), os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        with FileLock(self.folder / ".lock"):
            if not path.exists() or path.read_text() != text:
                of_other = writer.exists() and writer.read_text() != test
                assert not of_other, f"{name} is the name of a config of {writer.read_text()}, too"
                write_whole(writer, test)
                write_whole(path, text)
        return str(path)

    def start(
        self,
        *arguments: str,
        ranks: int | list[int] = 1,
        do: str = "",
        mlflow: bool = False,
        launcher: list[str] | None = None,
        env: Mapping[str, str] | None = None,
        cold: bool = False,
    ) -> list[Running]:
        """Start a training; of several ranks each process is the caller's own, unless a launcher starts them.

        MLflow is kept out, which saves its import's seconds; the journal holds the same. `cold`: processes that import
        all by themselves, for tests of the start-up and of what /proc shows of a process.
        """
        path = [str(self.folder / "audit"), *([] if mlflow else [str(self.folder / "stubs")])]
        path += filter(None, [os.environ.get("PYTHONPATH")])
        full = {**self.env, "PYTHONPATH": os.pathsep.join(path), "TOY_DO": do, **(env or {})}
        command = [*(launcher or [sys.executable]), "-m", "dtrain", *arguments]
        worlds = [{}] if launcher or ranks == 1 else worlds_of(ranks)
        forks = None if launcher or cold else forked_from()
        started = []
        for number, world in enumerate(worlds):
            files = self.folder / "output" / f"{self.tagged.tag}-{len(self.tagged.started)}-{number}"
            files.mkdir(parents=True)
            started.append(Running(command, self.folder, full | world, files, self.tagged, forks))
        return started

    def run(self, *arguments: str, expect: int | None = 0, timeout: float = WAIT_SECONDS, **options: Any) -> Result:
        """The same to its end; rank 0's result, after all of them ended with the status that is expected."""
        results = [running.result(timeout) for running in self.start(*arguments, **options)]
        if expect is not None:
            assert [result.rc for result in results] == [expect] * len(results), "".join(r.text for r in results)
        return results[0]

    def path(self, name: str) -> Path:
        return self.folder / f"run-{name}"

    def forget(self, test: str) -> None:
        """What the first try of a test left is not there for the second."""
        self.tagged.kill()
        for writer in self.folder.glob(".*.writer"):
            if writer.read_text() == test:
                shutil.rmtree(self.path(writer.stem.removeprefix(".")), ignore_errors=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (as JSON keeps it), made by the first worker that asks for it."""
        kept = self.folder / f"{name}.made"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                kept.write_text(json.dumps(make()))
            return json.loads(kept.read_text())


@functools.cache
def forked_from() -> Forks:
    """One for all tests of this process."""
    return Forks(neutral_env())


def worlds_of(ranks: int | list[int]) -> list[dict[str, str]]:
    """What torchrun sets for each rank, of one node or, with a list, of several with so many each."""
    port = str(free_port())
    places = [(node, rank, size) for node, size in enumerate([ranks] if isinstance(ranks, int) else ranks)
              for rank in range(size)]  # fmt: skip
    common = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": str(node)}
        for rank, (node, local, size) in enumerate(places)
    ]


def said_by_ranks(count: int, script: str, folder: Path, argument: Any) -> list[Any]:
    """What each of so many ranks has written as JSON into RANK.json of a folder.

    The script is given the folder and the argument, as JSON.
    """
    words, env = ["-c", script, str(folder), json.dumps(argument)], neutral_env() | {"PYTHONPATH": str(REPOSITORY)}
    ranks = [
        forked_from().start(words, folder, env | world, folder / f"{rank}.out", folder / f"{rank}.err")
        for rank, world in enumerate(worlds_of(count))
    ]
    statuses = [rank.wait(200) for rank in ranks]
    assert statuses == [0] * count, "".join(path.read_text() for path in sorted(folder.glob("*.err")))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def write_whole(path: Path, text: str) -> None:
    """A file that another process may be reading is never there in part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def write_config(folder: Path, name: str, changes: Mapping[str, Any]) -> str:
    write_whole(folder / f"{name}.yaml", config_text(folder, name, changes))
    return str(folder / f"{name}.yaml")


def config_text(folder: Path, name: str, changes: Mapping[str, Any]) -> str:
    """MLflow gets the time that it needs at the end: a busy machine's sender takes longer than a user would wait."""
    sections: dict[str, Any] = {
        "experiment": "toy",
        "modules": ["toy"],
        "device": "cpu",
        "model": {"name": "MLP"},
        "loaders": {
            "name": "Points", "batch_size": 4, "train": {"size": 29, "noise": 0.1}, "val": {"size": 11, "seed": 1},
        },
        "loss": {"name": "CrossEntropyLoss"},
        "metrics": {"name": "Right"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "trainer": {"max_epochs": 2, "checkpoint_dir": f"run-{name}", "log_every_steps": 1},
        "mlflow": {
            "tracking_uri": f"sqlite:///{folder}/mlflow.db", "system_metrics": False, "exit_timeout_seconds": 200,
        },
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.replace("__", ".").split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return json.dumps(sections, indent=1)


def figures(run: Path) -> dict[str, dict[int, float]]:
    """What the journal holds, by figure and step; no step twice. What depends on the clock is left out."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in line["values"].items() if line["kind"] == "metrics" else ():
            assert line["step"] not in found.setdefault(key, {}), f"{key} at step {line['step']} twice"
            found[key][line["step"]] = float(value)
    return {key: values for key, values in found.items() if key != "samples_per_second" and not key.startswith("time/")}


def last(run: Path) -> Loaded:
    return load(run / "checkpoints" / "last")


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))


def same_training(one: Path, other: Path) -> None:
    """Two runs ended with the same weights, averages, optimizer, schedule, counters and generators, bit for bit."""
    first, second = last(one), last(other)
    assert equal(first.weights, second.weights)
    assert equal(first.ema, second.ema)
    assert equal(first.others, second.others)
    assert {key for key in first.state if not equal(first.state[key], second.state[key])} == set()


def close(one: Mapping[str, Mapping[int, float]], other: Mapping[str, Mapping[int, float]]) -> None:
    """The same figures at the same steps, to 1e-5 of their size."""
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys(), key
        for step, value in one[key].items():
            assert math.isclose(value, other[key][step], rel_tol=1e-5), (key, step, value, other[key][step])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`here(name, expect="FINISHED", **changes)`: a training in this process; its run folder. No sender is started."""
    from dtrain import create_trainer, load_config
    from dtrain.tracking import start_sender as tracking

    shutil.copy(TOY, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.setattr(tracking, "_sender_command", lambda *arguments: [sys.executable, "-c", ""])
    for name in (*FOREIGN, "TOY_DO", "TOY_SEEN"):
        monkeypatch.delenv(name, raising=False)

    def train(name: str, expect: str = "FINISHED", **changes: Any) -> Path:
        trainer = create_trainer(load_config(write_config(tmp_path, name, changes)))
        assert trainer.fit() == expect
        return tmp_path / f"run-{name}"

    return train


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system in memory, with the options given; the test is skipped where that is not allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if done.returncode:
            pytest.skip(f"SKIPPED, NOT TESTED HERE: mounting a tmpfs needs root ({done.stderr.strip()})")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], timeout=200, check=True)


@pytest.fixture(autouse=True)
def second_try(request: pytest.FixtureRequest) -> None:
    """Where a failed test is tried once more, as scripts/test.sh has it, it begins as the first try did."""
    if getattr(request.node, "execution_count", 1) > 1 and "place" in request.fixturenames:
        request.getfixturevalue("place").forget(request.node.nodeid)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where the runs that several tests look at are made; no process may be left at its end."""
    tagged = Tagged()
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    yield Place(folder, tagged)
    gone = tagged.wait_gone(200)
    left = [] if gone else tagged.command_lines()
    tagged.kill()
    for process in tagged.started:
        process.wait(200)
    assert left == []
