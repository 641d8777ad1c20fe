"""The command line as a user types it: one line per mistake, status 2, nothing heavy imported, own modules found."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Result, RunCli

from dtrain import cli
from dtrain.config.errors import to_plain
from dtrain.config.load import load_config
from dtrain.config.signatures import SOURCE

PARTS = """\
import torch

class Net(torch.nn.Module):
    def __init__(self, dim: int = 4, fail: bool = False):
        super().__init__()
        self.layer = torch.nn.Linear(2, dim)
        if fail:
            raise RuntimeError("the constructor's own words")

    def forward(self, x):
        return self.layer(x)

class Data(torch.utils.data.Dataset):
    def __init__(self, size: int = 8):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.ones(2), torch.tensor(index % 4)
"""
GOOD = """\
modules: [parts]
device: cpu
model: {name: Net}
loaders: {name: Data, batch_size: 2, train: {}}
loss: {name: CrossEntropyLoss}
optimizer: {name: SGD, lr: 1e-3}
trainer: {max_epochs: 1, checkpoint_dir: run}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    """A folder with one module and one config, as someone has it before anything is packaged."""
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "c.yaml").write_text(GOOD)
    return tmp_path


def lines(result: Result) -> list[str]:
    """The messages of a command line that was refused."""
    assert result.rc == 2, result.text
    return result.stderr.splitlines()


