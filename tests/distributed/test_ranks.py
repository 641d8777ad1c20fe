"""Ranks: what launchers say, which device, how many threads, and that nobody trains alone by accident."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.config.errors import ConfigError
from dtrain.distributed.device import choose_device
from dtrain.distributed.environment import Environment, environment
from dtrain.distributed.process_group import set_up
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.vote import Vote

REPOSITORY = Path(__file__).resolve().parents[2]
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in RANK_NAMES:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Environment()),
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            Environment(3, 1, 4, 2, "torchrun"),
        ),
        # a batch script sets SLURM_PROCID although srun started nothing
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Environment()),
        # inside torchrun, srun's variables are those of the node's one task
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_PROCID": "1",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
            Environment(3, 1, 4, 2, "torchrun"),
        ),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            Environment(2, 0, 4, 2, "srun"),
        ),
        (
            {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
             "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
            Environment(4, 0, 5, 1, "srun"),
        ),
    ],
)  # fmt: skip
def test_a_rank_finds_its_place(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment() == expected


def test_variables_that_contradict_one_another_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="RANK is 4, but WORLD_SIZE is 4"):
        environment()


ONE, FOUR = Environment(), Environment(3, 3, 4, 4, "torchrun")


@pytest.mark.parametrize(
    ("wish", "found", "gpus", "backend", "device", "said"),
    [
        ("auto", ONE, 0, None, "cpu", "one process on the CPU (torch sees no GPU)"),
        ("auto", ONE, 1, None, "cuda:0", "one process on cuda:0"),
        ("auto", ONE, 4, None, "cuda:0", "one process on cuda:0; 3 more idle, torchrun --nproc_per_node=4 uses all"),
        ("cpu", ONE, 4, None, "cpu", "one process on the CPU"),
        ("cuda:2", ONE, 4, None, "cuda:2", "one process on cuda:2; 3 more idle, torchrun --nproc_per_node=4 uses all"),
        ("auto", FOUR, 0, None, "cpu", None),
        ("auto", FOUR, 4, None, "cuda:3", None),
        ("cuda:0", FOUR, 4, None, "cuda:3", "device cuda:0: with several ranks each takes the GPU of its LOCAL_RANK"),
        ("cuda", FOUR, 1, "gloo", "cuda:0", "4 ranks share 1 GPU(s) over gloo: slower than one rank per GPU"),
        ("cuda", FOUR, 2, "gloo", "cuda:1", "4 ranks share 2 GPU(s) over gloo: slower than one rank per GPU"),
        ("cuda", Environment(3, 3, 4, 4, "srun"), 1, None, "cuda:0", None),  # a GPU bound to each task
    ],
)
def test_which_device_a_rank_takes(wish, found, gpus, backend, device, said):
    chosen, notes = choose_device(wish, found, gpus, backend)
    assert str(chosen) == device
    assert notes == ([said] if said else [])


@pytest.mark.parametrize(
    ("wish", "found", "gpus", "message"),
    [
        ("cuda", ONE, 0, "'cuda' was asked for, but torch .* sees no GPU; possible here: auto, cpu"),
        ("cuda:4", ONE, 4, r"'cuda:4' was asked for, but there are 4 GPU\(s\): cuda:0 to cuda:3"),
        ("cuda", FOUR, 2, r"4 ranks on this node, but 2 GPU\(s\); start 2, or let ranks share"),
        ("auto", FOUR, 1, r"4 ranks on this node, but 1 GPU\(s\); start 1, or let ranks share"),
        ("mps", ONE, 0, "'mps' was asked for, but this torch sees none"),
    ],
)
def test_a_device_that_is_not_there_is_refused(wish, found, gpus, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(wish, found, gpus)


def test_one_process_needs_no_process_group():
    ranks = set_up("cpu")
    assert (ranks.rank, ranks.world_size, ranks.is_main, str(ranks.device)) == (0, 1, True, "cpu")
    assert ranks.gather(5) == [5]
    assert ranks.broadcast(6) == 6
    model = torch.nn.Linear(2, 2)
    assert ranks.strategy.wrap(model) is model
    assert not torch.distributed.is_initialized()
    assert ranks.decide(lambda: 7) == 7
    with pytest.raises(ConfigError, match="not here"):
        ranks.decide(lambda: _refuse("not here"))


def _refuse(text):
    raise ConfigError(text)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_norm_of_all_gradients_is_that_of_one_vector(dtypes):
    gradients = [torch.full((count,), 2.0, dtype=dtype) for count, dtype in zip((9, 16), dtypes, strict=True)]
    assert Ranks(0, 0, 1, torch.device("cpu")).strategy.total_norm(gradients).item() == 10.0


def test_the_vote_of_one_process_counts_at_once():
    vote = Vote(Ranks(0, 0, 1, torch.device("cpu")))
    assert [vote.cast(wish, not wish) for wish in (False, True)] == [(False, True), (True, False)]


SCRIPT = """
import json, os, sys, time, torch
from dtrain.config.errors import ConfigError
from dtrain.distributed.process_group import set_up
from dtrain.distributed.vote import Vote
ranks = set_up("cpu")
vote = Vote(ranks)
votes = []
for step in range(3000):
    time.sleep(0.0005 * ranks.rank)  # ranks are never equally fast
    votes.append(vote.cast(ranks.rank == 1 and step >= 1000)[0])
    if votes[-1]:
        break
