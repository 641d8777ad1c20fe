"""`dtrain export`: files that compute what numpy does with the best weights, in batches of any size; refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dtrain import cli
from dtrain.checkpoint.checkpoint_folder import Checkpoints

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)
    def forward(self, x):
        return torch.relu(self.drop(self.layer(x)))

class Two(Net):
    def forward(self, left, right):
        return {"out": super().forward(left), "sum": left.sum(1) + right}

class Branches(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

class Fixed(Net):
    def forward(self, x):
        return super().forward(x) + torch.ones(len(x), 1)

class Draws(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(3)

class Data(torch.utils.data.Dataset):
    def __init__(self, form="pair"):
        self.form = form
    def __len__(self):
        return 6
    def __getitem__(self, index):
        x = torch.arange(4.0) * (index - 2)
        return (x, 0) if self.form == "pair" else {"left": x, "right": x[1], "label": 0}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two checkpoints, of which the first is the best; its averaged weights are other ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported_parts.py").write_text(MODULE)
    folder = tmp_path / "run"
    write(folder, {"name": "Net"})
    checkpoints = Checkpoints(folder / "checkpoints", mode="max")
    for step, score in ((3, 0.9), (5, 0.1)):
        torch.manual_seed(step)
        weights = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 3)}).state_dict()
        averaged = {name: value * 2 for name, value in weights.items()}
        checkpoints.save(step, weights, {}, ema=averaged, score=score)
    return folder


def write(folder: Path, model: dict[str, Any], form: str = "pair") -> Path:
    config = {
        "modules": ["exported_parts"],
        "device": "cpu",
        "model": model,
        "loaders": {"name": "Data", "form": form, "batch_size": 4, "test": {}},
        "metrics": {"name": "MeanSquaredError"},
        "trainer": {"max_epochs": 1, "checkpoint_dir": str(folder)},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def by_hand(x: np.ndarray) -> np.ndarray:
    """Of the averaged weights of step 3."""
    torch.manual_seed(3)
    layer = torch.nn.Linear(4, 3)
    weight, bias = (item.detach().numpy() * 2 for item in (layer.weight, layer.bias))
    return np.maximum(x @ weight.T + bias, 0)


X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@pytest.mark.slow
def test_a_torch_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--format", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"exported    {run}/model.pt2")
    shown = re.fullmatch(r"difference  at most 0 from the model, whose outputs come to (\S+), in (.*)", lines[2])
    data = np.arange(4, dtype=np.float32) * np.arange(-2, 2, dtype=np.float32)[:, None]
    assert shown and shown[2] == "batches of 4 and 1 samples"
    assert float(shown[1]) == pytest.approx(by_hand(data).max(), rel=1e-2)
    facts = {"dtrain.json": ""}
    module = torch.export.load(run / "model.pt2", extra_files=facts).module()
    assert np.allclose(module(torch.from_numpy(X)).detach().numpy(), by_hand(X), atol=1e-6)
    known = json.loads(facts["dtrain.json"])
    assert (known["inputs"], known["step"], known["model"]) == (["x"], 3, "Net") and len(known["config_sha256"]) == 64


@pytest.mark.slow
def test_onnx_files_of_one_and_of_several_inputs(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    assert cli.main(["export", str(run / "config.yaml")]) == 0
    file = onnx.load(run / "model.onnx")
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {item.key: item.value for item in file.metadata_props}["dtrain.step"] == "3"
    assert np.allclose(ReferenceEvaluator(file).run(None, {"x": X})[0], by_hand(X), atol=1e-6)

    config = write(run, {"name": "Two"}, form="dict")
    assert cli.main(["export", str(config), "--output", "two.onnx"]) == 0
    right = np.arange(5, dtype=np.float32)
    given = ReferenceEvaluator("two.onnx").run(["out", "sum"], {"left": X, "right": right})
    assert np.allclose(given[0], by_hand(X), atol=1e-6) and np.allclose(given[1], X.sum(1) + right, atol=1e-5)


REFUSED = {
    "Branches": "its way depends on the values of tensors (if x.sum() > 0, .item(), .tolist()), which a graph ",
    "Fixed": "its code fixes the batch size (len(x), int(...), a loop over samples): write x.shape[0] or -1",
    "Draws": "for a batch of 4 the file's output differs from the model's by ",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_be_exported_is_explained(run: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(run, {"name": model})
    (run / "model.pt2").write_text("an older file")
    assert cli.main(["export", str(config), "--format", "torch"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{model} is not exported: {REFUSED[model]}") and error.count("\n") == 1
    assert model == "Draws" or re.search(r"exported_parts\.py:\d+\)", error)
    assert (run / "model.pt2").read_text() == "an older file"
    assert not list(run.glob(".*model*"))


def test_what_is_wrong_with_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refusal(*words: str) -> str:
        assert cli.main(["export", *words]) == 2
        return capsys.readouterr().err

    assert refusal(str(run), "--output", "a.pt") == "--output a.pt: a file of --format onnx ends in .onnx\n"
    assert refusal(str(tmp_path)) == f"dtrain export: {tmp_path} is not a run folder: it has no config.yaml\n"
    monkeypatch.setattr("dtrain.launch.export.version_of", lambda name: "")
    assert refusal(str(run)).startswith("--format onnx needs onnx and onnxscript: pip install 'dtrain[export]'")
    (tmp_path / "empty").mkdir()
    assert "empty holds no checkpoint" in refusal(str(run / "config.yaml"), "trainer.checkpoint_dir=empty")
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--input-shape", "3x4"])
    assert "expected sizes with commas between them, such as 3,224,224, not '3x4'" in capsys.readouterr().err


def test_what_is_neither_a_run_nor_a_config_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "runs/gone"]) == 2
    assert capsys.readouterr().err == "dtrain export: runs/gone is neither a run folder nor a YAML file\n"


def test_a_full_disk_is_one_line_with_the_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dtrain.launch.export._write_onnx", full)
    assert cli.main(["export", "run", "--output", "model.onnx"]) == 1
    assert capsys.readouterr().err == "dtrain export: model.onnx: No space left on device\n"
    assert not Path("model.onnx").exists()
