"""dtrain sweep over a grid: trials stopped, continued, skipped, side by side, on SLURM; folds and what joins them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from safetensors.torch import load_file
from whole_runs import Place, close, figures, same_training

from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.data.folds import dealt
from dtrain.launch import sweep_parent, trials_at_work
from dtrain.launch.gpu_locks import Gpu, GpuLocks
from dtrain.launch.sweep import sweep, trials
from dtrain.launch.sweep_values import Draw, values_of
from dtrain.tracking import start_sender


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..3", ["0", "1", "2", "3"]),
        ("1e-3,1e-2", ["1e-3", "1e-2"]),
        ("3..1,7", ["3", "2", "1", "7"]),
        ("[1,2]", ["[1,2]"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{a: 1, b: 2},null", ["{a: 1, b: 2}", "null"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("1.5", ["1.5"]),
        ("", [""]),
        ("range(2,5)", ["2", "3", "4"]),
        ("range(3)", ["0", "1", "2"]),
        ("range(9, 1, -4),1", ["9", "5", "1"]),
        ("choice(SGD, AdamW)", ["SGD", "AdamW"]),
        ("case(\\d+)", ["case(\\d+)"]),
        ("'f(1,2)',g", ["'f(1,2)'", "g"]),
        ("uniform(0, 1)", Draw(0, 1)),
        ("uniform(0.5,2,0.5)", Draw(0.5, 2, 0.5)),
        ("loguniform(1e-5, 1e-2)", Draw(1e-5, 1e-2, is_log=True)),
        ("int(2,8,2)", Draw(2, 8, 2, is_integer=True)),
        ("logint(1,64)", Draw(1, 64, is_log=True, is_integer=True)),
    ],
)
def test_values(text: str, values: list[str] | Draw) -> None:
    assert values_of(f"key={text}") == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loguniform(0,1)", r"expected low below high and above 0, as in loguniform\(low, high\)"),
        ("uniform(1,1)", "expected low below high"),
        ("logunifrm(1,2)", "'logunifrm' is not a word; did you mean 'loguniform'"),
        (
            "interval(1,2)",
            r"'interval' is not a word; possible: range\(first, end, step\).*a text is written in quotes",
        ),
        ("int(1.5,3)", r"int\(...\) takes integers"),
        ("range(1,2,0)", "must not be 0"),
        ("range(2,2)", r"range\(2,2\) has no values"),
        ("range(2", r"'range\(2' has no closing bracket; expected range\(first, end, step\)"),
        ("range(a,b)", "expected numbers as in range"),
        ("1,uniform(1,2)", r"uniform\(1,2\) draws numbers, so it stands alone"),
    ],
)
def test_words_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        values_of(f"key={text}")


def config_in(folder: Path) -> str:
    sections = {
        "model": {"name": "Linear", "in_features": 64, "out_features": 10},
        "loaders": {"name": "Digits", "batch_size": 64, "train": {"split": "train"}},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "trainer": {"max_epochs": 1},
    }
    (folder / "some.yaml").write_text(json.dumps(sections))
    return str(folder / "some.yaml")


def test_every_combination_has_a_folder_of_its_own(tmp_path: Path) -> None:
    own = trials(config_in(tmp_path), ["optimizer.lr=1e-3,1e-2", "seed=0..2", "trainer.max_epochs=3"])
    names = [f"lr={lr},seed={seed}" for lr in ("1e-3", "1e-2") for seed in range(3)]
    assert [trial.name for trial in own] == names
    config = own[4].config
    assert (config.optimizer.lr, config.seed, config.trainer.max_epochs) == (0.01, 1, 3)
    assert config.trainer.checkpoint_dir == "runs/some/lr=1e-2,seed=1"
    assert config.run_name == "some-lr=1e-2,seed=1"


def test_mistakes_of_all_trials_before_any_starts(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(ConfigError, match="no key has several values; give one some, such as"):
        trials(config, ["optimizer.lr=1e-3"])
    with pytest.raises(ConfigError, match="run_name cannot be swept"):
        trials(config, ["run_name=a,b"])
    with pytest.raises(ConfigError) as error:
        trials(config, ["optimizer.lr=1e-3,high", "optimizer.name=SGD,Admaw"])
    assert len(error.value.mistakes) >= 2
    with pytest.raises(ConfigError, match="two trials would be called lr=1"):
        trials(config, ["optimizer.lr=1,1"])
    with pytest.raises(ConfigError, match=r"0\.\.9999 has more than 1000 values"):
        trials(config, ["seed=0..9999"])


def test_parameters_of_the_file_are_swept_unless_the_command_line_says_otherwise(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    words = 'sweep.parameters=["optimizer.lr=1e-3,1e-2", "seed=range(2)"]'
    assert len(trials(config, [words])) == 4
    assert [trial.name for trial in trials(config, [words, "seed=7"])] == ["lr=1e-3", "lr=1e-2"]
    assert [trial.name for trial in trials(config, [words, "seed=7,8,9", "optimizer.lr=1"])] == [
        f"seed={seed}" for seed in (7, 8, 9)
    ]
    assert "sweep" not in trials(config, [words])[0].config or trials(config, [words])[0].config.sweep is None
    for wrong, message in {
        "sweep.parameters=[seed]": "expected KEY=VALUES words such as .* found 'seed'",
        'sweep.parameters=["seed=range(1,1)"]': r"sweep.parameters.0: range\(1,1\) has no values",
        "sweep.trails=3": "did you mean 'trials'",
        "sweep.trials=0": "sweep.trials: must be at least 1",
        "sweep.pruner=MedianPrune": "did you mean 'MedianPruner'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            sweep(config, ["seed=1,2", wrong], dry_run=True)


class Fake:
    """A process that is over after so many looks; what it was started with is noted."""

    started: ClassVar[list[Any]] = []

    def __init__(self, arguments: list[str], env: Mapping[str, str], log: Path | None, descriptors: list[int]) -> None:
        self.arguments, self.env, self.log, self.descriptors = arguments, env, log, descriptors
        self.looks, self.signals = 0, []
        self.beside = [each for each in self.started if each.looks < 3]  # at work at the same time
        self.started.append(self)

    def poll(self) -> int | None:
        self.looks += 1
        return None if self.looks < 3 else 3 if "fold=1" in " ".join(self.arguments) else 0

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Fake]:
    """What a sweep in this process starts; nothing is sent to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(start_sender, "_sender_command", lambda *arguments: ["true"])
    monkeypatch.setattr(sweep_parent, "PARENT_SECONDS", 0.0)
    monkeypatch.setattr(trials_at_work, "stop_signals", tuple)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(trials_at_work, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(trials_at_work, "start", Fake)
    monkeypatch.setattr(Fake, "started", [])
    return Fake.started


def test_a_trial_that_fails_ends_no_other(
    tmp_path: Path, fakes: list[Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path)
    folds = ["loaders.folds.count=3", "loaders.folds.by=index", "device=cpu", "mlflow.exit_timeout_seconds=0"]
    assert sweep(config, [*folds, "loaders.folds.fold=0..2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("   fold=")] == [
        ["finished"], ["failed", "(3)"], ["finished"]
    ]  # fmt: skip
    assert "1 of 3 trials failed" in lines
    assert [each.log for each in fakes] == [None] * 3  # one after another: they write to the console
    assert sweep(config, [*folds, "loaders.folds.fold=0,2"]) == 0


def test_trials_side_by_side(tmp_path: Path, fakes: list[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(tmp_path)
    quick = ["mlflow.exit_timeout_seconds=0", "seed=range(5)"]
    assert sweep(config, ["device=cpu", *quick], jobs=2) == 0
    assert [len(each.beside) for each in fakes] == [0, 1, 0, 1, 0]  # never three at once
    assert {each.env["OMP_NUM_THREADS"] for each in fakes} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert fakes[1].log == Path("runs/some/sweep/logs/seed=1.log")

    # Three GPUs, of which another sweep has the second one; then trials of two each, of which only one has room.
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor n in 0 1 2; do echo "GPU $n: Model X (UUID: GPU-$n)"; done\n')
    smi.chmod(0o755)
    other = GpuLocks([Gpu("1", "GPU-1")]).take(1)
    assert other is not None
    fakes.clear()
    assert sweep(config, quick) == 0
    assert sorted({each.env["CUDA_VISIBLE_DEVICES"] for each in fakes}) == ["GPU-0", "GPU-2"]
    for each in fakes:  # no two at once on one
        assert all(each.env["CUDA_VISIBLE_DEVICES"] != one.env["CUDA_VISIBLE_DEVICES"] for one in each.beside)
    assert all(len(each.descriptors) == 1 for each in fakes)
    other.release()
    fakes.clear()
    assert sweep(config, quick, ranks="2") == 0
    assert [(each.env["CUDA_VISIBLE_DEVICES"], each.beside) for each in fakes] == [("GPU-0,GPU-1", [])] * 5
    assert fakes[0].arguments[:4] == ["launch", config, "--nproc-per-node", "2"]
    with pytest.raises(ConfigError, match="--nproc-per-node 4: this machine shows 3 GPU"):
        sweep(config, quick, ranks="4")
    with pytest.raises(ConfigError, match="device: 'cuda:1' names GPUs, and a sweep gives each trial its own"):
        sweep(config, [*quick, "device=cuda:1"])


@pytest.mark.slow
def test_a_grid_becomes_an_array_of_jobs(tmp_path: Path, fakes: list[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    config, cluster = config_in(tmp_path), ["cluster.time=1h", "mlflow.exit_timeout_seconds=0"]
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 42\n")
    sbatch.chmod(0o755)
    # As MLflow's sender would, had it been started.
    (tmp_path / "runs/some/sweep").mkdir(parents=True)
    (tmp_path / "runs/some/sweep/run.json").write_text('{"run_id": "0123abcd"}')
    assert sweep(config, [*cluster, "optimizer.lr=1e-3,1e-2", "seed=range(2)"], to_slurm=True) == 0
    assert "job 42: some, 1 node(s) x 1 rank(s), 4 jobs" in capsys.readouterr().out
    assert fakes == []
    configs = [load_config(file) for file in sorted(tmp_path.glob("runs/some.jobs/*/config-*.yaml"))]
    assert [(each.optimizer.lr, each.seed) for each in configs] == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert {each.mlflow.parent_run_id for each in configs} == {"0123abcd"}
    assert configs[1].trainer.checkpoint_dir == str(tmp_path / "runs/some/lr=1e-3,seed=1")
    with pytest.raises(ConfigError, match="--submit is for a grid"):
        sweep(config, [*cluster, "optimizer.lr=uniform(1,2)"], to_slurm=True)


@pytest.mark.slow
def test_a_sweep_is_stopped_continued_and_then_finished(place: Place) -> None:
    config = place.config(
        "sweep-folds",
        loaders={
            "name": "Points", "batch_size": 4, "folds": {"count": 2, "by": "index"}, "train": {"size": 24, "noise": 0},
        },
    )  # fmt: skip
    command = ["sweep", config, "loaders.folds.fold=0..1"]
    run = place.path("sweep-folds")
    stopped = place.run(*command, expect=75, do="train 2 rank 0 TERM")
    assert "sweep: fold=0: starts" in stopped.stdout
    rows = [line.split() for line in stopped.stdout.splitlines() if line.startswith("   fold=")]
    assert rows == [["fold=0", "stopped", "early"], ["fold=1", "waiting"]]
    done = place.run(*command)
    assert done.stdout.count("  finished  ") == 2
    assert "(standard deviation)" in done.stdout
    for fold in range(2):
        facts = json.loads((run / f"fold={fold}" / "run.json").read_text())
        assert facts["state"] == "FINISHED"
        assert load_config(run / f"fold={fold}" / "config.yaml").loaders.folds.fold == fold
    # The trial that was stopped is the same training as one by itself, bit for bit; on two ranks up to rounding.
    place.run(config, "trainer.checkpoint_dir=run-sweep-alone")
    same_training(run / "fold=0", place.path("sweep-alone"))
    place.run(config, "trainer.checkpoint_dir=run-sweep-two", "loaders.batch_size=2", ranks=2)
    close(figures(place.path("sweep-two")), figures(place.path("sweep-alone")))
    again = place.run(*command)
    assert "starts" not in again.stdout
    assert again.stdout.count("finished before") == 2
    _joined(place, config, run)


def _joined(place: Place, config: str, run: Path) -> None:
    """Predictions by both folds' models: of what each has not seen, and of other data by the mean."""
    models = []
    for fold in range(2):
        models.append(toy.MLP())
        models[-1].load_state_dict(load_file(run / f"fold={fold}/checkpoints/best/model.safetensors"))
        models[-1].eval()
    own, other = toy.Points(24), toy.Points(9, seed=1)
    with torch.no_grad():
        each = torch.stack([model(own.x).softmax(1) for model in models])
        mean = torch.stack([model(other.x).softmax(1) for model in models]).mean(0)
    folds = dealt([str(number) for number in range(24)], 2)

    place.run("predict", config, "--folds", str(run), "predictor.format=npy")
    found = np.load(run / "predictions/predictions.npy")
    assert np.abs(found - each[folds, range(24)].numpy()).max() < 1e-6
    data = ["loaders.test={size: 9, seed: 1}", "predictor.format=npy"]
    place.run("predict", config, "--checkpoint", str(run), "--output-dir", "mean-of-folds", *data)
    assert np.abs(np.load(place.folder / "mean-of-folds/predictions.npy") - mean.numpy()).max() < 1e-6
    several = [word for fold in range(2) for word in ("--checkpoint", str(run / f"fold={fold}"))]
    tested = place.run("test", config, *several, data[0])
    loss = float(re.search(r"loss[ =:]+([0-9.]+)", tested.stdout)[1])  # type: ignore[index]
    assert loss == pytest.approx(float(F.nll_loss(mean.log(), other.y)), abs=1e-3)
    refused = place.run("predict", config, "--folds", str(run), "loaders.folds.count=3", expect=2)
    assert "was trained with other loaders.folds: count 2, by index" in refused.stderr
