"""Trainings as jobs of a real SLURM with two nodes: preempted, out of time, cancelled, off a broken node; and back."""

import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from slurm_cluster import UNDER_WAY, Cluster, cluster_or_skip
from whole_runs import EXACT, Place, close, figures, last, same_training, worlds_of

from dtrain.tracking.bad_nodes import bad_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Data that take their time, so that there is a training to disturb. While a file is there no more of them come: then it
# cannot end before.
SLOW = """
import os, time
from toy import Points

class Slow(Points):
    def __init__(self, seconds=0.0, hold="", **more):
        super().__init__(**more)
        self.seconds, self.hold, self.loaded = seconds, hold, 0

    def __getitem__(self, index):
        self.loaded += 1
        time.sleep(self.seconds)
        while self.loaded > 12 and os.path.exists(self.hold):
            time.sleep(0.05)
        return super().__getitem__(index)
"""
CHANGES = {
    **EXACT, "modules": ["toy", "slow"], "loaders.name": "Slow", "loaders.num_workers": 0, "trainer.pictures": False,
}  # fmt: skip
SOAK = 10


class Jobs:
    """Where trainings are submitted; all share the folder of whole runs."""

    feeds_mlflow = False  # a store for each training

    def __init__(self, cluster: Cluster, place: Place) -> None:
        self.cluster, self.place, self.folder = cluster, place, place.folder
        place.write("slow.py", SLOW)

    def config(self, name: str, **changes: Any) -> Path:
        """Write the config file NAME.yaml; returns its run folder, of which an earlier test's is gone."""
        run = self.place.path(name)
        for old in (run, run.with_name(f"{run.name}.jobs")):
            shutil.rmtree(old, ignore_errors=True)
        self.place.config(name, **{**CHANGES, "mlflow.tracking_uri": f"sqlite:///{self.store(name)}", **changes})
        return run

    def store(self, name: str) -> Path:
        return self.folder / f"{name}.db"

    def held(self, name: str, **changes: Any) -> tuple[Path, Path]:
        """The same of a training that waits in its fourth step until the file is removed."""
        hold = self.folder / f"{name}.hold"
        hold.touch()
        return self.config(name, **{"loaders.hold": str(hold)}, **changes), hold

    def submit(self, *words: str, mlflow: bool = False, **env: str) -> str:
        """The job's number."""
        mlflow = mlflow or self.feeds_mlflow
        command = [sys.executable, "-m", "dtrain", "submit", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self._env(mlflow) | env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()[1].rstrip(":")

    def sbatch(self, *words: str, **env: str) -> str:
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=self.folder,
            env=self._env(False) | env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _env(self, mlflow: bool) -> dict[str, str]:
        stubs = [] if mlflow else [str(self.folder / "stubs")]
        path = f"{Path(sys.executable).parent}:{self.cluster.env['PATH']}"
        return {**self.cluster.env, "PATH": path, "PYTHONPATH": ":".join([*stubs, str(REPOSITORY)])}

    def log(self, run: Path) -> str:
        return "".join(path.read_text() for path in run.with_name(f"{run.name}.jobs").rglob("*.log"))

    def at_step(self, number: str, run: Path, step: int) -> None:
        """Returns once the training has done so many steps."""

        def there(job: dict[str, str]) -> bool:
            assert job["JobState"] in UNDER_WAY, f"{job}\n{self.log(run)}"
            return (run / "metrics.jsonl").exists() and max(figures(run).get("train/loss", {0: 0.0})) >= step

        self.cluster.wait(number, there)

    def undisturbed(self) -> Path:
        """The same training outside of SLURM, on faster data, which nobody disturbed; test_runs.py has it, too."""
        self.place.once("whole", lambda: self.place.run(self.place.config("whole", **EXACT), ranks=2, cold=True).rc)
        return self.place.path("whole")

    def urgent(self) -> None:
        self.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


@pytest.fixture(scope="module")
def jobs(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    cluster = cluster_or_skip(tmp_path_factory.mktemp("slurm") / "c", place.env)
    try:
        yield Jobs(cluster, place)
    finally:
        cluster.stop()


def is_done(jobs: Jobs, number: str, run: Path, restarts: int, most: int | None = None) -> None:
    """The job ended well after so many restarts, and its training as if nobody had disturbed it."""
    job = jobs.cluster.ended(number)
    assert job["JobState"] == "COMPLETED", f"{job}\n{jobs.log(run)}"
    assert restarts <= int(job["Restarts"]) <= (most or restarts), f"{job}\n{jobs.log(run)}"
    facts = json.loads((run / "run.json").read_text())
    assert (facts["state"], facts["world_size"]) == ("FINISHED", 2)
    if jobs.feeds_mlflow:
        with sqlite3.connect(jobs.store(run.name.removeprefix("run-"))) as store:
            assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
            tags = dict(store.execute("select key, value from tags").fetchall())
        assert (tags["SLURM_JOB_ID"], tags.get("SLURM_RESTART_COUNT", "0")) == (number, job["Restarts"])
    same_training(run, jobs.undisturbed())
    assert figures(run) == figures(jobs.undisturbed())


# How a job is disturbed: each returns when its training has resumed and ended


def preempted(jobs: Jobs, name: str, partition: str = "preempt", **options: Any) -> Path:
    run = jobs.config(name, **{"loaders.seconds": 0.2})
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m", "--partition", partition, **options)
    jobs.at_step(number, run, 2)
    jobs.urgent()
    is_done(jobs, number, run, 1)
    return run


def preempted_with_grace(jobs: Jobs, name: str) -> Path:
    """SLURM takes a job that ends in its grace time for done: it has to put itself back."""
    return preempted(jobs, name, "grace")


def out_of_time(jobs: Jobs, name: str) -> Path:
    run, hold = jobs.held(name)
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "2m", "cluster.signal_seconds=20")
    jobs.cluster.wait(number, lambda job: job["Restarts"] == "1")
    hold.unlink()
    is_done(jobs, number, run, 1, most=3)
    return run


def cancelled(jobs: Jobs, name: str) -> Path:
    run = jobs.config(name, **{"loaders.seconds": 0.2})
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m")
    jobs.at_step(number, run, 2)
    jobs.cluster.run("scancel", number)
    job = jobs.cluster.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), job
    facts = json.loads((run / "run.json").read_text())
    assert (facts["state"], facts["reason"]) == ("KILLED", "signal SIGTERM"), facts
    assert last(run).state["step"] == max(figures(run)["train/loss"])
    is_done(jobs, jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m"), run, 0)
    return run


def off_a_node(jobs: Jobs, name: str) -> Path:
    """A node is drained, which lets its job continue, then fails; the job waits until it is back."""
    run = jobs.config(name, **{"loaders.seconds": 0.2})
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m")
    jobs.at_step(number, run, 1)
    jobs.cluster.run("scontrol", "update", f"nodename={jobs.cluster.nodes[1]}", "state=drain", "reason=test")
    jobs.at_step(number, run, 2)
    jobs.cluster.run("scontrol", "update", f"nodename={jobs.cluster.nodes[1]}", "state=down", "reason=test")
    jobs.cluster.wait(number, lambda job: job["Restarts"] == "1" and job["JobState"] == "PENDING")
    jobs.cluster.run("scontrol", "update", f"nodename={jobs.cluster.nodes[1]}", "state=resume")
    is_done(jobs, number, run, 1)
    return run


def requeued(jobs: Jobs, name: str) -> Path:
    """By hand, as an administrator may."""
    run = jobs.config(name, **{"loaders.seconds": 0.2})
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m")
    jobs.at_step(number, run, 2)
    jobs.cluster.run("scontrol", "requeue", number)
    is_done(jobs, number, run, 1)
    return run


def without_power(jobs: Jobs, name: str, node: int = 1) -> Path:
    """A node is gone, of which SLURM knows nothing until it is missed; later it is switched on again."""
    if not jobs.cluster.namespaces:
        pytest.skip("SKIPPED, NOT TESTED HERE: nodes without namespaces have no processes of their own")
    run = jobs.config(name, **{"loaders.seconds": 0.2})
    number = jobs.submit(f"{name}.yaml", "--nodes", "2", "--time", "10m")
    jobs.at_step(number, run, 2)
    lost = jobs.cluster.nodes[node]
    jobs.cluster.lose(lost)
    try:
        jobs.cluster.wait(number, lambda job: job["Restarts"] == "1" and job["JobState"] == "PENDING")
    finally:
        jobs.cluster.start(lost)
    is_done(jobs, number, run, 1)
    return run


def without_first_node(jobs: Jobs, name: str) -> Path:
    """The one with the batch script, rank 0 and the rendezvous."""
    return without_power(jobs, name, node=0)


HOW = [preempted, preempted_with_grace, out_of_time, cancelled, off_a_node, requeued, without_power, without_first_node]


@pytest.mark.soak
@pytest.mark.parametrize("time", range(SOAK))
@pytest.mark.parametrize("how", HOW)
def test_a_disturbed_job_ends_as_if_nothing_had_been(jobs: Jobs, how: Callable[[Jobs, str], Path], time: int) -> None:
    """The first time with a real MLflow, in which it is one run."""
    jobs.feeds_mlflow = time == 0
    try:
        how(jobs, f"slurm-{how.__name__}-{time}")
    finally:
        jobs.feeds_mlflow = False


def test_a_preempted_job_resumes_in_its_run_with_the_code_it_was_submitted_with(jobs: Jobs) -> None:
    code = jobs.folder / "edited.py"
    code.write_text(SLOW)
    store = f"sqlite:///{jobs.folder}/slurm.db"
    run, hold = jobs.held("slurm-fast", modules=["toy", "edited"], **{"mlflow.tracking_uri": store})
    jobs.undisturbed()
    number = jobs.submit("slurm-fast.yaml", "--nodes", "2", "--time", "10m", "--partition", "preempt", mlflow=True)
    code.write_text("an edit that the job is not to see")
    jobs.at_step(number, run, 2)
    jobs.urgent()
    jobs.cluster.wait(number, lambda job: job["Restarts"] == "1")
    hold.unlink()
    is_done(jobs, number, run, 1)
    with sqlite3.connect(jobs.folder / "slurm.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        tags = dict(store.execute("select key, value from tags").fetchall())
    assert (tags["SLURM_JOB_ID"], tags["SLURM_RESTART_COUNT"], tags["world_size"]) == (number, "1", "2")


def test_a_failing_config_and_a_crash_are_not_requeued(jobs: Jobs) -> None:
    scripts = REPOSITORY / "scripts" / "cluster"
    for script in scripts.glob("*.sbatch"):
        jobs.cluster.run("sbatch", "--test-only", "--array=0", str(script))
    wrong = jobs.config("slurm-wrong", optimizer={"name": "AdamW", "lr": "much"})
    crash = jobs.config("slurm-crash")
    numbers = {
        "wrong": jobs.sbatch(
            f"--output={wrong}.log", str(scripts / "slurm-node.sbatch"), "slurm-wrong.yaml", str(wrong)
        ),
        "crash": jobs.sbatch(
            "--nodes=2", "--ntasks-per-node=1", "--time=10", f"--output={crash}.log",
            str(scripts / "slurm-srun.sbatch"), "slurm-crash.yaml", str(crash), TOY_DO="train 5 rank 0 KILL",
        ),
    }  # fmt: skip
    for name, status in (("wrong", "2:0"), ("crash", "137:0")):
        job = jobs.cluster.ended(numbers[name])
        assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", status), job
    assert "optimizer.lr: expected float" in Path(f"{wrong}.log").read_text()
    assert "learning rate" in Path(f"{crash}.log").read_text()  # what was printed before a kill is there


# Stands for `dtrain doctor --preflight --note-bad-nodes`.
LOOK = """[ "$SLURMD_NODENAME" != {node} ] || {{ echo "{node}  {found}" >> {note}; exit 1; }}"""
FOUND = "2026-11-29 11:00:00  preflight: broken"


def test_a_node_that_is_found_bad_is_left_out_at_the_next_start(jobs: Jobs) -> None:
    """Where others can take its place; else the job ends, and says so."""
    first, other = jobs.cluster.nodes
    run = jobs.folder / "run-slurm-bad"
    run.mkdir(exist_ok=True)
    note, done = run / "bad-nodes", jobs.folder / "slurm-bad.done"
    note.unlink(missing_ok=True)
    look = shlex.quote(LOOK.format(node=first, found=FOUND, note=shlex.quote(str(note))))
    job = [shlex.quote(sys.executable), "-m", "dtrain", "job", f"--run-folder={shlex.quote(str(run))}"]
    job += ['--requeue="scontrol requeue $SLURM_JOB_ID"', "--preflight=srun --preflight=sh --preflight=-c"]
    job += [f"--preflight={look}", f"-- srun sh -c 'hostname >> {shlex.quote(str(done))}'"]
    script = jobs.folder / "slurm-bad.sh"
    script.write_text(f"#!/bin/bash\nexec {' '.join(job)}\n")
    options = ("--requeue", "--open-mode=append", "--time=10")
    one = jobs.sbatch("--nodes=1", *options, f"--output={run}.log", str(script))
    ended = jobs.cluster.ended(one)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", first), ended
    assert f"{first} is left out from now on: {FOUND}" in Path(f"{run}.log").read_text()
    assert done.read_text().splitlines() == [other] or not jobs.cluster.namespaces
    both = jobs.sbatch("--nodes=2", *options, f"--output={run}-2.log", str(script))
    ended = jobs.cluster.ended(both)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "1:0"), ended
    log = Path(f"{run}-2.log").read_text()
    assert f"bad-nodes names {first}; too few nodes are left to go without: ended" in log, log


@pytest.mark.soak
def test_an_array_trains_each_of_its_overrides(jobs: Jobs) -> None:
    array = jobs.config("slurm-array", **{"trainer.max_epochs": 1})
    both = jobs.submit("slurm-array.yaml", "--time", "10m", "--array", "seed=1", "--array", "seed=2 optimizer.lr=0.5")
    for index in range(2):
        assert jobs.cluster.ended(f"{both}_{index}")["JobState"] == "COMPLETED", jobs.log(array)
        run = array.with_name(f"{array.name}-{index}")
        assert json.loads((run / "run.json").read_text())["state"] == "FINISHED"
    assert figures(array.with_name(f"{array.name}-0")) != figures(array.with_name(f"{array.name}-1"))


@pytest.mark.soak
def test_one_task_of_an_array_is_put_back_alone(jobs: Jobs) -> None:
    array, hold = jobs.held("slurm-tasks")
    both = jobs.submit("slurm-tasks.yaml", "--time", "10m", "--array", "seed=1", "--array", "seed=2")
    tasks = [f"{both}_{index}" for index in range(2)]
    for index, task in enumerate(tasks):
        jobs.at_step(task, array.with_name(f"{array.name}-{index}"), 2)
    # The number of one of them is the array's own, and would stand for both.
    tasks.sort(key=lambda task: jobs.cluster.job(task)["JobId"] != both)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", tasks[0])
    jobs.cluster.wait(tasks[0], lambda job: job["Restarts"] == "1" and job["JobState"] == "RUNNING")
    hold.unlink()
    ends = [jobs.cluster.ended(task) for task in tasks]
    found = [(job["JobState"], job["Restarts"]) for job in ends]
    assert found == [("COMPLETED", "1"), ("COMPLETED", "0")], jobs.log(array)


@pytest.mark.soak
def test_a_job_resumes_on_another_number_of_nodes(jobs: Jobs) -> None:
    changes = {"model.dropout": 0.0, "model.norm": False, "loaders.seconds": 0.2, "trainer.accumulate": 1}
    changes |= {"loaders.global_batch_size": 4, "loaders.batch_size": None}
    whole = jobs.config("slurm-two", **changes)
    jobs.place.run("train", "slurm-two.yaml", ranks=2)
    run = jobs.config("slurm-fewer", **changes)
    number = jobs.submit("slurm-fewer.yaml", "--nodes", "1-2", "--time", "10m")
    jobs.at_step(number, run, 2)
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    for state in ("drain", "down"):  # drained, since a node that is only down comes back by itself
        jobs.cluster.run("scontrol", "update", f"nodename={jobs.cluster.nodes[1]}", f"state={state}", "reason=test")
    try:
        assert jobs.cluster.ended(number)["Restarts"] == "1"
    finally:
        jobs.cluster.run("scontrol", "update", f"nodename={jobs.cluster.nodes[1]}", "state=resume")
    facts = json.loads((run / "run.json").read_text())
    assert (facts["state"], facts["world_size"]) == ("FINISHED", 1), jobs.log(run)
    close(figures(run), figures(whole))


ELASTIC = """#!/bin/bash
srun --no-kill --kill-on-bad-exit=0 --wait=0 --output={log}.%N dtrain launch \\
    {config} --nnodes 1:2 --nproc-per-node 1 --rdzv-endpoint "$(hostname):{port}"
"""


@pytest.mark.soak
def test_a_job_continues_without_a_node_that_has_lost_its_power(jobs: Jobs) -> None:
    """`--no-kill`: the job lives on with the node of its batch script; each step is that of an undisturbed training."""
    if not jobs.cluster.namespaces:
        pytest.skip("SKIPPED, NOT TESTED HERE: nodes without namespaces have no processes of their own")
    changes = {"model.dropout": 0.0, "model.norm": False, "trainer.max_epochs": 20, "loaders.seconds": 0.0}
    whole = jobs.config("slurm-both", **changes)
    jobs.place.run("train", "slurm-both.yaml", ranks=2)
    run = jobs.config("slurm-elastic", **changes | {"loaders.seconds": 0.05})
    script = jobs.place.folder / "elastic.sbatch"
    port = worlds_of(1)[0]["MASTER_PORT"]
    script.write_text(ELASTIC.format(log=f"{run}.log", config="slurm-elastic.yaml", port=port))
    number = jobs.sbatch(
        "--no-kill", "--nodes=2", "--ntasks-per-node=1", "--time=20", f"--output={run}.log", str(script)
    )
    jobs.at_step(number, run, 4)
    lost = jobs.cluster.nodes[1]
    jobs.cluster.lose(lost)
    try:
        job = jobs.cluster.ended(number, 600)
    finally:
        jobs.cluster.start(lost)
    said = "".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}.log*")))
    facts = json.loads((run / "run.json").read_text())
    assert (facts["state"], facts["world_size"], facts["batch_ranks"], job["Restarts"]) == ("FINISHED", 1, 2, "0"), said
    assert "a node is lost" in said and "dtrain launch: 1 node(s), 1 rank(s)" in said
    close(figures(run), figures(whole))


