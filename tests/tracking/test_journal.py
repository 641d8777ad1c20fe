"""The journal: what rank 0 leaves on disk, whatever happens to it."""

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.tracking import start_sender
from dtrain.tracking.journal import Journal, NoJournal, flatten
from dtrain.tracking.run_folder import read_run, update_run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender has its own tests; here a process that does nothing stands in for it."""
    monkeypatch.setattr(start_sender, "_sender_command", lambda *arguments: [sys.executable, "-c", ""])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def journal_in(folder: Path, **settings: Any) -> Journal:
    return Journal(
        folder, **{"experiment": "digits", "run_name": "vit", "tracking_uri": str(folder / "store"), **settings}
    )


def lines_of(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=refuse) for line in lines]
    return [entry for entry in entries if not kind or entry["kind"] == kind]


# Flatten


def test_flatten_puts_dots_between_keys_and_counts_lists() -> None:
    config = {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "metrics": {"name": ["Accuracy"]}, "seed": None}
    assert flatten(config) == {
        "optimizer.lr": 1e-3,
        "optimizer.betas.0": 0.9,
        "optimizer.betas.1": 0.99,
        "metrics.name.0": "Accuracy",
        "seed": None,
    }


def test_flatten_loses_no_value() -> None:
    config = {"empty": {}, "none": [], "a": {"b": 1}, "a.b": 2, 3: {"x": [[1, 2], {"y": 4}]}}
    flat = flatten(config)
    assert flat["empty"] == {} and flat["none"] == []
    assert flat["a.b"] == 1 and flat["a.b#2"] == 2
    assert flat["3.x.1.y"] == 4


def test_flatten_takes_a_config_dict() -> None:
    config_dict = pytest.importorskip("ml_collections").ConfigDict
    assert flatten(config_dict({"model": {"name": "ViT", "image_size": (8, 8)}})) == {
        "model.name": "ViT",
        "model.image_size.0": 8,
        "model.image_size.1": 8,
    }


# The journal


def test_a_run_folder_holds_no_secret(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, tracking_uri="http://me:hunter2@127.0.0.1:9")
    params = {"loaders.api_key": "hunter2", "mlflow.tracking_uri": "http://me:hunter2@127.0.0.1:9", "model.tokens": 4}
    journal.start(params, {"mlflow.source.name": "train.py db_password=hunter2"})
    journal.finish("FAILED", "could not reach http://me:hunter2@host", 1)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "hunter2" not in written
    assert lines_of(tmp_path, "params")[0]["values"]["model.tokens"] == "4"


def test_a_run_from_start_to_finish(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    journal.start({"optimizer.lr": 1e-3, "seed": None}, {"mine": "x"}, [("config.yaml", "")], world_size=2)
    assert read_run(tmp_path)["state"] == "RUNNING" and read_run(tmp_path)["pid"] == os.getpid()
    journal.log(50, {"train/loss": 0.5, "lr": 1e-3})
    journal.artifact(str(tmp_path / "checkpoints" / "best"), "weights")
    journal.finish("FINISHED", "", 0)

    entries = lines_of(tmp_path)
    assert [entry["kind"] for entry in entries] == ["start", "tags", "params", "artifact", "metrics", "artifact", "end"]
    tags = entries[1]["values"]
    assert tags["dtrain.checkpoint_dir"] == str(tmp_path)
    assert tags["mine"] == "x" and tags["world_size"] == "2" and tags["host"] and tags["mlflow.source.name"]
    assert entries[2]["values"] == {"optimizer.lr": "0.001", "seed": "None"}
    assert entries[3]["path"] == "config.yaml" and entries[5]["path"] == "checkpoints/best"
    assert entries[4]["step"] == 50 and entries[4]["values"] == {"train/loss": 0.5, "lr": 1e-3}
    facts = read_run(tmp_path)
    assert (facts["state"], facts["exit_status"], facts["world_size"], facts["run_id"]) == ("FINISHED", 0, 2, None)
    assert facts["started"] <= entries[0]["time"] <= facts["ended"]


def test_figures_that_are_no_finite_numbers_keep_the_file_strict_json(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    journal.log(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 3})
    journal.finish("FINISHED")
    assert lines_of(tmp_path, "metrics")[0]["values"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 3.0}


def test_bad_figures_cost_one_warning_each_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    journal = journal_in(tmp_path)
    journal.start({}, {})
    for step in (1, 2):
        figures = {"none": None, "text": "0.3", "two": torch.zeros(2), "one": torch.tensor([0.5]), "true": True}
        journal.log(step, figures)
    journal.finish("FINISHED")
    assert [entry["values"] for entry in lines_of(tmp_path, "metrics")] == [{"one": 0.5, "true": 1.0}] * 2
    assert sorted(record.getMessage().split()[0] for record in caplog.records) == ["none", "text", "two"]


def test_a_key_gets_one_figure_per_step_also_after_a_resume(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    for step in (10, 20, 20, 30):
        journal.log(step, {"train/loss": step, "lr": step})
    journal.log(5, {"val/loss": 5})
    journal.finish("KILLED", "SIGTERM", 75)

    resumed = journal_in(tmp_path)
    resumed.start({}, {})
    for step in (20, 30, 40):
        resumed.log(step, {"train/loss": -step, "new": step})
    resumed.finish("FINISHED")
    entries = lines_of(tmp_path, "metrics")
    assert [entry["step"] for entry in entries if "train/loss" in entry["values"]] == [10, 20, 30, 40]
    assert [entry["step"] for entry in entries if "new" in entry["values"]] == [20, 30, 40]
    assert [entry["attempt"] for entry in lines_of(tmp_path, "start")] == [1, 2]


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    update_run(tmp_path, run_id="abc")
    journal.finish("KILLED", "time limit", 75)
    before = read_run(tmp_path)
    resumed = journal_in(tmp_path)
    resumed.start({}, {})
    facts = read_run(tmp_path)
    resumed.finish("FINISHED")
    assert [facts[key] for key in ("id", "run_id", "started")] == [before[key] for key in ("id", "run_id", "started")]
    assert (facts["state"], facts["reason"], facts["exit_status"], facts["ended"]) == ("RUNNING", "", None, None)


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    journal.log(1, {"a": 1})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "time": 1.0, "st')
    resumed = journal_in(tmp_path)
    resumed.start({}, {})
    resumed.log(2, {"a": 2})
    resumed.finish("FINISHED")
    assert [entry["step"] for entry in lines_of(tmp_path, "metrics")] == [1, 2]


def test_a_full_disk_costs_a_warning_and_no_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))  # the file can grow by a third of a line
    try:
        for step in range(100):
            journal.log(step, {"a": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 30
    journal.log(100, {"a": 100})
    assert journal.finish("FINISHED") == ""
    assert [entry["step"] for entry in lines_of(tmp_path, "metrics")] == list(range(101))
    assert len([record for record in caplog.records if "metrics.jsonl" in record.getMessage()]) == 1


def test_a_kill_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    script = """
import sys
from dtrain.tracking import start_sender
from dtrain.tracking.journal import Journal
start_sender._sender_command = lambda *arguments: [sys.executable, "-c", ""]
journal = Journal(sys.argv[1], experiment="e", run_name="r", tracking_uri=sys.argv[1])
journal.start({}, {})
for step in range(10**9):
    journal.log(step, {"a": step})
    print(step, flush=True)
