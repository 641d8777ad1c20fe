"""dtrain predict: settings, signals, several ranks."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import RunCli
from predicting import (
    random_volume,
    read,
)
from torch import nn

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.trainer import create_trainer

CONFIG = """
modules: [slow]
model: {{name: Slow}}
loaders:
  name: LazyHDF5Dataset
  raw_internal_path: raw
  batch_size: 2
  slice_builder: {{name: SliceBuilder, patch_shape: [8, 16, 16], stride_shape: [4, 8, 8], halo_shape: [2, 2, 2]}}
  predict: {{file_paths: [{files}], label_internal_path: null}}
predictor: {{slab_planes: 4, activation: none}}
trainer: {{checkpoint_dir: run}}
"""
SLOW = """
import os, time
from pathlib import Path
import torch

class Slow(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, x):
        with open(f"calls-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(f"{len(x)}\\n")
        self.calls += 1
        if "STOP" in os.environ:
            self.stop(*map(int, os.environ["STOP"].split()))
        return super().forward(x)

    def stop(self, parts, signal):
        '''Once so many parts are on the disk; by the 16th call there must be as many.'''
        def there():
            return len(list(Path("run/predictions").glob(".dtrain/*/*/*.npy")))
        while self.calls >= 16 and there() < parts:
            time.sleep(0.02)
        if there() >= parts:
            del os.environ["STOP"]
            os.kill(os.getpid(), signal)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with two volumes, a config and weights."""
    for number, depth in enumerate((40, 22)):
        with h5py.File(tmp_path / f"cells{number}.h5", "w") as file:
            file["raw"] = random_volume(depth, 24, 24, seed=number)[0]
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "predict.yaml").write_text(CONFIG.format(files="cells0.h5, cells1.h5"))
    torch.manual_seed(0)
    torch.save(nn.Conv3d(1, 1, 3, padding=1).state_dict(), tmp_path / "weights.pt")
    return tmp_path


COMMAND = ["predict", "predict.yaml", "--checkpoint", "weights.pt"]


def calls(folder: Path) -> int:
    return sum(int(line) for path in folder.glob("calls-*") for line in path.read_text().split())


def expected(folder: Path, number: int) -> np.ndarray:
    model = nn.Conv3d(1, 1, 3, padding=0)
    model.load_state_dict(torch.load(folder / "weights.pt"))
    with h5py.File(folder / f"cells{number}.h5") as file, torch.inference_mode():
        image = np.pad(file["raw"], 1, mode="reflect")
        return model(torch.from_numpy(image)[None, None])[0].numpy()


def test_the_command_on_one_process_and_on_two_ranks(project: Path, run_cli: RunCli) -> None:
    inputs = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in project.glob("*.h5")}
    done = run_cli(COMMAND)
    assert done.rc == 0, done.text
    assert "predictions: 2 files in run/predictions" in done.stdout
    patches = calls(project)
    assert patches == 9 * 4 + 5 * 4
    for number in range(2):
        found = read(project / f"run/predictions/cells{number}_predictions.h5")
        assert np.abs(found - expected(project, number)).max() < 1e-5
    done = run_cli([*COMMAND, "--output-dir", "shared"], nproc=2)
    assert done.rc == 0, done.text
    assert calls(project) - patches <= patches + 8
    assert min(calls(path.parent) and len(path.read_text()) for path in project.glob("calls-*")) > 20
    for number in range(2):
        name = f"cells{number}_predictions.h5"
        assert np.array_equal(read(project / "shared" / name), read(project / "run/predictions" / name))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in inputs} == inputs


def test_killed_and_stopped_predictions_continue(project: Path, run_cli: RunCli) -> None:
    output = project / "run" / "predictions"

    def interrupted(parts: int, number: signal.Signals) -> int:
        return run_cli(COMMAND, env={"STOP": f"{parts} {int(number)}"}).rc

    assert interrupted(2, signal.SIGKILL) == -signal.SIGKILL
    first = calls(project)
    assert interrupted(5, signal.SIGTERM) == 75
    assert not list(output.glob("*.h5"))
    done = run_cli(COMMAND)
    assert done.rc == 0, done.text
    assert calls(project) < 64 + 2 * 24  # what straddles, what was under way; not everything anew
    assert first < 40
    for number in range(2):
        assert np.abs(read(output / f"cells{number}_predictions.h5") - expected(project, number)).max() < 1e-5
    assert sorted(path.name for path in (output / ".dtrain").iterdir()) == [
        *("cells0_predictions.h5.json", "cells1_predictions.h5.json", "lock")
    ]
    again = run_cli([*COMMAND, "predictor.blend=constant"])
    assert again.rc == 2
    assert "predictions made differently: cells0_predictions.h5 (patches)" in again.stderr
    assert len(again.stderr.splitlines()) == 1


MODEL = "model: {name: Linear, in_features: 1, out_features: 1}\n"


def mistakes_of(text: str, folder: Path, purpose: str) -> list[str]:
    file = folder / "c.yaml"
    file.write_text(text)
    try:
        check(load_config(file), purpose)
    except ConfigError as error:
        return [str(item.text) for item in error.mistakes]
    return []


@pytest.mark.parametrize(
    ("text", "purpose", "lines"),
    [
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}",
            "predict",
            [],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, test: {}}",
            "predict",
            [],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, train: {}}",
            "predict",
            ["loaders: has no 'predict' and no 'test', so there is nothing to predict"],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}",
            "test",
            [
                "loaders: has no 'test', so there is nothing to test on",
                "loss: missing, such as loss: {name: CrossEntropyLoss}",
            ],
        ),
        (
            MODEL + "loaders: {name: Digits, split: test, predict: {}}\n"
            "predictor: {name: StandardPredictor, patch_shap: [1], batch_size: 0, blend: mean}",
            "predict",
            [
                "predictor.batch_size: must be at least 1, found 0",
                "predictor.blend: expected one of 'gaussian', 'constant', 'last', found string 'mean'",
                "predictor.patch_shap: predictor got an unexpected argument 'patch_shap'; did you mean 'patch_shape'",
            ],
        ),
    ],
)
def test_what_a_config_must_have_depends_on_its_use(tmp_path: Path, text: str, purpose: str, lines: list[str]) -> None:
    found = sorted(mistakes_of(text, tmp_path, purpose))
    assert len(found) == len(lines), found
    assert all(one.startswith(line) for one, line in zip(found, lines, strict=True)), found


def test_no_checkpoint_and_weights_that_do_not_fit_are_one_line(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    config = load_config(project / "predict.yaml")
    with pytest.raises(ConfigError, match="holds no checkpoint; train first, or name one: --checkpoint"):
        create_trainer(config, purpose="predict").predict()
    torch.save(nn.Conv3d(1, 2, 3).state_dict(), project / "other.pt")
    with pytest.raises(ConfigError, match=r"other.pt does not fit the model: other shape: weight is \(2, 1, 3, 3, 3\)"):
        create_trainer(config, purpose="predict").predict("other.pt")
    with pytest.raises(ConfigError, match="nothing to train on"):
        create_trainer(config, purpose="predict").fit()


def test_a_test_measures_whole_volumes_where_there_is_a_predictor(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    for number in range(2):
        with h5py.File(project / f"cells{number}.h5", "a") as file:
            file["label"] = (expected(project, number)[0] > 0.1).astype(np.uint8)
    changes = [
        "loaders.test={file_paths: [cells0.h5, cells1.h5], label_internal_path: label}",
        "loss.name=BCEWithLogitsLoss",
    ]
    changes += ["metrics.name=BinaryIoU"]
    whole = create_trainer(load_config(project / "predict.yaml", changes), purpose="test").test(project / "weights.pt")
    both, either = 0, 0
    for number in range(2):
        a, b = expected(project, number)[0] > 0, expected(project, number)[0] > 0.1
        both, either = both + (a & b).sum(), either + (a | b).sum()
    assert whole == {"test/BinaryIoU": pytest.approx(both / either, abs=1e-3)}


TWO_WAYS = """
modules: [wide]
model: {name: Wide}
loaders:
  name: LazyHDF5Dataset
  batch_size: 2
  slice_builder: {name: SliceBuilder, patch_shape: [8, 12, 12], stride_shape: [3, 5, 7]}
  test: {file_paths: [cells0.h5, cells1.h5]}
loss: {name: CrossEntropyLoss}
metrics:
  name: [MeanIoU, DiceCoefficient, MulticlassAccuracy]
  MeanIoU: {num_classes: 3}
  DiceCoefficient: {num_classes: 3}
  MulticlassAccuracy: {num_classes: 3, average: micro}
predictor: {}
trainer: {checkpoint_dir: run}
"""
WIDE = """
import torch

class Wide(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 3, 5, padding=2)  # without a halo, patches disagree at their borders
"""


def test_a_test_gives_the_figures_of_what_a_prediction_wrote(tmp_path: Path, run_cli: RunCli) -> None:
    """Each figure is computed here from the files; probabilities that were averaged would give others."""
    (tmp_path / "wide.py").write_text(WIDE)
    (tmp_path / "both.yaml").write_text(TWO_WAYS)
    torch.manual_seed(1)
    model = nn.Conv3d(1, 3, 5, padding=2)
    model.weight.data *= 20  # sure of itself: the mean of logits is far from that of probabilities
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for number, depth in enumerate((14, 9)):
        with h5py.File(tmp_path / f"cells{number}.h5", "w") as file:
            file["raw"] = random_volume(depth, 24, 26, seed=number)[0]
            file["label"] = np.random.default_rng(number).integers(0, 3, (depth, 24, 26)).astype(np.uint8)
    done = run_cli(["predict", "both.yaml", "--checkpoint", "weights.pt"])
    assert done.rc == 0, done.text
    both, found, there = (np.zeros(3) for _ in range(3))
    products, squares, right, voxels = np.zeros(3), np.zeros(3), 0, 0
    for number in range(2):
        probabilities = read(tmp_path / f"run/predictions/cells{number}_predictions.h5").astype(np.float64)
        assert np.allclose(probabilities.sum(0), 1, atol=1e-6)
        with h5py.File(tmp_path / f"cells{number}.h5") as file:
            label = np.asarray(file["label"])
        truth, classes = np.stack([label == k for k in range(3)]), probabilities.argmax(0)
        predicted = np.stack([classes == k for k in range(3)])
        space = (1, 2, 3)
        both, found, there = (
            both + (truth & predicted).sum(space),
            found + predicted.sum(space),
            there + truth.sum(space),
        )
        products, squares = products + (probabilities * truth).sum(space), squares + (probabilities**2).sum(space)
        right, voxels = right + (classes == label).sum(), voxels + label.size
    expected = {
        "MeanIoU": (both / (found + there - both)).mean(),
        "DiceCoefficient": (2 * products / (squares + there)).mean(),
        "MulticlassAccuracy": right / voxels,
    }
    for nproc in (1, 2):
        done = run_cli(["test", "both.yaml", "--checkpoint", "weights.pt"], nproc=nproc)
        assert done.rc == 0, done.text
        line = next(line for line in done.stdout.splitlines() if "  test  M" in line)
        figures = {name: float(value) for name, value in re.findall(r"([A-Z]\w+) ([0-9.]+)", line)}
        assert figures == pytest.approx(expected, abs=6e-5), done.text  # four digits are printed


def test_a_regression_is_written_as_it_is_measured(project: Path, run_cli: RunCli) -> None:
    """No sigmoid of what was trained with a squared error: the file gives the figure of the test."""
    for number in range(2):
        with h5py.File(project / f"cells{number}.h5", "a") as file:
            file["clean"] = expected(project, number)[0] + 3
    changes = ["loaders.test={file_paths: [cells0.h5, cells1.h5], label_internal_path: clean}", "predictor={}"]
    changes += ["loss.name=MSELoss", "metrics.name=MSE", "loaders.slice_builder.halo_shape=[0, 0, 0]"]
    done = run_cli([*COMMAND, *changes])
    assert done.rc == 0, done.text
    assert "predictor.activation: none, as loss has it" in done.stdout
    errors = []
    for number in range(2):
        found = read(project / f"run/predictions/cells{number}_predictions.h5").astype(np.float64)
        with h5py.File(project / f"cells{number}.h5") as file:
            errors.append(((found[0] - file["clean"]) ** 2).ravel())
    done = run_cli(["test", *COMMAND[1:], *changes])
    assert done.rc == 0, done.text
    figure = float(re.search(r"  test  MSE ([0-9.]+)", done.stdout)[1])
    assert figure == pytest.approx(np.concatenate(errors).mean(), rel=1e-3)
    assert figure == pytest.approx(9, abs=0.5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_4_gb_are_predicted_in_less_than_1_gb(tmp_path: Path, run_cli: RunCli) -> None:
    with h5py.File(tmp_path / "large.h5", "w") as file:
        raw = file.create_dataset("raw", (1024, 1024, 1024), "f4", chunks=(16, 128, 128))
        for low in range(0, 1024, 16):
            raw[low : low + 16] = random_volume(16, 1024, 1024, seed=low)[0]
    (tmp_path / "slow.py").write_text(SLOW + "\nimport atexit, resource\natexit.register(lambda: print('PEAK', "
                                      "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))\n")  # fmt: skip
    config = CONFIG.format(files="large.h5").replace("[8, 16, 16], stride_shape: [4, 8, 8]",
                                                     "[32, 128, 128], stride_shape: [28, 112, 112]")  # fmt: skip
    (tmp_path / "predict.yaml").write_text(config.replace("slab_planes: 4", "slab_planes: null"))
    torch.save(nn.Conv3d(1, 1, 3, padding=1).state_dict(), tmp_path / "weights.pt")
    done = run_cli(COMMAND, timeout=3000)
    assert done.rc == 0, done.text
    assert int(done.stdout.rpartition("PEAK ")[2].split()[0]) < 1000, done.stdout
