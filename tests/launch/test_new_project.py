"""`dtrain init`: the project passes its own test and `dtrain check`, trains, and never overwrites anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunCli
from whole_runs import NO_MLFLOW

from dtrain.cli import main
from dtrain.config.check import check
from dtrain.config.load import load_config
from dtrain.launch.new_project import TASKS, package_name


@pytest.mark.parametrize("task", TASKS)
def test_its_config_is_right_and_its_files_are_clean(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", f"init-{task}", "--task", task]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert len(files) == 10 and all(Path(file).is_file() for file in files)
    assert last == f"next: cd init-{task} && dtrain check config.yaml && dtrain train config.yaml"
    assert not [file for file in files if "$" in Path(file).read_text().replace('"$@"', "").replace("$schema", "")]
    monkeypatch.chdir(tmp_path / f"init-{task}")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    check(load_config("config.yaml"))
    rules = ["--isolated", "--line-length", "120", "--select", "E,F,B,UP,SIM"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *rules, "."], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_passes_its_own_test_and_trains(tmp_path: Path, run_cli: RunCli, clean_env: dict[str, str]) -> None:
    folder = tmp_path / "init-whole"
    assert main(["init", str(folder), "--task", "segmentation"]) == 0
    env = clean_env | {"PYTHONPATH": str(REPOSITORY)}
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=folder, env=env, capture_output=True, text=True)
    assert "3 passed" in tested.stdout, tested.stdout + tested.stderr
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "__init__.py").write_text(NO_MLFLOW)
    trained = run_cli(
        ["config.yaml", "trainer.max_epochs=1", "trainer.limit_batches=2"], cwd=folder, env={"PYTHONPATH": str(folder)}
    )
    assert trained.rc == 0 and "test: loss" in trained.text, trained.text


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert "has config.yaml already; nothing is overwritten" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_file_that_is_a_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("")
    assert main(["init", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("My Nets", "my_nets"),
        ("3d-cells", "project_3d_cells"),
        ("test", "test_project"),
        ("torch", "torch_project"),
        ("é", "project"),
    ],
)
def test_a_package_has_a_name_of_its_own(folder: str, package: str) -> None:
    assert package_name(folder) == package
