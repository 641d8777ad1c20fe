"""`dtrain submit` without a batch system: the script, its quoting, the copy of the code; and what the script runs.

The real SLURM is in test_slurm.py.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, RunCli
from whole_runs import TOY, write_config

from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.launch import submit as submitting
from dtrain.launch.batch_script import BODY, Job
from dtrain.launch.submit import submit
from dtrain.tracking.git_state import capture_code

SCRIPTS = sorted((REPOSITORY / "scripts" / "cluster").glob("*.s*"))
FAKE_SBATCH = '#!/bin/sh\nprintf "%s\\n" "$@" >> sbatch.args\necho 42\n'


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, where sbatch takes every job."""
    shutil.copy(TOY, tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "sbatch", FAKE_SBATCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    write_config(tmp_path, "toy", {"trainer.checkpoint_dir": "runs/toy"})
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def directives(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.M)


def job_folder(workspace: Path, name: str = "toy") -> Path:
    (folder,) = (path for path in (workspace / "runs" / f"{name}.jobs").iterdir() if path.is_dir())
    return folder


# The script


def test_dry_run_prints_a_script_and_writes_nothing(workspace: Path, run_cli: RunCli) -> None:
    before = sorted(workspace.rglob("*"))
    words = ["submit", "toy.yaml", "--nodes", "2", "--gpus-per-node", "4", "--time", "12:00:00", "--dry-run"]
    done = run_cli([*words, "--partition", "gpu", "optimizer.lr=0.5"], cwd=workspace)
    assert done.rc == 0, done.text
    assert [path for path in workspace.rglob("*") if path not in before and "__pycache__" not in path.parts] == []
    assert directives(done.stdout) == [
        "--job-name=toy", "--nodes=2", "--gpus-per-node=4", "--time=0-12:00:00",
        "--partition=gpu", "--signal=B:USR1@180", "--requeue", "--open-mode=append",
    ]  # fmt: skip
    assert BODY in done.stdout and "\nranks=4 " in done.stdout
    (workspace / "job.sbatch").write_text(done.stdout)
    assert complaints([workspace / "job.sbatch"]) == ""


def test_spares_are_asked_for_beside_the_nodes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job with spares outlives a node, and its step waits for the rest without end."""
    cases = (
        ("2", 1, "3", "--nnodes 2 --spares 1"),
        ("2-4", 2, "4-6", "--nnodes 4 --spares 2"),
        ("3", 0, "3", "--nnodes 3 --spares 0"),
    )
    for nodes, spares, asked, words in cases:
        assert submit("toy.yaml", [], {"nodes": nodes, "spares": spares}, dry_run=True) == 0
        text = capsys.readouterr().out
        assert f"--nodes={asked}" in directives(text) and ("--no-kill" in directives(text)) == bool(spares)
        printer = workspace / "bin" / "printer"
        write_program(printer, '#!/bin/sh\necho "$@"\n')
        (workspace / "job.sbatch").write_text(re.sub("^python=.*", f"python={printer}", text, flags=re.M))
        write_program(workspace / "bin" / "scontrol", "#!/bin/sh\necho node1\n")
        node = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": asked.rpartition("-")[2]}
        inherited = {"spares": "9", "preflight": "yes"}  # of the shell that submits
        done = subprocess.check_output(
            ["bash", workspace / "job.sbatch"], env={**os.environ, **node, **inherited}, text=True, timeout=200
        )
        assert words in done, done
        assert (" --wait=0 --no-kill " in done, " --wait=600 " in done) == (bool(spares), not spares), done
        assert f" --spares {spares} -- srun" in done and "preflight" not in done


def complaints(scripts: list[Path]) -> str:
    """What bash and shellcheck say against scripts; that in quotes something looks like an expansion is meant."""
    found = [subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr for script in scripts]
    if shutil.which("shellcheck"):
        command = ["shellcheck", "--exclude=SC2016", *scripts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        found += [done.stdout, done.stderr]
    return "".join(found)


def test_the_scripts_for_clusters_are_clean_and_hold_what_submit_writes() -> None:
    assert {path.name for path in SCRIPTS} == {
        *("slurm-node.sbatch", "slurm-nodes.sbatch", "slurm-srun.sbatch", "slurm-array.sbatch", "pbs.sh", "lsf.sh")
    }
    assert complaints(SCRIPTS) == ""
    assert (REPOSITORY / "scripts" / "cluster" / "slurm-nodes.sbatch").read_text().endswith(BODY)
    if not shutil.which("shellcheck"):
        pytest.skip("SKIPPED, NOT TESTED HERE: bash alone has looked at the scripts (apt-get install shellcheck)")


def test_the_kubernetes_job_runs_what_the_scripts_run() -> None:
    job = yaml.safe_load((REPOSITORY / "scripts" / "cluster" / "kubernetes.yaml").read_text())
    for role in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = role["template"]["spec"]["containers"]
        given = {item["name"] for item in container["env"]}
        assert {"MLFLOW_DISABLE_TELEMETRY", "OMP_NUM_THREADS", "CONFIG", "RUN_FOLDER"} <= given
        words = container["command"]
        assert words[:4] == ["python", "-m", "dtrain", "job"] and role["restartPolicy"] == "ExitCode"
        line = words[words.index("-c") + 1]
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True).stderr == ""
        assert set(re.findall(r"\$\{?(\w+)", line)) - given == {"MASTER_ADDR", "MASTER_PORT"}


def test_settings_stand_in_the_config_and_options_win(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"nodes": "1-2", "time": "1.5h", "account": "lab", "mem_per_node": "64G", "cpus_per_node": 16}
    write_config(workspace, "toy", {"cluster": cluster, "run_name": "Größe 1; x"})
    assert submit("toy.yaml", [], {"time": "2d", "qos": "high", "nproc_per_node": 3}, dry_run=True) == 0
    printed = capsys.readouterr().out
    expected = ["--nodes=1-2", "--time=2-00:00:00", "--account=lab", "--qos=high", "--mem=64G", "--cpus-per-task=16"]
    assert set(expected) < set(directives(printed))
    assert "\nranks=3 " in printed and directives(printed)[0] == "--job-name=Gr_e_1_x"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nodes", "0", "expected a number of nodes, or a range such as 1-2, found string '0'"),
        ("nodes", "3-2", "expected a number of nodes"),
        ("time", "12", "expected a unit, such as 90m or 01:30:00"),
        ("time", "12:00", "expected 12:00:00, 90m"),
        ("partition", "a b", "expected a plain word"),
        ("partition", "gpu\n#SBATCH --uid=0", "expected a plain word"),
        ("account", "$(touch marker)", "expected a plain word"),
        ("mem_per_node", "-1", "expected a plain word"),
        ("gpus_per_node", -1, "must be at least 0"),
        ("partitions", "gpu", "did you mean 'partition'?"),
        ("array", ["optimizer.lr='1"], "No closing quotation; expected KEY=VALUE words"),
        ("array", ["trainer.checkpoint_dir=runs/x"] * 2, "several jobs would write"),
        ("array", ["optimizer.lr=1", "optimiser.lr=1"], "did you mean 'optimizer'"),
    ],
)
def test_what_cannot_be_submitted_is_refused(workspace: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        submit("toy.yaml", [], {key: value})
    assert any(message in str(wrong) for wrong in caught.value.mistakes), caught.value.mistakes
    assert not (workspace / "runs").exists()


# Names and paths that are meant to break out

NASTY = [
    "$(touch MARKER)", "`touch MARKER`", "'; touch MARKER; '", '"; touch MARKER; "', "; touch MARKER #", "\n", "\t",
    " ",
    "\\", "'", '"', "|touch MARKER", "&&touch MARKER", ">MARKER", "${IFS}", "$PATH", "!", "*", "?", "[a-z]", "~", "%j",
    "%", "-rf", "--wrap=touch MARKER", "\n#SBATCH --uid=0\n", "#", "(", ")", "{a,b}", "é", "文", "\u202e", "\x1b[31m",
    ":", ",", "=", "..", "a" * 60, "$'\\n'", "EOF", "\r", "<(touch MARKER)", "$((1+1))", "name",
]  # fmt: skip


@pytest.mark.slow
def test_no_name_or_path_breaks_out_of_200_scripts(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    python = workspace / "a python's $(touch MARKER) \" place" / "python"
    python.parent.mkdir()
    write_program(python, '#!/bin/sh\nprintf "%s\\0" "$@" > "$ARGS"\n')
    write_program(workspace / "bin" / "scontrol", "#!/bin/sh\necho node1\n")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(submitting, "check", lambda config, purpose: None)  # it has tests of its own, and takes a while
    scripts: dict[Path, Job] = {}
    refused = 0
    while len(scripts) + refused < 200:
        text = "".join(chance.choices(NASTY, k=chance.randint(1, 5)))
        key = chance.choice(["experiment", "run_name", "trainer.checkpoint_dir", "cluster.partition", "cluster.array"])
        value: Any = f"runs/{text}" if key == "trainer.checkpoint_dir" else [text] if key == "cluster.array" else text
        try:
            job, _ = submitting._plan("toy.yaml", [f"{key}={json.dumps(value)}"])
        except ConfigError:
            refused += 1
            continue
        script = workspace / f"{len(scripts)}.sbatch"
        script.write_text(submitting.script(job))
        scripts[script] = job
    assert len(scripts) > 80 and refused > 15
    assert complaints(list(scripts)) == ""
    env = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "ARGS": str(workspace / "args"),
    }
    for script, job in scripts.items():
        known = {"--job-name", "--nodes", "--partition", "--signal", "--requeue", "--open-mode"}
        assert {line.partition("=")[0] for line in directives(script.read_text())} <= known
        subprocess.run(["bash", script], check=True, cwd=workspace, env={**os.environ, **env}, timeout=200)
        words = (workspace / "args").read_bytes().decode().split("\0")[:-1]
        assert words[:5] == ["-m", "dtrain", "job", "--run-folder", str(job.run_folders[0])]
        launch = words.index("launch")
        assert words[launch - 3 : launch + 2] == [str(python), "-m", "dtrain", "launch", str(next(iter(job.configs)))]
        assert words[-1] == "7.0"
    assert list(workspace.rglob("MARKER*")) == []


def test_a_strange_folder_becomes_the_jobs_and_nothing_more(workspace: Path) -> None:
    place = "runs/it's $(touch MARKER); 100% `x`"
    assert submit("toy.yaml", [f"trainer.checkpoint_dir={json.dumps(place)}"], {}) == 0
    (folder,) = Path(f"{place}.jobs").iterdir()
    words = (workspace / "sbatch.args").read_text().splitlines()
    assert words == [
        "--parsable",
        f"--chdir={workspace}",
        f"--output={str(workspace / folder).replace('%', '%%')}/%j.log",
        str(workspace / folder / "job.sbatch"),
    ]
    assert not list(workspace.rglob("MARKER"))


# The copy


def test_config_and_code_are_copied_for_the_owner_alone(workspace: Path, run_cli: RunCli) -> None:
    models = workspace / "my_models"
    for path, text in {
        "net.py": "import helper\nfrom toy import MLP\n\nclass Net(MLP):\n    pass\n", "__init__.py": "",
        "table.json": "{}", "__pycache__/x.pyc": "", ".hidden": "", "weights.bin": "0" * (2**20 + 1),
    }.items():  # fmt: skip
        (models / path).parent.mkdir(exist_ok=True)
        (models / path).write_text(text)
    (workspace / "helper.py").write_text("def help():\n    import yaml, later\n")
    (workspace / "later.py").write_text("")
    (workspace / "unrelated.py").write_text("")
    base = write_config(workspace, "base", {"trainer.checkpoint_dir": "runs/toy"})
    changes = {"_base_": base, "modules": [], "model": {"name": "my_models.net:Net"}, "cluster": {"nodes": 1}}
    changes |= {"modules": ["my_models", "toy"], "run_name": "${RUN_OF_TODAY:-x}"}
    (workspace / "toy.yaml").write_text(json.dumps(changes))
    assert submit("toy.yaml", ["optimizer.lr=0.25"], {}) == 0
    folder = job_folder(workspace)
    code = folder / "code"
    assert {path.name for path in code.iterdir()} == {
        *("dtrain", "my_models", "toy.py", "helper.py", "later.py", "dtrain_job.egg-info")
    }
    assert {path.name for path in (code / "my_models").iterdir()} == {
        *("net.py", "__init__.py", "table.json", "weights.bin")
    }
    assert (code / "my_models" / "weights.bin").readlink() == models / "weights.bin"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["optimizer"]["lr"], kept["loss"]["name"], kept["experiment"]) == (0.25, "CrossEntropyLoss", "toy")
    assert kept["trainer"]["checkpoint_dir"] == str(workspace / "runs" / "toy")
    assert kept["run_name"] == "${RUN_OF_TODAY:-x}" and not {"_base_", "cluster"} & set(kept)
    # What is edited now does not reach the job.
    (models / "net.py").write_text("broken here")
    (workspace / "helper.py").unlink()
    path = os.pathsep.join([str(code), str(REPOSITORY)])
    done = run_cli(["config", folder / "config.yaml"], env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, cwd=workspace)
    assert done.rc == 0, done.text
    assert re.search(rf"^# model: .*{re.escape(str(code))}/my_models/net.py:4$", done.stdout, re.M), done.stdout
    assert f"{code}/dtrain/" in done.stdout


def test_too_many_files_are_not_code(workspace: Path) -> None:
    data = workspace / "data"
    data.mkdir()
    for number in range(5100):
        (data / f"{number}.json").touch()
    (data / "models.py").write_text("from toy import MLP\n")
    with pytest.raises(ConfigError, match="more than 5000 files"):
        submit("toy.yaml", ["modules=[data.models, toy]"], {})
    assert list((workspace / "runs" / "toy.jobs").iterdir()) == []


def test_an_array_has_a_folder_and_a_config_for_each_job(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = ["optimizer.lr=0.5", "optimizer.lr=0.25 'run_name=two words'", "trainer.checkpoint_dir=runs/other"]
    assert submit("toy.yaml", ["seed=3"], {"array": jobs}) == 0
    folder = job_folder(workspace)
    kept = [yaml.safe_load((folder / f"config-{index}.yaml").read_text()) for index in range(3)]
    assert [one["optimizer"]["lr"] for one in kept] == [0.5, 0.25, 0.1]
    assert [Path(one["trainer"]["checkpoint_dir"]).name for one in kept] == ["toy-0", "toy-1", "other"]
    assert kept[1]["run_name"] == "two words" and [one["seed"] for one in kept] == [3, 3, 3]
    assert "--array=0-2" in directives((folder / "job.sbatch").read_text())
    assert f"--output={folder}/%A_%a.log" in (workspace / "sbatch.args").read_text().splitlines()
    assert "job 42: toy, 1 node(s) x 1 rank(s), 3 jobs\n" in capsys.readouterr().out


def test_a_job_has_the_state_of_the_code_that_it_was_submitted_with(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "add", "toy.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with (workspace / "toy.py").open("a") as file:
        file.write("edited = 'before'\n")
    assert submit("toy.yaml", [], {}) == 0
    folder = job_folder(workspace)
    (line,) = re.findall(r"^export .*DTRAIN_CODE_STATE.*$", (folder / "job.sbatch").read_text(), re.M)
    subprocess.run([*git, "commit", "-qam", "an edit that the job is not to see"], check=True)
    place = subprocess.run(
        ["bash", "-c", f"code={folder}/code; {line}; echo $DTRAIN_CODE_STATE"],
        capture_output=True,
        text=True,
        check=True,
    )
    monkeypatch.setenv("DTRAIN_CODE_STATE", place.stdout.strip())
    assert capture_code(workspace / "captured") == {"mlflow.source.git.commit": commit, "dtrain.code_changed": "True"}
    assert "+edited = 'before'" in (workspace / "captured" / "diff.patch").read_text()
    assert {path.name for path in (workspace / "captured").iterdir()} == {
        "commit.txt", "status.txt", "diff.patch", "folder.txt",
    }  # fmt: skip


def test_a_job_that_is_not_taken_leaves_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(workspace / "bin" / "sbatch", "#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    assert submit("toy.yaml", [], {}) == 1
    assert capsys.readouterr().err == "dtrain submit: invalid partition\n"
    assert list((workspace / "runs" / "toy.jobs").iterdir()) == []


def test_a_job_that_may_have_been_taken_keeps_its_folder(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A busy controller answers late; the job is in the queue then, and starts one day."""
    message = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    write_program(workspace / "bin" / "sbatch", f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    assert submit("toy.yaml", [], {}) == 1
    (folder,) = (workspace / "runs" / "toy.jobs").iterdir()
    assert (folder / "job.sbatch").exists() and (folder / "code").is_dir()
    error = capsys.readouterr().err
    assert message in error and "may be queued all the same: look with squeue --me" in error and str(folder) in error


def test_jobs_that_are_submitted_in_one_second_leave_one_another_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20261126-101500")
    assert [submit("toy.yaml", [f"seed={seed}"], {}) for seed in range(3)] == [0, 0, 0]
    folders = list((workspace / "runs" / "toy.jobs").iterdir())
    assert {yaml.safe_load((folder / "config.yaml").read_text())["seed"] for folder in folders} == {0, 1, 2}
    monkeypatch.setattr("secrets.token_hex", lambda length: folders[0].name.rpartition("-")[2])  # taken already
    before = sorted(folders[0].rglob("*"))
    assert submit("toy.yaml", ["seed=3"], {}) == 1
    assert "File exists" in capsys.readouterr().err
    assert sorted(folders[0].rglob("*")) == before


# What the script runs


class Batch:
    """A batch system of small scripts: what is asked of it is in `asked`, what scontrol shows of the job in `state`."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, self.run = workspace, workspace / "run"
        self.state, self.minutes_left = "RUNNING", 600
        for name in ("scontrol", "squeue"):
            write_program(workspace / "bin" / name, f'#!/bin/sh\necho "{name} $*" >> asked\ncat {name}.says\n')

    def env(self) -> dict[str, str]:
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60 * self.minutes_left))
        (self.workspace / "scontrol.says").write_text(f"JobId=7 JobState={self.state} Reason=None\n")
        (self.workspace / "squeue.says").write_text(f"{end}\n")
        return {**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": str(REPOSITORY)}

    def start(self, step: str, *options: str) -> subprocess.Popen[str]:
        job = ["-m", "dtrain", "job", "--run-folder", str(self.run), "--requeue", "scontrol requeue 7", *options]
        return subprocess.Popen(
            [sys.executable, *job, "--", "bash", "-c", step, "step"], cwd=self.workspace, env=self.env(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def status(self, step: str, *options: str) -> int:
        process = self.start(step, *options)
        self.output = process.communicate(timeout=200)[0]
        return process.returncode

    @property
    def requeued(self) -> int:
        asked = self.workspace / "asked"
        return asked.read_text().count("scontrol requeue 7") if asked.exists() else 0

    def checkpoint(self, step: int, **facts: Any) -> None:
        """What a training leaves."""
        link = self.run / "checkpoints" / "last"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"step-{step}")
        (self.run / "run.json").write_text(json.dumps({"id": "a training", **facts}))


@pytest.fixture
def batch(workspace: Path) -> Batch:
    return Batch(workspace)


def test_a_warning_while_the_batch_system_is_asked_starts_nothing_and_is_a_stop(batch: Batch) -> None:
    batch.env()
    write_program(batch.workspace / "bin" / "squeue", "#!/bin/sh\nkill -USR1 $PPID\ncat squeue.says\n")
    assert batch.status("touch begun") == 75, batch.output
    assert not (batch.workspace / "begun").exists()


SAVES = "mkdir -p run/checkpoints; ln -sfn step-$RANDOM$$ run/checkpoints/last; exit 75"


@pytest.mark.parametrize(
    ("step", "facts", "status", "requeued"),
    [
        ("exit 0", {}, 0, 0),
        ("exit 2", {}, 2, 0),
        ("exit 1", {}, 1, 0),
        ("kill -KILL $$", {}, 137, 0),
        ("kill -USR1 $$", {}, 138, 0),
        (SAVES, {}, 75, 1),
        (SAVES, {"minutes_left": 1}, 75, 1),
        ("exit 75", {}, 75, 1),
        ("exit 75", {"minutes_left": 1}, 1, 0),
        (SAVES, {"state": "SIGNALING"}, 75, 1),
        (SAVES, {"state": "COMPLETING"}, 75, 0),
        (SAVES, {"state": "CANCELLED"}, 75, 0),
        ("! read -r line && exit 5", {}, 5, 0),
    ],
    ids=[
        *("done", "a wrong config", "a crash", "a kill", "a signal of its own", "stopped", "the time limit"),
        *("stopped before the first step", "a limit that is too short", "about to be signalled", "put back by SLURM"),
        *("cancelled", "no input"),
    ],
)  # fmt: skip
def test_only_what_was_stopped_early_is_requeued(
    batch: Batch, step: str, facts: Mapping[str, Any], status: int, requeued: int
) -> None:
    vars(batch).update(facts)
    assert (batch.status(step), batch.requeued) == (status, requeued), batch.output


@pytest.mark.parametrize(
    ("facts", "srun", "status", "requeued"),
    [
        ({"state": "FINISHED", "exit_status": 0, "attempt": 2}, 137, 0, 0),  # a node was lost on the way
        ({"state": "FINISHED", "exit_status": 0, "attempt": 1}, 137, 137, 0),  # that was an earlier start
        ({"state": "KILLED", "exit_status": 75, "attempt": 2}, 1, 75, 1),
        ({"state": "FAILED", "exit_status": 1, "attempt": 2}, 137, 1, 0),
        ({"state": "RUNNING", "attempt": 2}, 1, 1, 0),
        ({"state": "RUNNING", "attempt": 2, "lost": "n3 down*"}, 1, 75, 1),  # more nodes than spares
        ({"state": "FINISHED", "exit_status": 0, "attempt": 2, "lost": "n3 down*"}, 1, 0, 0),
        ({"state": "FAILED", "exit_status": 2, "attempt": 2, "lost": "n3 down*"}, 2, 2, 0),
    ],
)
def test_with_spares_the_trainings_own_end_counts(
    batch: Batch, facts: dict[str, Any], srun: int, status: int, requeued: int
) -> None:
    batch.checkpoint(3, attempt=1)
    lost = facts.pop("lost", "n3 idle")
    write_program(batch.workspace / "bin" / "sinfo", f"#!/bin/sh\necho n1 alloc\necho '{lost}'\n")
    step = f"echo {shlex.quote(json.dumps({'id': 'a training', **facts}))} > run/run.json; exit {srun}"
    assert (batch.status(step, "--spares", "1"), batch.requeued) == (status, requeued), batch.output


@pytest.mark.parametrize(
    ("bad", "spares", "goes_ahead"),
    [(["n2"], 1, True), (["n2", "n3"], 1, False), (["n1"], 1, False), (["n2"], 0, False)],
    ids=["a spare for it", "more than spares", "the first one, where the ranks meet", "no spares"],
)
def test_a_spare_takes_the_place_of_a_node_that_the_preflight_finds_bad(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, bad: list[str], spares: int, goes_ahead: bool
) -> None:
    """Else the job is requeued without it."""
    batch.run.mkdir()
    batch.run.joinpath("run.json").write_text("{}")
    node = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n1", "SLURM_JOB_PARTITION": "p"}
    for name, value in {**node, "SLURM_JOB_NUM_NODES": "3"}.items():
        monkeypatch.setenv(name, value)
    write_program(batch.workspace / "bin" / "sinfo", "#!/bin/sh\nfor n in 1 2 3 4 5 6; do echo n$n idle; done\n")
    look = "".join(f"echo {name} 2026-11-29 11:00:00 slow >> run/bad-nodes; " for name in bad) + "exit 1"
    words = [f"--preflight={word}" for word in ("sh", "-c", look)]
    status = batch.status('echo "uses:$DTRAIN_USES_BAD_NODES without:$DTRAIN_LEFT_OUT"', f"--spares={spares}", *words)
    assert (status, batch.requeued) == ((0, 0) if goes_ahead else (75, 1)), batch.output
    assert ("uses: without:n2\n" in batch.output) == goes_ahead
    assert ("n2 is not used, a spare takes its place: 2026" in batch.output) == goes_ahead


def test_of_an_array_one_task_is_asked_for_and_requeued(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the tasks has the number of the whole array as its own."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert batch.status(SAVES) == 75
    asked = (batch.workspace / "asked").read_text()
    assert "squeue -h -j 7_3 -o %e\n" in asked and "scontrol -o show job 7_3\n" in asked
    for file in [*REPOSITORY.glob("scripts/cluster/*.sbatch"), REPOSITORY / "dtrain" / "launch" / "batch_script.py"]:
        text = file.read_text()
        (line,) = re.findall("^job=.*$", text, re.M)
        assert '--requeue "scontrol requeue $job"' in text
        for env, job in (({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "7_0")):
            command = ["bash", "-uc", f'{line}; echo "$job"']
            assert subprocess.check_output(command, env={"SLURM_JOB_ID": "7", **env}, text=True) == f"{job}\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2])
def test_a_warning_reaches_the_step_as_usr1(batch: Batch, number: signal.Signals) -> None:
    process = batch.start(f"trap 'touch warned; {SAVES}' USR1; touch ready; while :; do sleep 0.05; done")
    wait_for(batch.workspace / "ready")
    for _ in range(3):
        process.send_signal(number)
    assert (process.wait(200), batch.requeued) == (75, 1)
    assert (batch.workspace / "warned").exists()


def test_a_warning_before_the_step_can_take_it_is_not_a_crash(batch: Batch) -> None:
    process = batch.start("touch ready; sleep 1000")
    wait_for(batch.workspace / "ready")
    process.send_signal(signal.SIGUSR1)
    assert (process.wait(200), batch.requeued) == (75, 1)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_starts_without_progress_end(batch: Batch) -> None:
    """A node that always fails, a job that is preempted before it can save: SLURM alone would continue forever."""
    batch.checkpoint(8)
    assert [batch.status("exit 75") for _ in range(5)] == [75, 75, 75, 1, 1]
    assert batch.requeued == 3 and "3 starts have not led to a new checkpoint" in batch.output
    batch.checkpoint(9)
    assert batch.status("exit 75") == 75


def test_the_next_start_resumes_the_jobs_own_training(batch: Batch) -> None:
    batch.checkpoint(5, id="an old training")
    step = "echo got: $*; exit 75"
    assert batch.status(step) == 75 and "got:\n" in batch.output
    assert batch.status(step) == 75 and "got:\n" in batch.output  # it was stopped before it had moved the old one aside
    batch.checkpoint(1, id="the job's own")
    assert batch.status(step) == 75 and "got: trainer.resume=auto\n" in batch.output


def test_the_end_of_the_job_is_set_where_slurm_does_not(batch: Batch) -> None:
    batch.minutes_left = 30
    assert batch.status("test $(($SLURM_JOB_END_TIME - $(date +%s))) -gt 1700") == 0


def test_other_systems_take_a_status_or_a_command(batch: Batch) -> None:
    assert batch.status(SAVES, "--stopped-status", "143", "--requeue", "touch 'put back'") == 143
    assert (batch.workspace / "put back").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_a_script_is_given_stays_what_it_is(workspace: Path, script: Path) -> None:
    """Odd names, in a locale that knows ASCII alone."""
    write_program(workspace / "bin" / "python", '#!/bin/sh\nprintf "%s\\0" "$@" > args\nexit 75\n')
    write_program(workspace / "bin" / "scontrol", "#!/bin/sh\necho node1\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "PBS_JOBID": "7.srv"}
    for number, text in enumerate(["a b", *(f"{a}{b}" for a, b in zip(NASTY, [*NASTY[7:], *NASTY[:7]], strict=True))]):
        config, folder = f"{text}.yaml", f"runs/{number} {text}"
        words = [config, folder, f"run_name={text}"]
        given = {"CONFIG": config, "RUN_FOLDER": folder, "PBS_O_WORKDIR": str(workspace), **job}
        if script.name == "slurm-array.sbatch":
            words, folder = [config], f"runs/{text}"
            given["SLURM_ARRAY_TASK_ID"], given["SLURM_ARRAY_JOB_ID"] = "0", "7"
        env = {**os.environ, **given, "LC_ALL": "C"}
        done = subprocess.run(
            ["bash", script, *words], cwd=workspace, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 75, done.stderr
        found = (workspace / "args").read_bytes().decode().split("\0")[:-1]
        assert found[:5] == ["-m", "dtrain", "job", "--run-folder", folder]
        place = found.index("dtrain", found.index("--")) + 1
        assert config in found[place : place + 2] and f"trainer.checkpoint_dir={folder}" in found
        if len(words) == 3 and script.suffix == ".sbatch":
            assert found[-1] == words[-1]
        if script.name == "pbs.sh":
            again = shlex.split(found[found.index("--requeue") + 1])
            assert again[0] == "qsub" and (workspace / again[-1]).read_text() == script.read_text()
        (workspace / "args").unlink()
    assert not list(workspace.rglob("MARKER*"))


def test_the_section_is_not_part_of_a_training(workspace: Path) -> None:
    write_config(workspace, "toy", {"cluster": {"nodes": 2, "time": "1h"}})
    config = load_config("toy.yaml")
    assert config.cluster.nodes == 2