@pytest.mark.soak
def test_a_spare_takes_the_place_of_a_node_that_has_lost_its_power(jobs: Jobs) -> None:
    """`dtrain submit --spares`: the job is neither ended nor requeued, and ends as its training does."""
    if not jobs.cluster.namespaces:
        pytest.skip("SKIPPED, NOT TESTED HERE: nodes without namespaces have no processes of their own")
    run = jobs.config("slurm-spare", **{"loaders.seconds": 0.2, "trainer.checkpoint_every_steps": 1})
    number = jobs.submit("slurm-spare.yaml", "--spares", "1", "--time", "20m", mlflow=True)
    ready = "1 node(s) are at work; {} is a spare, and ready"
    jobs.at_step(number, run, 2)
    first, other = jobs.cluster.nodes
    jobs.cluster.wait(number, lambda _: any(ready.format(node) in jobs.log(run) for node in (first, other)))
    jobs.cluster.lose(other)  # the one that trains, where the first one was slower to come
    try:
        job = jobs.cluster.ended(number, 600)
    finally:
        jobs.cluster.start(other)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "0", "0:0"), f"{job}\n{jobs.log(run)}"
    assert json.loads((run / "run.json").read_text())["state"] == "FINISHED"
    whole = jobs.config("slurm-alone")
    jobs.place.run("train", "slurm-alone.yaml")
    assert figures(run) == figures(whole)
    with sqlite3.connect(jobs.store("slurm-spare")) as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.soak
