"""scripts/gpu_check.sh: what it does without a GPU, and that its checks run; what they find needs a GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


def gpu_check(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture
def env(clean_env: dict[str, str]) -> dict[str, str]:
    return {**clean_env, "PYTHON": sys.executable}


@pytest.fixture
def parts() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def test_without_a_gpu_it_says_so_in_one_line_and_is_content(env: dict[str, str]) -> None:
    done = gpu_check(env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skip everything: torch ")
    assert done.stdout.endswith("sees no CUDA GPU on this machine\n")
    assert done.stdout.count("\n") == 1


def test_without_torch_it_says_which_variable_names_a_python(env: dict[str, str], tmp_path: Path) -> None:
    bare = shutil.which("python3", path=os.defpath) or sys.executable
    if subprocess.run([bare, "-c", "import torch"], capture_output=True, timeout=200).returncode == 0:
        pytest.skip("every Python here has torch")
    done = gpu_check(env={**env, "PYTHON": bare})
    assert done.returncode == 0
    assert "PYTHON=" in done.stdout


def test_an_unknown_check_is_refused_with_the_possible_ones(env: dict[str, str]) -> None:
    done = gpu_check("--device", "cpu", "warp-drive", env=env)
    assert done.returncode == 2
    assert "warp-drive" in done.stderr
    assert "no-waiting" in done.stderr


@pytest.mark.slow
def test_checks_run_and_say_what_they_found(env: dict[str, str], tmp_path: Path) -> None:
    done = gpu_check("--device", "cpu", "--keep", str(tmp_path), "fallback", "nccl", "stopped-step", env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].startswith("dtrain on a rehearsal on the CPU, torch ")
    assert lines[1].startswith("ok fallback: one process on the CPU, loss ")
    assert lines[2] == "skip nccl: needs 1 GPU(s), found 0"
    assert lines[3].startswith("ok stopped-step: ")
    assert "NonFiniteError" in lines[3]
    assert (tmp_path / "fallback" / "auto" / "run" / "run.json").is_file()


def test_a_check_that_fails_says_why_and_fails_the_script(parts: None, tmp_path: Path, monkeypatch, capsys) -> None:
    import gpu_check

    def broken(bench: object) -> str:
        """The docstring says what was checked."""
        raise AssertionError("weights differ: head.1.weight")

    monkeypatch.setitem(gpu_check.CHECKS, "broken", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--keep", str(tmp_path), "broken"])
    assert gpu_check.main() == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("FAIL broken: weights differ: head.1.weight [The docstring says what was checked.]")


def test_the_host_is_watched_between_log_steps_only(parts: None) -> None:
    from gpu_check_parts import Net

    network = Net(watch_every_steps=5)
    assert [step for step in range(1, 13) if network.is_watched(step)] == [3, 4, 6, 7, 8, 9, 11, 12]


def test_losses_that_differ_or_are_missing_are_found(parts: None) -> None:
    from gpu_check import close

    assert close([1.0, 2.0], [1.0, 2.00001], 1e-4).startswith("2 losses equal to")
    for other in ([1.0], [1.0, 2.1], [1.0, float("nan")]):
        with pytest.raises(AssertionError):
            close([1.0, 2.0], other, 1e-4)
    with pytest.raises(AssertionError):
        close([], [], 1e-4)
