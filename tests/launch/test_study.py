"""dtrain sweep by Optuna: what is drawn, pruned, killed and resumed, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from whole_runs import Place, last, same_training

from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.launch import study, sweep_parent, trials_at_work
from dtrain.launch.sweep import sweep
from dtrain.tracking import start_sender

CONFIG = {
    "model": {"name": "Linear", "in_features": 64, "out_features": 10},
    "device": "cpu",
    "loaders": {"name": "Digits", "batch_size": 64, "train": {"split": "train"}, "val": {"split": "val"}},
    "loss": {"name": "CrossEntropyLoss"},
    "optimizer": {"name": "SGD", "lr": 0.1},
    "trainer": {"max_epochs": 6},
    "mlflow": {"exit_timeout_seconds": 0},
}


class KilledError(BaseException):
    """The sweep's process is gone."""


class Scripted:
    """A trial that logs one value of its curve at each look; without one it fails, at None the sweep is killed."""

    curves: ClassVar[list[list[float | None]]] = []
    started: ClassVar[list[Scripted]] = []

    def __init__(self, arguments: list[str], _env: Mapping[str, str], _log: Path | None, _descriptors: Any) -> None:
        self.config = load_config(arguments[1], arguments[2:])
        self.folder = Path(self.config.trainer.checkpoint_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.curve, self.signals = [*self.curves.pop(0)], []
        self.fails = not self.curve
        self.started.append(self)

    def poll(self) -> int | None:
        if self.signals or not self.curve:
            return 75 if self.signals else 3 if self.fails else 0
        if (value := self.curve.pop(0)) is None:
            raise KilledError
        with (self.folder / "metrics.jsonl").open("a") as journal:
            journal.write(
                json.dumps({"kind": "metrics", "time": 1.0, "step": 20, "values": {"val/loss": value}}) + "\n"
            )
        best = self.folder / "checkpoints" / "best" / "manifest.json"
        best.parent.mkdir(parents=True, exist_ok=True)
        best.write_text(json.dumps({"score": value}))
        return None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep in this process: its signals are not taken, and nothing is sent to MLflow."""
    monkeypatch.setattr(start_sender, "_sender_command", lambda *arguments: ["true"])
    monkeypatch.setattr(sweep_parent, "PARENT_SECONDS", 0.0)
    monkeypatch.setattr(trials_at_work, "stop_signals", tuple)


@pytest.fixture
def scripted(alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Scripted]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(trials_at_work, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(trials_at_work, "start", Scripted)
    monkeypatch.setattr(Scripted, "started", [])
    (tmp_path / "some.yaml").write_text(json.dumps(CONFIG))
    return Scripted.started


def in_study(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """What Optuna itself finds."""
    return optuna.load_study(study_name="some", storage=f"sqlite:///{folder}/runs/some/sweep/study.db").trials


@pytest.mark.slow
def test_a_grid_is_pruned_by_the_journals(
    tmp_path: Path, scripted: list[Scripted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell, failures = optuna.Study.tell, [optuna.exceptions.StorageInternalError("the database is away")] * 2

    def sometimes(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return tell(*arguments, **options)

    monkeypatch.setattr(optuna.Study, "tell", sometimes)
    monkeypatch.setattr(study, "PAUSE_SECONDS", 0.0)
    # Two startup trials; then the third has 2.0 after one validation, worse than the median (1.0 + 0.9) / 2.
    Scripted.curves = [[1.0, 0.8, 0.6], [0.9, 0.7, 0.5], [2.0, 0.1, 0.1], [0.94, 0.4, 0.3], []]
    words = ["seed=range(5)", "sweep.pruner={name: MedianPruner, n_startup_trials: 2}"]
    assert sweep("some.yaml", words) == 1
    said = capsys.readouterr()
    assert said.err.count("the study's storage fails, it is tried again: the database is away") == 1
    assert "sweep: seed=2: pruned by MedianPruner after validation 1, val/loss 2 (3 of 5)" in said.out
    assert [each.signals for each in scripted] == [[], [], [signal.SIGTERM], [], []]
    found = in_study(tmp_path)
    assert [each.state.name for each in found] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "FAIL"]
    assert [each.value for each in found] == [0.6, 0.5, 2.0, 0.3, None]
    assert found[3].intermediate_values == {1: 0.94, 2: 0.4, 3: 0.3}
    reason = json.loads((tmp_path / "runs/some/seed=2/run.json").read_text())["reason"]
    assert reason == "pruned by MedianPruner after validation 1"
    with (tmp_path / "runs/some/sweep/trials.csv").open() as file:
        rows = [(row["trial"], row["status"], row["val/loss"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [
        ("seed=0", "finished", "0.6", "0"), ("seed=1", "finished", "0.5", "1"), ("seed=2", "pruned", "2.0", "2"),
        ("seed=3", "finished", "0.3", "3"), ("seed=4", "failed", "", "4"),
    ]  # fmt: skip
    journal = map(json.loads, (tmp_path / "runs/some/sweep/metrics.jsonl").read_text().splitlines())
    figures = [(each["step"], each["values"]["best/val/loss"]) for each in journal if each["kind"] == "metrics"]
    assert figures == [(1, 0.6), (2, 0.5), (3, 0.5), (4, 0.3), (5, 0.3)]
    best = load_config(tmp_path / "runs/some/sweep/best.yaml")
    assert (best.seed, best.trainer.checkpoint_dir, "sweep" in best) == (3, "runs/some-best", False)


@pytest.mark.slow
def test_a_sweep_that_was_killed_takes_its_trial_up_again(
    tmp_path: Path, scripted: list[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["optimizer.lr=loguniform(1e-4,1)", "loaders.batch_size=int(8,64,8)", "sweep.trials=4"]
    words.append("sweep.sampler={name: RandomSampler, seed: 3}")
    Scripted.curves = [[0.5, 0.4], [], [0.7, None]]
    with pytest.raises(KilledError):
        sweep("some.yaml", words)
    Scripted.curves = [[0.3], [0.9]]
    assert sweep("some.yaml", words) == 1  # one has failed
    settings = [(each.config.optimizer.lr, each.config.loaders.batch_size) for each in scripted]
    assert settings[3] == settings[2]
    assert len(set(settings)) == 4  # the seed has not drawn the first numbers again
    assert all(1e-4 <= lr <= 1 and batch in range(8, 65, 8) for lr, batch in settings)
    found = in_study(tmp_path)
    assert [each.state.name for each in found] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert found[2].intermediate_values == {1: 0.7, 2: 0.3}
    assert scripted[3].folder.name == f"trial=2,lr={settings[2][0]:.4g},batch_size={settings[2][1]}"
    assert load_config(tmp_path / "runs/some/sweep/best.yaml").optimizer.lr == settings[2][0]
    sweep("some.yaml", words)
    assert len(scripted) == 5  # nothing is repeated
    Scripted.curves = [[0.1]]
    sweep("some.yaml", [*words, "sweep.trials=5"])
    assert len(scripted) == 6

    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ConfigError, match=r"sweep.sampler: .*cmaes.*; install it"):
        sweep("some.yaml", [*words[:2], "sweep.sampler=CmaEsSampler", "sweep.trials=6"])
    for changed, message in {
        "loaders.val.batch_size=3": "has trials of another training: loaders.val.batch_size",
        "trainer.max_epochs=7": "trainer.max_epochs: .* -> 7",
        "trainer.mode=max": "it looks for the minimum|trainer.mode",
    }.items():
        with pytest.raises(ConfigError, match=message):
            sweep("some.yaml", [*words, changed])
    with pytest.raises(ConfigError, match=r"study 'some' of something else: optimizer.lr was from 0.0001 to 1.0"):
        sweep("some.yaml", ["optimizer.lr=1,2", "sweep.sampler=TPESampler"])
    with pytest.raises(ConfigError, match=r"sweep.storage: nosuch://here: "):
        sweep("some.yaml", [*words, "sweep.storage=nosuch://here"])


def test_what_cannot_be_sampled(
    tmp_path: Path, scripted: list[Scripted], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = "optimizer.lr=uniform(0.1,1)"
    with pytest.raises(ConfigError, match=r"no 'val': a sweep that samples or prunes compares validations"):
        sweep("some.yaml", [drawn, "loaders.val=null"])
    with pytest.raises(ConfigError, match=r"optimizer.momentum: expected"):
        sweep("some.yaml", [drawn, "model.in_features=int(1,2)", "optimizer.momentum=x"])
    assert sweep("some.yaml", [drawn, "sweep.trials=7"], dry_run=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# 7 trials by TPESampler, the min of val/loss; first:"
    assert lines[1].startswith("dtrain train some.yaml optimizer.lr=0.1 ")
    assert not (tmp_path / "runs").exists() or not scripted
    monkeypatch.setattr("dtrain.launch.sweep.version_of", lambda package: "")
    with pytest.raises(ConfigError, match=r"a range to draw from needs Optuna: pip install 'dtrain\[optuna\]'"):
        sweep("some.yaml", [drawn])


@pytest.mark.slow
def test_a_real_sweep_is_killed_resumed_and_pruned(
    place: Place, alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first trial has two epochs; the second would have 100,000, and the pruner ends it after four validations."""
    config = place.config("sweep-killed", trainer__checkpoint_every_steps=1, mlflow__exit_timeout_seconds=0)
    words = ["trainer.max_epochs=2,100000", "sweep.pruner={name: ThresholdPruner, lower: 2, n_warmup_steps: 4}"]
    run = place.path("sweep-killed")
    (killed,) = place.start("sweep", config, *words, do="train 3 rank 0 sleep")
    end = time.monotonic() + 250
    while not (
        run / "max_epochs=2/checkpoints/last/manifest.json"
    ).exists():  # of its second step: in the third it sleeps
        assert time.monotonic() < end, killed.output().text
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.result(200)
    assert place.tagged.wait_gone(200)  # the trial has ended with it

    class Fork:
        def __init__(self, arguments: list[str], _env: Any, _log: Any, _descriptors: Any) -> None:
            (running,) = place.start(*arguments)
            self.pid, self.poll = running.pid, running.process.poll

        def send_signal(self, number: int) -> None:
            os.kill(self.pid, number)

    monkeypatch.chdir(place.folder)
    monkeypatch.syspath_prepend(str(place.folder))
    monkeypatch.setattr(trials_at_work, "start", Fork)
    assert sweep(config, words) == 0
    out = capsys.readouterr().out
    assert "max_epochs=100000: pruned by ThresholdPruner after validation " in out
    facts = [json.loads((run / f"max_epochs={epochs}/run.json").read_text()) for epochs in (2, 100000)]
    assert [each["state"] for each in facts] == ["FINISHED", "KILLED"]
    assert [each["attempt"] for each in facts] == [2, 1]
    assert last(run / "max_epochs=100000").state["step"] >= 4 * 8
    place.run(str(run / "sweep/best.yaml"))
    same_training(run / "max_epochs=2", place.folder / "run-sweep-killed-best")