@pytest.mark.parametrize(("nodes", "spares"), [(2, 0), (1, 1)], ids=["none to spare", "a spare"])
def test_a_preflight_leaves_out_a_node_that_does_not_see_the_run_folder(jobs: Jobs, nodes: int, spares: int) -> None:
    """`dtrain submit --preflight`: first on sound nodes; then one node has another disk in the run folder's place."""
    if not jobs.cluster.namespaces:
        pytest.skip("SKIPPED, NOT TESTED HERE: nodes without namespaces see the same files")
    name = f"slurm-preflight-{spares}"
    run = jobs.config(name, **{"trainer.max_epochs": 1})
    words = (f"{name}.yaml", "--preflight", "--nodes", str(nodes), "--spares", str(spares), "--time", "20m")
    job = jobs.cluster.ended(jobs.submit(*words), 400)
    assert job["JobState"] == "COMPLETED" and "all nodes are good" in jobs.log(run), f"{job}\n{jobs.log(run)}"
    run = jobs.config(name, **{"trainer.max_epochs": 1})
    run.mkdir()
    other = jobs.cluster.nodes[1]
    slurmd = (jobs.cluster.folder / f"slurmd.{other}.pid").read_text().strip()
    inside = ["nsenter", f"--mount=/proc/{slurmd}/ns/mnt"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(run)], check=True, timeout=200)
    try:
        job = jobs.cluster.ended(jobs.submit(*words), 400)
    finally:
        subprocess.run([*inside, "umount", "-l", str(run)], check=True, timeout=200)
    log = jobs.log(run)
    assert job["Restarts"] == "0" and f"{run} is not the disk of the first node" in log, log
    assert list(bad_nodes(run)) == [other], log
    if spares:
        assert job["JobState"] == "COMPLETED", log
        assert f"{other} is left out: a spare takes its place" in log
        assert json.loads((run / "run.json").read_text())["state"] == "FINISHED"
    else:
        assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), log
        assert f"bad-nodes names {other}; too few nodes are left to go without: ended" in log
        assert not (run / "run.json").exists()