# --------------------------------------------------------------------------------------------- through the real program


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.yaml", "optimizer.lrr=1"], "argument 'optimizer.lrr=1': optimizer.lrr: SGD got an unexpected argument 'lrr'; did you mean 'lr'?; SGD(params: "),
        (["train", "c.yaml", "model.dim=wide"], "argument 'model.dim=wide': model.dim: expected int, found string 'wide'; Net("),
        (["c.yaml", "optimizer.lr"], "argument 'optimizer.lr': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        (["missing.yaml"], "there is no file missing.yaml"),
        (["check", "c.yml"], "there is no file c.yml; did you mean 'c.yaml'?"),
        (["config", "c.yaml", "a=["], "argument 'a=[': not valid YAML: "),
        (["test", "c.yaml", "--checkpoint", "x", "loaders.test={}", "model.name=Nett"], "argument 'model.name=Nett': model.name: there is no 'Nett'; did you mean 'Net'?; searched parts, "),
        (["bad.yaml"], "bad.yaml:3:1: duplicate key 'model', first written on line 1"),
        (["binary.yaml"], "binary.yaml:1:1: not UTF-8 text: byte 0xff"),
        (["list.yaml"], "list.yaml:1:1: the file holds a list; a config is a mapping of sections (model, loaders, ...)"),
        (["--json", "c.yaml"], "dtrain: unexpected argument '--json'; options stand behind the command or CONFIG (see dtrain --help)"),
        (["--hepl"], "dtrain: unexpected argument '--hepl'; did you mean '--help'? (see dtrain --help)"),
        (["sync", "nowhere"], "dtrain sync: nowhere is not a run folder: it has no run.json"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(
    run_cli: RunCli, project: Path, arguments: list[str], expected: str
) -> None:
    (project / "bad.yaml").write_text("model: {}\nloss: {}\nmodel: {}\n")
    (project / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (project / "list.yaml").write_text("- 1\n")
    messages = lines(run_cli(arguments, timeout=200))
    assert len(messages) == 1
    assert messages[0].startswith(expected)
    assert sorted(path.name for path in project.iterdir() if path.name != "__pycache__") == [
        "bad.yaml", "binary.yaml", "c.yaml", "list.yaml", "parts.py",
    ]  # fmt: skip


def test_many_mistakes_are_as_many_lines(run_cli: RunCli) -> None:
    messages = lines(
        run_cli(["c.yaml", "model.dim=a", "optimizer.lrr=1", "trainer.max_epoch=3", "seed=-1"], timeout=200)
    )
    assert [line.partition("'")[2].partition("=")[0] for line in messages] == [
        "model.dim", "optimizer.lrr", "seed", "trainer.max_epoch",
    ]  # fmt: skip


def test_under_torchrun_a_mistake_is_told_once(run_cli: RunCli) -> None:
    result = run_cli(["c.yaml", "optimizer.lrr=1", "model.dim=a"], nproc=2, timeout=200)
    assert result.rc == 1, "torchrun makes 1 of every status but 0"
    said, _, of_torchrun = result.text.partition("ChildFailedError")
    assert said.count("SGD got an unexpected argument 'lrr'") == said.count("expected int, found string 'a'") == 1
    assert "SGD got an unexpected argument 'lrr'" in of_torchrun.rpartition("Root Cause")[2]
    assert result.text.count("exitcode  : ") == 1 and "exitcode  : 2" in of_torchrun, "the other rank is no failure"
    assert "dtrain.config.yaml12" not in result.text, "a traceback"


def test_an_error_that_one_rank_alone_may_have_is_told_by_each(run_cli: RunCli, project: Path) -> None:
    text = PARTS.replace("if fail:", "if fail and __import__('os').environ['RANK'] == '1':")
    (project / "parts.py").write_text(text)
    result = run_cli(["c.yaml", "model.fail=true"], nproc=2, timeout=200)
    assert result.rc == 1
    line = next(line for line in result.text.splitlines() if "own words" in line)
    assert line.startswith("rank 1: argument 'model.fail=true'") or line.startswith("rank 1: c.yaml:3:1: model: Net(")


def test_a_constructors_error_is_one_line_with_its_place(run_cli: RunCli, project: Path) -> None:
    messages = lines(run_cli(["check", "c.yaml", "model.fail=true"], timeout=200))
    raising = PARTS.splitlines().index('            raise RuntimeError("the constructor\'s own words")') + 1
    assert messages == [
        f"c.yaml:3:1: model: Net(fail=True) raised RuntimeError: the constructor's own words ({project}/parts.py:{raising})"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import no_such_package_here\n", "importing parts failed: ModuleNotFoundError: No module named 'no_such_package_here' ({parts}:1)"),
        ("def f(:\n", "SyntaxError: invalid syntax ({parts}:1)"),
        ("from torch.nn import Linnear\n", "importing parts failed: ImportError: cannot import name 'Linnear' from 'torch.nn'"),
    ],
)  # fmt: skip
def test_a_module_that_fails_is_one_line_with_the_users_own_line(
    run_cli: RunCli, project: Path, text: str, expected: str
) -> None:
    (project / "parts.py").write_text(text + PARTS)
    messages = lines(run_cli(["check", "c.yaml"], timeout=200))
    assert len(messages) == 1
    assert expected.format(parts=project / "parts.py") in messages[0]
    assert f"{project}/parts.py:1" in messages[0]


def test_check_tries_the_modules_of_the_current_folder_and_writes_nothing(run_cli: RunCli, project: Path) -> None:
    result = run_cli(
        ["check", "c.yaml", "loaders.val={}", "metrics={name: parts.Net, dim: 3}", "trainer.mode=max"], timeout=200
    )
    assert result.rc == 1, "a model is no metric"
    result = run_cli(["check", "c.yaml", "loaders.val={}"], timeout=200)
    assert result.rc == 0, result.text
    assert "train: one batch forward and backward, loss " in result.stdout
    assert "val: one batch, loss " in result.stdout
    assert not (project / "run").exists()


def test_the_console_script_finds_modules_of_the_current_folder_too(project: Path, clean_env: dict[str, str]) -> None:
    script = "import sys; from dtrain.cli import program; sys.exit(program())"
    command = [sys.executable, "-P", "-c", script, "config", "c.yaml"]  # -P: the current folder is not on sys.path
    done = subprocess.run(command, cwd=project, env=clean_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"parts.Net  {project}/parts.py:3" in done.stdout


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_signal_when_all_is_done_changes_nothing_of_the_status(
    project: Path, clean_env: dict[str, str], name: str
) -> None:
    """It comes from outside, as they do: one that a thread sends to its own process may not wake the main one."""
    late = """
import sys, threading, time
from dtrain.cli import program

def late():
    threading.main_thread().join()
    print("all is done", flush=True)
    time.sleep(1000)

threading.Thread(target=late).start()  # Python waits for it
sys.exit(program())
"""
    for status, key in ((0, "dim"), (2, "dimm")):
        command = [sys.executable, "-c", late, "config", "c.yaml", f"model.{key}=3"]
        process = subprocess.Popen(command, cwd=project, env=clean_env, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            while process.stdout.readline() != "all is done\n":
                assert process.poll() is None
            end = time.monotonic() + 200
            while (
                process.poll() is None and time.monotonic() < end
            ):  # one that comes just before Python waits is not heard
                process.send_signal(getattr(signal, f"SIG{name}"))
                time.sleep(0.2)
            assert process.poll() == status
        finally:
            process.kill()


def test_what_is_registered_for_the_end_is_done(project: Path, clean_env: dict[str, str]) -> None:
    script = "import atexit, sys; from dtrain import cli; from dtrain.distributed.process import run_to_end; sys.exit(run_to_end("
    script += "lambda: atexit.register(print, 'the end') and cli.main()))"
    command = [sys.executable, "-c", script, "--version"]
    done = subprocess.run(command, cwd=project, env=clean_env, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the end"), done.stderr


# ------------------------------------------------------------------------------------------------------- in this process

InProcess = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    """`run(*arguments)`: exit status, stdout and stderr of the program, called as a function."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(SOURCE._modules, "parts", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_config_prints_the_class_of_each_section_and_then_the_config(run: InProcess, project: Path) -> None:
    status, out, err = run("config", "c.yaml", "optimizer.lr=5e-4", "metrics={name: [parts.Data], size: 3}")
    assert (status, err) == (0, "")
    comments = [line.removeprefix("# ") for line in out.splitlines() if line.startswith("#")]
    where = {line.split()[0].rstrip(":"): line.split(maxsplit=2)[1:] for line in comments}
    assert list(where) == [
        "model",
        "loaders.train",
        "loss",
        "metrics.Data",
        "optimizer",
        "trainer",
        "mlflow",
        "predictor",
    ]
    assert where["model"] == ["parts.Net", f"{project}/parts.py:3"]
    assert where["loss"][0] == "torch.nn.modules.loss.CrossEntropyLoss"
    assert where["trainer"][1].endswith("dtrain/trainer.py:" + where["trainer"][1].rpartition(":")[2])
    assert all(Path(place.rpartition(":")[0]).is_file() for _, place in where.values())


def test_what_config_prints_is_a_config(run: InProcess, project: Path) -> None:
    (project / "base.yaml").write_text("run_name: $${NOT_A_REFERENCE}\n")
    (project / "c.yaml").write_text("_base_: base.yaml\n" + GOOD)
    _, out, _ = run("config", "c.yaml", "seed=3")
    (project / "again.yaml").write_text(out)
    again = to_plain(load_config(project / "again.yaml"))
    assert again == to_plain(load_config("c.yaml", ["seed=3"]))
    assert again["run_name"] == "${NOT_A_REFERENCE}"
    assert yaml.safe_load(out)["optimizer"]["lr"] == 0.001


def test_a_class_that_only_a_run_can_see_has_no_line(run: InProcess, project: Path) -> None:
    (project / "parts.py").write_text("def make(): ...\nNet = make()\n" + PARTS.replace("class Net", "class Other"))
    status, out, _ = run("config", "c.yaml")
    assert status == 0
    assert "# model:                 parts.Net\n" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_help_ends_with_an_example(run: InProcess, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.rstrip().splitlines()[-1].startswith(f"example: dtrain {command} ")


def test_help_shows_the_first_five_commands_on_top_each_in_one_line(run: InProcess) -> None:
    status, out, _ = run("--help")
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.split()[0] in cli.COMMANDS]
    assert listed[:5] == ["train", "check", "launch", "test", "predict"]
    assert sorted(listed) == sorted(set(cli.COMMANDS) - {"job"}), "each once"
    assert max(map(len, out.splitlines())) <= 80
    assert out.rstrip().splitlines()[-1].startswith("example: ")


def test_a_command_in_no_group_is_listed_too(run: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "rehearse", cli.COMMANDS["check"])
    _, out, _ = run("--help")
    assert re.search("Others:\n  rehearse +build everything", out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "c.yaml"], "dtrain: 'trian' is not a command; did you mean 'train'? (see dtrain --help)\n"),
        (["jobs"], "dtrain: 'jobs' is not a command (see dtrain --help)\n"),
        (["help", "tset"], "dtrain: 'tset' is not a command; did you mean 'test'? (see dtrain --help)\n"),
        (["test", "c.yaml", "--chekpoint=x"], "dtrain test: unexpected argument '--chekpoint=x'; did you mean '--checkpoint'? (see dtrain test --help)\n"),
        (["c.yaml", "--max_epochs=3"], "dtrain train: unexpected argument '--max-epochs=3'; settings of the config are written without dashes, such as optimizer.lr=1e-3 (see dtrain train --help)\n"),
        (["sync", "run", "a=1"], "dtrain sync: unexpected argument 'a=1' (see dtrain sync --help)\n"),
        (["c.yaml", "--checkpoint", "x"], "dtrain train: unexpected argument '--checkpoint'; settings of the config are written without dashes, such as optimizer.lr=1e-3 (see dtrain train --help)\n"),
        (["train"], "dtrain train: the following arguments are required: CONFIG (see dtrain train --help)\n"),
        (["launch", "c.yaml", "--nnodes", "two"], "dtrain launch: argument --nnodes: expected a whole number, not 'two' (see dtrain launch --help)\n"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_with_the_nearest_name(
    run: InProcess, words: list[str], says: str
) -> None:
    assert run(*words) == (2, "", says)


def test_without_arguments_the_help_is_shown(run: InProcess) -> None:
    _, help_text, _ = run("--help")
    assert run() == (2, "", help_text)
    assert run("help") == (0, help_text, "")
    assert run("help", "test") == run("test", "--help")


def test_options_may_be_written_as_torchrun_takes_them() -> None:
    options = cli.parse(["launch", "c.yaml", "--nproc_per_node=2", "--max_restarts", "3", "model.n_in=1"])
    assert (options.nproc_per_node, options.max_restarts, options.overrides) == ("2", 3, ["model.n_in=1"])
    assert cli.parse(["job", "--run_folder", "a_b", "--", "x", "--y_z"]).step == ["x", "--y_z"]


def test_an_example_of_a_help_is_a_command_line(run: InProcess) -> None:
    for command, (action, _, example) in cli.COMMANDS.items():
        options = cli.parse([command, *example.split()])
        assert (options.command, options.run) == (command, action)


def test_the_version(run: InProcess) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("dtrain ")


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["test", "c.yaml", "a=1", "--checkpoint", "x", "b=2"], ["a=1", "b=2"]),
        (["test", "--checkpoint", "x", "c.yaml", "a=-1"], ["a=-1"]),
        (["train", "c.yaml"], []),
        (["train", "c.yaml", "a=-1", "b=x y", "c=--d"], ["a=-1", "b=x y", "c=--d"]),
    ],
)
def test_overrides_may_stand_before_and_behind_options(arguments: list[str], overrides: list[str]) -> None:
    assert cli.parse(arguments).overrides == overrides


@pytest.mark.parametrize("name", ["c.yaml", "c.yml"])
def test_a_first_argument_that_is_a_config_means_train(
    run: InProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[str] = []
    _, *rest = cli.COMMANDS["train"]
    monkeypatch.setitem(cli.COMMANDS, "train", (lambda options: asked.append(options.command) or 0, *rest))
    assert run(name)[0] == 0
    assert asked == ["train"]


def test_ctrl_c_while_the_config_is_read_is_no_traceback(run: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", (interrupted, *cli.COMMANDS["train"][1:]))
    assert run("train", "c.yaml") == (130, "", "")


# ------------------------------------------------------------------------------------------------------ what is imported


def imported_by(arguments: list[str], folder: Path) -> tuple[int, list[str]]:
    """The exit status of a command line, and which heavy packages its process has imported."""
    code = f"""
import json, runpy, sys
sys.argv = ["dtrain", *{json.dumps(arguments)}]
status = 0
try:
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)
except SystemExit as end:
    status = end.code or 0
heavy = {{"torch", "torchmetrics", "accelerate", "mlflow", "numpy.linalg", "rich", "parts", "ml_collections"}}
print("IMPORTED", json.dumps([status, sorted(heavy & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200)
    status, names = json.loads(done.stdout.rpartition("IMPORTED ")[2])
    return status, names


@pytest.mark.parametrize("arguments", [["--help"], ["job", "--run-folder", "run", "--", "true"]])
def test_help_and_a_batch_jobs_process_import_nothing_heavy(project: Path, arguments: list[str]) -> None:
    assert imported_by(arguments, project) == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.yaml", "optimizer.lrr=1"],
        ["c.yaml", "model.name=Nett"],
        ["c.yaml", "model.dim=a", "metrics={name: [Acuracy]}"],
        ["check", "c.yaml", "trainer.max_epoch=3"],
        ["missing.yaml"],
    ],
)
def test_a_mistake_is_answered_without_torch_or_the_users_modules(project: Path, arguments: list[str]) -> None:
    assert imported_by(arguments, project) == (2, ["ml_collections"])


def test_config_is_answered_without_torch(project: Path) -> None:
    assert imported_by(["config", "c.yaml"], project) == (0, ["ml_collections"])


def test_a_checkout_on_the_path_runs_without_being_installed(tmp_path: Path, run_cli: RunCli) -> None:
    shutil.copytree(
        REPOSITORY / "dtrain", tmp_path / "checkout" / "dtrain", ignore=shutil.ignore_patterns("__pycache__")
    )
    result = run_cli(["config", REPOSITORY / "configfiles/digits.yaml"], env={"PYTHONPATH": str(tmp_path / "checkout")})
    assert result.rc == 0, result.text
    assert str(tmp_path / "checkout" / "dtrain" / "trainer.py") in result.stdout


def test_a_missing_config_is_named_and_nothing_else(run_cli: RunCli) -> None:
    result = run_cli(["train"])
    assert result.rc == 2
    assert "required: CONFIG (see" in result.stderr


def test_sync_runs_the_sender_of_its_own_checkout(tmp_path: Path, run_cli: RunCli) -> None:
    shutil.copytree(REPOSITORY / "dtrain", tmp_path / "dtrain", ignore=shutil.ignore_patterns("__pycache__"))
    sender = tmp_path / "dtrain" / "tracking" / "sender.py"
    sender.write_text(sender.read_text().replace("import argparse", "raise SystemExit('this one')\nimport argparse", 1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    result = run_cli(["sync", tmp_path / "run"], env={"PYTHONPATH": None})
    assert (result.rc, result.stderr.strip()) == (1, "this one")
