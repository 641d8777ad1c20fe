"""Ranks: what launchers say, which device, how many threads, and that nobody trains alone by accident."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from whole_runs import Place, close, figures

from dtrain.config.errors import ConfigError
from dtrain.distributed.ddp import DDP, ddp_options
from dtrain.distributed.device import choose_device
from dtrain.distributed.environment import Environment, environment, export_rank_variables
from dtrain.distributed.process_group import set_up
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.vote import Vote
from dtrain.tracking.run_folder import read_run

REPOSITORY = Path(__file__).resolve().parents[2]
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_ranks():
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "OMPI_", "PMI")) or name in RANK_NAMES:
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


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
        # as Open MPI 5.0.11 and MPICH's Hydra set them (seen); mpirun may have started its daemons by srun
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "3",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"},
            Environment(3, 1, 4, 2, "mpirun"),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Environment(1, 1, 2, 2, "mpirun"),
        ),
        (
            {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"},
            Environment(5, 1, 8, 4, "mpirun"),
        ),
        # srun with PMI-2 or PMIx; its own variables say more
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "PMI_RANK": "1", "PMI_SIZE": "2",
             "PMIX_RANK": "1"},
            Environment(1, 1, 2, 2, "srun"),
        ),
        # torchrun inside of mpirun, whose one task on the node it is
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
             "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            Environment(3, 1, 4, 2, "torchrun"),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, Environment()),
        ({"RANK": "", "WORLD_SIZE": ""}, Environment()),  # a template's
        ({"RANK": "0"}, Environment()),
        ({"WORLD_SIZE": "1"}, Environment()),
    ],
)  # fmt: skip
def test_a_rank_finds_its_place(monkeypatch, variables, expected):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment() == expected


ALL = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, but WORLD_SIZE is 4: expected 0 to 3"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK is -1, but WORLD_SIZE is 4"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero', which is not an integer"),
        ({"RANK": "zero"}, "RANK is 'zero', which is not an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', which is not an integer"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0: expected 1 or more"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is -2: expected 1 or more"),
        ({**ALL, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2: expected 0 to 1"),
        ({**ALL, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is not an integer"),
        ({**ALL, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is 1, but the number of ranks is in no variable that is known; set RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set; set RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is 3, but the number of ranks is in no variable that is known"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_RANK is 0, but the rank's number on its node is in no variable"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is 1, but the rank's"),
        ({"SLURM_STEP_NUM_TASKS": "two", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 'two', which is not"),
    ],
)  # fmt: skip
def test_variables_that_contradict_one_another_are_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        environment()
    assert message in str(error.value)


MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


def test_ranks_of_mpirun_meet_on_their_node_or_where_the_user_says(monkeypatch):
    for name, value in (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-vm-22602@1"}).items():
        monkeypatch.setenv(name, value)
    (note,) = export_rank_variables(environment())
    port = int(os.environ["MASTER_PORT"])
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 20000 <= port < 30000
    assert note.startswith(f"4 ranks of mpirun meet at 127.0.0.1:{port}; ")
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-vm-22603@1")
    monkeypatch.delenv("MASTER_PORT")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    export_rank_variables(environment())
    assert int(os.environ["MASTER_PORT"]) != port, "two jobs on one node"


def test_ranks_of_mpirun_on_several_nodes_need_an_address(monkeypatch):
    for name, value in (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"4 ranks on several nodes, and MASTER_ADDR is not .*mpirun -x"):
        environment()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert "meet at node1:29500" in export_rank_variables(environment())[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANK is 1 of WORLD_SIZE 2, but MASTER_ADDR is not set, which says where the ranks meet"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not an integer"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_meet_are_one_line_and_status_2(place: Place, variables, message):
    env = {"RANK": "1", "WORLD_SIZE": "2", **variables}
    result = place.start(place.config("no-meeting"), env=env)[0].result(200)
    assert result.rc == 2 and "Traceback" not in result.text, result.text
    assert [message in line for line in result.stderr.splitlines()].count(True) == 1, result.text


def test_the_processes_of_mpirun_are_one_training(place: Place):
    """With the variables that Open MPI sets, and nothing else."""
    file = place.config("mpirun", **{"trainer.max_epochs": 1})
    alone = place.config("mpirun-alone", **{"trainer.max_epochs": 1, "loaders.batch_size": 8})
    started = []
    for rank in range(2):
        env = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
               "OMPI_COMM_WORLD_LOCAL_SIZE": 2, "PMIX_NAMESPACE": f"test-{os.getpid()}@1"}  # fmt: skip
        started += place.start(file, env={name: str(value) for name, value in env.items()})
    results = [running.result(200) for running in started]
    assert [result.rc for result in results] == [0, 0], "".join(result.text for result in results)
    assert read_run(place.path("mpirun"))["world_size"] == 2
    assert "2 ranks of mpirun meet at 127.0.0.1:" in results[0].text
    place.run(alone)
    close(figures(place.path("mpirun")), figures(place.path("mpirun-alone")))


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
        ("cuda", Environment(3, 3, 4, 4, "mpirun"), 1, None, "cuda:0", None),
        (["cuda:0", "cpu"], ONE, 1, None, "cuda:0", "one process on cuda:0"),
        (
            ["cuda:0", "cpu"],
            ONE,
            0,
            None,
            "cpu",
            f"'cuda:0' was asked for, but torch {torch.__version__} sees no GPU; one process on the CPU",
        ),
        (
            ["cuda:3", "cuda:1", "cpu"],
            ONE,
            2,
            None,
            "cuda:1",
            "'cuda:3' was asked for, but there are 2 GPU(s): cuda:0 to cuda:1; one process on cuda:1; 1 more idle, "
            "torchrun --nproc_per_node=2 uses all",
        ),
        (
            ["cuda:0", "cpu"],
            FOUR,
            4,
            None,
            "cuda:3",
            "device cuda:0: with several ranks each takes the GPU of its LOCAL_RANK",
        ),
        (["cuda:0", "cpu"], FOUR, 0, None, "cpu", f"'cuda:0' was asked for, but torch {torch.__version__} sees no GPU"),
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
        (
            ["cuda:0", "cpu"],
            FOUR,
            1,
            r"4 ranks on this node, but 1 GPU\(s\)",
        ),  # a mistake, not a device that is missing
        (
            ["cuda:1", "mps"],
            ONE,
            1,
            r"'cuda:1' was asked for.*; 'mps' was asked for, but this torch sees none; possible",
        ),
        ("mps", ONE, 0, "'mps' was asked for, but this torch sees none"),
    ],
)
def test_a_device_that_is_not_there_is_refused(wish, found, gpus, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(wish, found, gpus)


@pytest.mark.slow
def test_a_script_between_launcher_and_rank_that_gives_each_a_gpu(monkeypatch):
    """As `--gpu-bind=closest`, under launchers whose variables do not say so: LOCAL_RANK 3 is beyond what it sees."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")
    code = """
from dtrain.distributed.device import choose_device
from dtrain.distributed.environment import Environment
print(choose_device("cuda", Environment(3, 3, 4, 4, "torchrun"), 1))
"""
    for own, is_refused in ((mine or "0", True), ("GPU-3", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine or "0")
        runner = f"import os, subprocess, sys; os.environ['CUDA_VISIBLE_DEVICES'] = {own!r}; "
        runner += f"sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
        done = subprocess.run(
            [sys.executable, "-c", runner], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
        )
        assert ("4 ranks on this node, but 1 GPU(s)" in done.stderr) is is_refused, done.stderr
        assert ("(device(type='cuda', index=0), [])" in done.stdout) is not is_refused, done.stderr


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


@pytest.mark.slow
def test_gradients_are_compressed_by_torchs_own_hooks():
    """In a group of one rank, which has all that a wrapper needs."""
    names = {"fp16": "fp16_compress_hook", "power_sgd": "powerSGD_hook", "batched_power_sgd": "batched_powerSGD_hook"}
    assert {*names, "no", "bf16"} == set(get_args(get_args(get_type_hints(ddp_options)["comm_hook"])[0]))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks(0, 0, 2, torch.device("cpu"))  # of one, no model is wrapped
        for name, hook in names.items():
            wrapped = DDP(ranks, {"comm_hook": name, "bucket_cap_mb": 3}).wrap(torch.nn.Linear(2, 2))
            assert [found.__name__ for found, _ in wrapped._comm_hooks] == [hook]
            assert wrapped.bucket_bytes_cap == 3 * 1024 * 1024
        with pytest.raises(TypeError, match="BF16"):  # which gloo cannot
            DDP(ranks, {"comm_hook": "bf16"}).wrap(torch.nn.Linear(2, 2))
        assert DDP(ranks, {"comm_hook": "no"}).wrap(torch.nn.Linear(2, 2))._comm_hooks == []
    finally:
        torch.distributed.destroy_process_group()


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
         "wrapped": type(ranks.strategy.wrap(torch.nn.Linear(1, 1))).__mro__[1].__name__}
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
        command, cwd=folder, env=env | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_users_number_of_threads_is_kept(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in RANK_NAMES}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "script.py", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "0.json").read_text())["threads"] == 3


@pytest.mark.slow
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
        _, errors = task.communicate(timeout=200)
        assert task.returncode == 0, errors.decode()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(item["rank"], item["world"], item["sum"]) for item in found] == [(0, 2, 3.0), (1, 2, 3.0)]