@pytest.mark.soak
@pytest.mark.parametrize("name", ["slurm-node", "slurm-nodes", "slurm-srun"])
def test_the_scripts_train(jobs: Jobs, name: str) -> None:
    run = jobs.config(f"{name}-script")
    more = {"slurm-node": [], "slurm-nodes": ["--nodes=2"], "slurm-srun": ["--nodes=2", "--ntasks-per-node=1"]}[name]
    number = jobs.sbatch(*more, "--time=10", f"--output={run}.log", script(name), f"{name}-script.yaml", str(run))
    assert jobs.cluster.ended(number)["JobState"] == "COMPLETED", Path(f"{run}.log").read_text()
    assert json.loads((run / "run.json").read_text())["world_size"] == (2 if more else 1)
    if more:
        same_training(run, jobs.undisturbed())


def script(name: str) -> str:
    return str(REPOSITORY / "scripts" / "cluster" / f"{name}.sbatch")


@pytest.mark.soak
def test_the_script_for_several_configs_trains_each(jobs: Jobs) -> None:
    names = ["slurm-first", "slurm-second"]
    for seed, name in enumerate(names):
        jobs.config(name, seed=seed, **{"trainer.max_epochs": 1})
    log = f"{jobs.folder}/slurm-configs-%a.log"
    files = [f"{name}.yaml" for name in names]
    number = jobs.sbatch("--array=0-1", "--time=10", f"--output={log}", script("slurm-array"), *files)
    runs = [jobs.folder / "runs" / name for name in names]
    for index, run in enumerate(runs):
        assert jobs.cluster.ended(f"{number}_{index}")["JobState"] == "COMPLETED", Path(
            log.replace("%a", str(index))
        ).read_text()
        assert json.loads((run / "run.json").read_text())["state"] == "FINISHED"
    assert figures(runs[0]) != figures(runs[1])


@pytest.mark.soak
def test_the_doctor_sees_the_nodes_of_a_job(jobs: Jobs) -> None:
    words = ["--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "dtrain", "doctor", "--json"]
    env = jobs._env(True)
    done = subprocess.run(["srun", *words], cwd=jobs.folder, env=env, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    found = {one["probe"]: one for one in report["findings"]}
    assert (done.returncode == 0) == report["ok"], done.stderr
    assert "of 2 nodes)" in found["disk"]["found"] and "2 ranks, gloo" in found["all-reduce"]["found"], done.stdout
    assert found["clocks"]["status"] == "ok" and found["mlflow"]["status"] == "ok", done.stdout
