"""scripts/bench: the measurement runs on a small scale and judges all that is promised; no time decides a test."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Tagged

BENCH = REPOSITORY / "scripts" / "bench"
PROGRAMS = ("by hand", "dtrain", "dtrain + torchmetrics", "by hand + torchmetrics")


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    sys.path.insert(0, str(BENCH))
    yield BENCH
    sys.path.remove(str(BENCH))


def overhead(arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "overhead.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_overhead_measures_both_loops_and_judges_every_promise(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path
) -> None:
    done = overhead(["--rounds", "1", "--steps", "24", "--ranks", "2", "--json", "all.json"], clean_env, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for program in PROGRAMS:
        assert re.search(rf"^{re.escape(program)} +\d+ .* \d+, \d+(; sender \d+)?$", done.stdout, re.M), done.stdout
    promises = ("time per step / by hand", "first step later", "rank's memory, more", "sender's memory", "left behind")
    for promise in promises:
        lines = re.findall(rf"^(?:ok|MISS)  +2 process.*{promise} +[\d.-]+  <= [\d.]+( s| MB)?$", done.stdout, re.M)
        assert len(lines) == 2, f"{promise}\n{done.stdout}"  # with and without torchmetrics
    data = json.loads((tmp_path / "all.json").read_text())
    assert {run["program"] for run in data["runs"]} == set(PROGRAMS)
    for run in data["runs"]:
        assert len(run["peak_mb"]) == 2
        assert min(run["step_us"], run["step_cpu_us"], run["first_step_s"], run["first_step_cpu_s"]) > 0
        assert run["whole_s"] > run["first_step_s"]
        assert run["sender_is_gone"]
    assert len(data["verdicts"]) == 10
    assert not list(tmp_path.glob("overhead-*"))
    assert tagged.pids() == []


def test_a_broken_run_is_an_error_and_not_a_figure(clean_env: dict[str, str], tmp_path: Path) -> None:
    done = overhead(["--steps", "0", "--rounds", "1", "--ranks", "1"], clean_env, tmp_path)
    assert done.returncode != 0
    assert "us per step" not in done.stdout


def test_both_loops_use_the_same_dataset_model_and_clock() -> None:
    import yaml

    config = yaml.safe_load((BENCH / "overhead.yaml").read_text())
    tree = ast.parse((BENCH / "by_hand.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {config["model"]["name"], config["optimizer"]["name"], config["metrics"]["name"]} <= names
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    given = {item.arg: ast.unparse(item.value) for item in calls["DataLoader"].keywords}
    assert given["batch_size"] == str(config["loaders"]["batch_size"])
    assert {"name", "batch_size", "train", "val"} == set(config["loaders"])  # no option that the other loop lacks
    rate = {item.arg: ast.literal_eval(item.value) for item in calls["ClockedSGD"].keywords}
    assert rate == {key: value for key, value in config["optimizer"].items() if key != "name"}


def test_a_verdict_is_missed_above_its_limit_and_where_nothing_was_found(bench: Path) -> None:
    from overhead import Verdict

    assert [Verdict("x", found, 1.05).kept for found in (1.0, 1.05, 1.06, float("nan"))] == [True, True, False, False]
    assert Verdict("x", 2.0, 1.05, " s").line().split() == ["MISS", "x", "2.00", "<=", "1.05", "s"]


def test_programs_take_turns_and_none_is_always_first(bench: Path) -> None:
    from overhead import schedule

    runs = list(schedule(2, [1]))
    assert [program for number, program, _ in runs if number == 0][:3] == ["by hand", "dtrain", "dtrain + torchmetrics"]
    assert [program for number, program, _ in runs if number == 1] == ["dtrain + torchmetrics", "dtrain", "by hand"]


def test_peak_memory_is_the_process_own_and_not_its_parents(bench: Path) -> None:
    """getrusage would give the child what this process held when it forked."""
    block = bytearray(os.urandom(1) * 150_000_000)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n" + peak_mb_source()
    code += "\nprint(peak_mb('self'))"
    child = subprocess.run([sys.executable, "-c", code, str(bench)], capture_output=True, text=True, timeout=60)
    assert 1 < float(child.stdout) < 100, child.stderr
    assert len(block) == 150_000_000


def peak_mb_source() -> str:
    """The function alone: its module imports torch."""
    tree = ast.parse((BENCH / "workload.py").read_text())
    return next(ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "peak_mb")
