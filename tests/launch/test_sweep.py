"""dtrain sweep: several trainings one after another, stopped, continued and skipped; folds and what joins them."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
from dtrain.launch import sweep as sweeping
from dtrain.launch.sweep import trials, values_of


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
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert values_of(f"key={text}") == values


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
    with pytest.raises(ConfigError) as error:
        trials(config, ["optimizer.lr=1e-3,high", "optimizer.name=SGD,Admaw"])
    assert len(error.value.mistakes) >= 2
    with pytest.raises(ConfigError, match="two trials would be called lr=1"):
        trials(config, ["optimizer.lr=1,1"])
    with pytest.raises(ConfigError, match=r"0\.\.9999 has more than 1000 values"):
        trials(config, ["seed=0..9999"])


def test_a_trial_that_fails_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeping._Running, "run", lambda self, command: int("fold=1" in " ".join(command)) * 3)
    monkeypatch.setattr(sweeping, "stop_signals", tuple)
    config = config_in(tmp_path)
    folds = ["loaders.folds.count=3", "loaders.folds.by=index"]
    assert sweeping.sweep(config, [*folds, "loaders.folds.fold=0..2"]) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[1].strip() for line in lines] == ["finished", "failed (3)", "finished"]
    assert sweeping.sweep(config, [*folds, "loaders.folds.fold=0,2"]) == 0


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
    assert "sweep: trial 1 of 2: fold=0" in stopped.stdout
    assert [line.split()[:3] for line in stopped.stdout.splitlines()[-2:]] == [
        *(["fold=0", "stopped", "early"], ["fold=1", "waiting", "run-sweep-folds/fold=1"])
    ]
    done = place.run(*command)
    assert done.stdout.count(" finished ") == 2
    assert "(standard deviation)" in done.stdout.splitlines()[-1]
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
    assert "sweep: trial" not in again.stdout
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