vote.settle()


class Unreadable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def refuse(error):
    raise error


def heard(function):
    try:
        return ranks.decide(function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


decisions = [heard(lambda: f"by {ranks.rank}"), heard(lambda: refuse(ConfigError("no such folder"))),
             heard(lambda: refuse(FileNotFoundError(2, "gone"))), heard(lambda: refuse(Unreadable("this", "that"))),
             heard(lambda: None)]
model = torch.nn.BatchNorm1d(2)
model.running_mean += ranks.rank
ranks.agree_on_buffers(model)
found = {"rank": ranks.rank, "world": ranks.world_size, "threads": torch.get_num_threads(), "votes": votes,
         "sum": ranks.sum_(torch.tensor([1.0 + ranks.rank])).item(), "gathered": ranks.gather(ranks.rank),
         "told": ranks.broadcast(f"from {ranks.rank}"), "decisions": decisions, "mean": model.running_mean.tolist(),
         "wrapped": type(ranks.strategy.wrap(torch.nn.Linear(1, 1))).__name__}
open(f"{sys.argv[1]}/{ranks.rank}.json", "w").write(json.dumps(found))
ranks.close()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Two ranks that torchrun started; the user said nothing of threads."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in (*RANK_NAMES, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "script.py", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=env | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_find_one_another(two_ranks):
    assert [(found["rank"], found["world"]) for found in two_ranks] == [(0, 2), (1, 2)]
    assert [found["sum"] for found in two_ranks] == [3.0, 3.0]
    assert [found["gathered"] for found in two_ranks] == [[0, 1], None]
    assert [found["told"] for found in two_ranks] == ["from 0", "from 0"]
    assert [found["wrapped"] for found in two_ranks] == ["DistributedDataParallel"] * 2


def test_rank_0_decides_or_refuses_and_all_ranks_hear_it_alike(two_ranks):
    decisions = ["by 0", "ConfigError: no such folder", "FileNotFoundError: [Errno 2] gone"]
    first, second = (found["decisions"] for found in two_ranks)
    assert first == [*decisions, "Unreadable: this and that", None]
    assert second == [*decisions, "RuntimeError: Unreadable: this and that", None]


def test_ranks_agree_on_buffers(two_ranks):
    assert [found["mean"] for found in two_ranks] == [[0.0, 0.0], [0.0, 0.0]]


def test_one_ranks_vote_reaches_all_after_the_same_step(two_ranks):
    steps = [len(found["votes"]) for found in two_ranks]
    assert [found["votes"][-1] for found in two_ranks] == [True, True]
    assert steps[0] == steps[1]
    assert 1000 < steps[0] < 3000


def test_each_rank_gets_its_share_of_the_cores(two_ranks):
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [found["threads"] for found in two_ranks] == [share, share]


def test_the_users_number_of_threads_is_kept(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in RANK_NAMES}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "script.py", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "0.json").read_text())["threads"] == 3


def test_two_tasks_of_srun_find_one_another(tmp_path):
    """srun's variables alone, as it sets them for two tasks on one node (measured on SLURM 22.05)."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in RANK_NAMES} | {"PYTHONPATH": str(REPOSITORY)}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    env |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "script.py", str(tmp_path)],
            cwd=tmp_path,
            env=env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors.decode()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(item["rank"], item["world"], item["sum"]) for item in found] == [(0, 2, 3.0), (1, 2, 3.0)]
