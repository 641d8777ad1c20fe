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
@pytest.mark.timeout(600)
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_overhead_measures_both_loops_and_judges_every_promise(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path, ranks: int
) -> None:
    words = ["--rounds", "1", "--steps", "24", "--ranks", str(ranks), "--json", "all.json"]
    done = overhead(words, clean_env, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for program in PROGRAMS:
        assert re.search(rf"^{re.escape(program)} +\d+ .* \d+(, \d+)?(; sender \d+)?$", done.stdout, re.M), done.stdout
    promises = ("time per step / by hand", "first step later", "rank's memory, more", "sender's memory", "left behind")
    for promise in promises:
        lines = re.findall(
            rf"^(?:ok|MISS)  +{ranks} process.*{promise} +[\d.-]+  <= [\d.]+( s| MB)?$", done.stdout, re.M
        )
        assert len(lines) == 2, f"{promise}\n{done.stdout}"  # with and without torchmetrics
    data = json.loads((tmp_path / "all.json").read_text())
    assert {run["program"] for run in data["runs"]} == set(PROGRAMS)
    for run in data["runs"]:
        assert len(run["peak_mb"]) == ranks
        assert min(run["step_us"], run["step_cpu_us"], run["first_step_s"], run["first_step_cpu_s"]) > 0
        assert run["whole_s"] > run["first_step_s"]
        assert run["sender_is_gone"]
    assert len(data["verdicts"]) == 10
    assert not list(tmp_path.glob("overhead-*"))
    assert tagged.pids() == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("memory_mb", ["0", "1"])
def test_volumes_measures_both_programs_and_judges_every_promise(
    clean_env: dict[str, str], tmp_path: Path, memory_mb: str
) -> None:
    command = [sys.executable, str(BENCH / "volumes.py"), "--rounds", "1", "--count", "1", "--workers", "0"]
    command += ["--patch", "8", "32", "32", "--memory-mb", memory_mb, "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["pipeline, 0 worker(s)", "training, 0 worker(s)", "prediction, 0 worker(s)"]
    parts += ["lazy training", "lazy prediction"] if memory_mb != "0" else []
    for part in parts:
        for program in ("pytorch3dunet", "dtrain"):
            assert re.search(rf"^{re.escape(part)}: {program} +[\d.]+ +[\d.]+ ", done.stdout, re.M), done.stdout
        assert len(re.findall(rf"^(?:ok|MISS)  +{re.escape(part)}: .* <= (?:1|20 MB)$", done.stdout, re.M)) == 1
    data = json.loads((tmp_path / "all.json").read_text())
    assert [run["program"] for run in data["runs"]] == ["pytorch3dunet", "dtrain"] * len(parts)
    assert min(min(run["samples_per_s"], run["cpu_ms"], run["peak_mb"]) for run in data["runs"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


def test_a_measurement_of_volumes_that_fails_is_an_error_and_not_a_figure(
    clean_env: dict[str, str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(BENCH / "volumes.py"),
        "--patch",
        "1",
        "2",
        "2",
        "--memory-mb",
        "0",
    ]  # no room for 3 levels
    done = subprocess.run(
        [*command, "--count", "0"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "samples per s" not in done.stdout


def test_programs_that_read_volumes_take_turns(bench: Path) -> None:
    from volumes import Part, schedule

    parts = [Part("a", "pipeline", 0, 1), Part("b", "prediction", 0, 1, lazy=True)]
    runs = [(number, part.name, program) for number, part, program in schedule(2, parts)]
    theirs, ours = "pytorch3dunet", "dtrain"
    assert runs == [
        (0, "a", theirs),
        (0, "a", ours),
        (0, "b", theirs),
        (0, "b", ours),
        (1, "a", ours),
        (1, "a", theirs),
    ]


def test_a_ratio_of_rates_is_one_of_times(bench: Path) -> None:
    from volumes import Part, Run, ratio, verdicts

    part, lazy = Part("a", "pipeline", 0, 1), Part("b", "prediction", 0, 1, lazy=True)
    runs = [Run("a", "pytorch3dunet", 2.0, 30.0, 100.0), Run("a", "dtrain", 8.0, 15.0, 120.0)]
    runs += [Run("b", "pytorch3dunet", 2.0, 30.0, 100.0), Run("b", "dtrain", 8.0, 15.0, 121.0)]
    assert (ratio(runs, part, "samples_per_s"), ratio(runs, part, "cpu_ms")) == (0.25, 0.5)
    assert [(verdict.found, verdict.kept) for verdict in verdicts(runs, [part, lazy])] == [(0.25, True), (21.0, False)]


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
    child = subprocess.run([sys.executable, "-c", code, str(bench)], capture_output=True, text=True, timeout=200)
    assert 1 < float(child.stdout) < 100, child.stderr
    assert len(block) == 150_000_000


def peak_mb_source() -> str:
    """The function alone: its module imports torch."""
    tree = ast.parse((BENCH / "workload.py").read_text())
    return next(ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "peak_mb")


@pytest.mark.soak
def test_checkpoint_measures_the_stall_against_the_copy_and_judges_it(
    clean_env: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCH / "checkpoint.py"), "--parameters", "1000000", "--checkpoints", "3"]
    done = subprocess.run(
        [*command, "--json", "all.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(ok  |MISS)  a checkpoint's stall / the bare copy .* <= 1\.2$", done.stdout, re.M)
    data = json.loads((tmp_path / "all.json").read_text())
    assert [one["step"] for one in data["checkpoints"]] == [4, 8, 12]
    assert min(one["copy_s"] for one in data["checkpoints"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_scale_measures_sampler_ranks_and_journal(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "scale.py"), "--ranks", "2", "--samples", "100000000", "--steps", "20"]
    done = subprocess.run(
        [*command, "--json", "all.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "all.json").read_text())
    assert [one["samples"] for one in data["sampler"]] == [10**6, 10**8]
    assert max(one["peak_mb"] for one in data["sampler"]) < 8  # a permutation of the largest would take 800
    assert [one["ranks"] for one in data["together"]] == [2]
    assert min(data["together"][0].values()) > 0
    assert data["journal"]["lines"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_outage_takes_the_server_away_and_back_and_judges_the_steps(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "outage.py"), "--rounds", "1", "--seconds", "1", "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:ok  |MISS)  .*server (?:frozen|killed)", done.stdout, re.M)) == 6
    data = json.loads((tmp_path / "all.json").read_text())
    assert [span["server"] for span in data["spans"]] == ["there", "frozen", "there", "killed", "there"]
    assert min(span["steps"] for span in data["spans"]) > 0 and data["hint"] == ""
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


def test_an_outage_is_compared_with_the_spans_before_and_after(bench: Path) -> None:
    from outage import Span, ratios

    kinds = [("there", 2.0), ("frozen", 3.0), ("there", 4.0), ("killed", 3.0), ("there", 2.0), ("frozen", 6.0)]
    spans = [Span(kind, 0, 1, step_us=time) for kind, time in [*kinds, ("there", 4.0)]]
    assert ratios(spans, "frozen", "step_us") == [1.0, 2.0]
    assert ratios(spans, "killed", "step_us") == [1.0]
