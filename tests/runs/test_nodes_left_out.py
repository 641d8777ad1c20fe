"""Nodes that are left out at the next start: the watch and the launcher note them, and a launcher on one refuses."""

import os
from pathlib import Path

import pytest
from conftest import Running
from whole_runs import Place, forked_from, worlds_of

from dtrain.tracking.bad_nodes import bad_nodes, note_bad_node

pytestmark = pytest.mark.slow


def on_two_nodes(place: Place, file: str, **env: str) -> list[Running]:
    """A rank on each of two nodes, which are both this machine."""
    started = []
    for rank, world in enumerate(worlds_of(2)):
        files = place.folder / "output" / f"{file}-{rank}"
        files.mkdir(parents=True)
        path = os.pathsep.join([str(place.folder / "stubs"), os.environ.get("PYTHONPATH", "")])
        full = {**place.env, **world, "PYTHONPATH": path, "SLURMD_NODENAME": f"gpu{rank}", **env}
        started.append(
            Running(["python", "-m", "dtrain", file], place.folder, full, files, place.tagged, forked_from())
        )
    return started


@pytest.mark.parametrize(
    ("name", "do", "reason"),
    [
        ("hung-node", "train 4 rank 1 sleep", "hung: no progress for 15 s; rank 1 is stuck"),
        pytest.param("slow-node", "train all rank 1 lag", "slow: rank 1", marks=pytest.mark.soak),
    ],
)
def test_the_node_of_a_rank_that_hangs_or_is_always_slow_is_noted(
    place: Place, name: str, do: str, reason: str
) -> None:
    changes = {"trainer.log_every_steps": 5, "trainer.max_steps": 60, "loaders.batch_size": 1, "trainer.max_epochs": 20}
    file = place.config(name, **changes, **{"trainer.hang_timeout_seconds": 15})
    results = [rank.result(200) for rank in on_two_nodes(place, file, TOY_DO=do)]
    assert (results[0].rc == 1) == name.startswith("hung"), results[0].text
    found = bad_nodes(place.path(name))
    assert list(found) == ["gpu1"] and reason in found["gpu1"], found


def test_a_launcher_on_a_node_that_is_left_out_says_so(place: Place) -> None:
    file = place.config("left-out")
    note_bad_node(place.path("left-out"), "gpu7", "hung: rank 3")
    (running,) = place.start("launch", file, env={"SLURMD_NODENAME": "gpu7"})
    result = running.result(200)
    assert result.rc == 2 and result.stdout == ""
    assert (
        "gpu7 is left out: 20" in result.stderr
        and "hung: rank 3; remove its line from run-left-out/bad" in result.stderr
    )
    assert sorted(path.name for path in Path(place.path("left-out")).iterdir()) == ["bad-nodes"]
    # Its own disk may be what is wrong with it: its batch job says so, too.
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    srun |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "gpu[7-8]", "SLURM_JOB_ID": "5"}
    env = {**srun, "SLURMD_NODENAME": "gpu8", "DTRAIN_LEFT_OUT": "gpu6,gpu8"}
    (running,) = place.start("launch", file, env=env)
    result = running.result(200)
    assert result.rc == 2, result.text
    assert "dtrain launch: gpu8 is left out: a spare takes its place" in result.stderr, result.text