"""
    rank0 = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert rank0.stdout is not None
    for line in rank0.stdout:
        if int(line) >= 500:
            break
    rank0.kill()
    acknowledged = [int(line), *map(int, rank0.stdout.read().split())]
    rank0.wait(200)
    rank0.stdout.close()
    written = (tmp_path / "metrics.jsonl").read_text().count('"metrics"')
    assert written >= acknowledged[-1] + 1


def test_files_that_leave_the_run_folder_are_refused(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.start({}, {})
    for path, to in [("../x", ""), ("/etc/passwd", ""), ("x", "../y"), ("x", "/y")]:
        with pytest.raises(ValueError, match="must stay inside"):
            journal.artifact(path, to)
    journal.finish("FINISHED")


def test_a_file_may_be_given_by_another_way_to_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "scratch").symlink_to("disk")
    journal = journal_in(tmp_path / "scratch" / "runs")
    journal.start({}, {})
    journal.artifact(str(tmp_path / "disk" / "runs" / "best" / "model.safetensors"))
    journal.finish("FINISHED")
    assert lines_of(tmp_path / "disk" / "runs", "artifact")[0]["path"] == "best/model.safetensors"


def test_wrong_use_is_an_error(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    with pytest.raises(RuntimeError, match="call start"):
        journal.log(1, {"a": 1})
    journal.start({}, {})
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        journal.finish("DONE")  # type: ignore[arg-type]
    assert journal.finish("FINISHED") == ""
    assert journal.finish("FAILED") == ""  # an error path that does not know
    assert read_run(tmp_path)["state"] == "FINISHED"
    with pytest.raises(RuntimeError, match="nothing after finish"):
        journal.log(2, {"a": 1})


def test_a_sender_that_delivers_nothing_costs_a_hint_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        start_sender, "_sender_command", lambda *arguments: [sys.executable, "-c", "import time; time.sleep(1000)"]
    )
    folder = tmp_path / "a run"
    journal = journal_in(folder, exit_timeout_seconds=0.2)
    journal.start({}, {})
    hint = journal.finish("FINISHED")
    assert f"dtrain sync '{folder}'" in hint and "\n" not in hint and "Nothing is lost" in hint
    assert "its sender was still at work" in hint


def test_the_other_ranks_journal_has_the_same_methods() -> None:
    def signatures(kind: type) -> dict[str, inspect.Signature]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in methods if not name.startswith("_")}

    assert signatures(NoJournal) == signatures(Journal)


def test_the_other_ranks_journal_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = NoJournal()
    journal.start({"a": 1}, {}, [("x", "")], world_size=2)
    journal.log(1, {"a": 1})
    journal.artifact("x")
    assert journal.finish("FAILED", "x", 1) == ""
    journal.close()
    assert list(tmp_path.iterdir()) == []


# Run.json


def test_damaged_run_facts_do_not_stop_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "a')
    journal = journal_in(tmp_path)
    journal.start({}, {})
    journal.finish("FINISHED")
    assert read_run(tmp_path)["state"] == "FINISHED"
    assert "run.json is damaged" in caplog.text


def test_the_journal_needs_neither_mlflow_nor_torch() -> None:
    script = (
        "import sys, dtrain.tracking.journal\nprint(sorted({'mlflow', 'torch', 'accelerate'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=200)
    assert done.stdout.strip() == "[]", done.stderr


def test_signals_that_end_a_rank_leave_its_journal_whole(tmp_path: Path) -> None:
    script = """
import sys, os, signal
from dtrain.tracking import start_sender
from dtrain.tracking.journal import Journal
start_sender._sender_command = lambda *arguments: [sys.executable, "-c", ""]
journal = Journal(sys.argv[1], experiment="e", run_name="r", tracking_uri=sys.argv[1])
journal.start({}, {})
journal.log(1, {"a": 1})
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=REPOSITORY, timeout=200)
    assert done.returncode == -signal.SIGTERM
    assert [entry["kind"] for entry in lines_of(tmp_path)] == ["start", "tags", "params", "metrics"]
