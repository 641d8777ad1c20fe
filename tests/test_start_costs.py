"""What a start spends before its first step, counted instead of timed: imports, parsed files, searches for garbage."""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import neutral_env
from whole_runs import worlds_of

from dtrain.cli import main
from dtrain.config.check import check
from dtrain.config.load import load_config
from dtrain.config.signatures import SOURCE

PARTS = """
import gc, json, linecache, os, sys
from pathlib import Path
import torch
from dtrain.config.signatures import SOURCE

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 3)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.ones(2), torch.tensor(index % 3)

class Notes(torch.optim.SGD):
    def step(self, closure=None):
        note = Path(f"noted-{os.environ['RANK']}.json")
        if not note.exists():
            facts = {"modules": sorted(sys.modules), "collects": gc.isenabled(), "frozen": gc.get_freeze_count()}
            facts |= {"searches": [each["collections"] for each in gc.get_stats()], "usual": gc.get_threshold()}
            facts |= {"sources": sorted(name for name, entry in linecache.cache.items() if len(entry) > 1)}
            note.write_text(json.dumps(facts | {"parsed": sorted(SOURCE._modules)}))
        return super().step(closure)
"""
CONFIG = """
modules: [start_cost_parts]
device: cpu
model: {name: Net}
loaders: {name: Data, batch_size: 2, train: {}, val: {}}
loss: {name: CrossEntropyLoss}
metrics: {name: Accuracy, task: multiclass, num_classes: 3}
optimizer: {name: Notes, lr: 1e-3}
trainer: {max_steps: 1, checkpoint_dir: run, pictures: true}
mlflow: null
"""
# Each takes a part of a second and more; what needs it imports it when its time has come.
NOT_BEFORE_THE_FIRST_STEP = {
    "PIL", "accelerate", "dtrain.launch.doctor", "dtrain.launch.forecast", "dtrain.tracking.mlflow_store", "h5py",
    "lightning_utilities", "matplotlib", "mlflow", "monai", "nibabel", "onnx", "optuna", "pandas", "rich", "scipy",
    "sklearn", "sqlalchemy", "sqlite3", "tensorboard", "torchmetrics", "torchvision", "transformers", "zarr",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's own, in which the tests are."""
    (tmp_path / "start_cost_parts.py").write_text(PARTS)
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """What the processes of two ranks are like in their first step, with the variables that torchrun sets."""
    folder = tmp_path_factory.mktemp("start-costs")
    (folder / "start_cost_parts.py").write_text(PARTS)
    (folder / "c.yaml").write_text(CONFIG)
    command, found = [sys.executable, "-m", "dtrain", "c.yaml"], []
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=folder, env=neutral_env() | world, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
            for world in worlds_of(2)
        ]
        for rank, process in enumerate(ranks):
            stack.callback(process.kill)
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output.decode()
            found.append(json.loads((folder / f"noted-{rank}.json").read_text()))
    return found


@pytest.mark.slow
def test_nothing_that_the_first_step_does_not_need_is_imported_before_it(noted: list[Mapping[str, Any]]) -> None:
    for rank in noted:
        assert "torch._dynamo" in rank["modules"], "by torch's own optimizers, without which there is no step"
        assert NOT_BEFORE_THE_FIRST_STEP & set(rank["modules"]) == set()


@pytest.mark.slow
def test_of_what_is_imported_only_the_newest_is_searched_for_garbage_and_of_the_training_all(
    noted: list[Mapping[str, Any]],
) -> None:
    for rank in noted:
        young, middle, all_objects = rank["searches"]
        assert all_objects <= 1, "each looks at all objects that there are"
        assert young > 100, "else what torch leaves while it is imported takes 7 MB"
        assert middle <= 20
        assert rank["usual"] == list(gc.get_threshold()) and rank["collects"]
        assert rank["frozen"] > 100_000


@pytest.mark.slow
def test_the_lines_of_torchs_sources_are_not_kept(noted: list[Mapping[str, Any]]) -> None:
    """It reads some 25,000 of them while it is imported, most of these two files."""
    for rank in noted:
        assert not [name for name in rank["sources"] if name.endswith(("nn/functional.py", "_inductor/config.py"))]


@pytest.mark.slow
def test_what_was_parsed_for_the_check_is_given_back(noted: list[Mapping[str, Any]]) -> None:
    """But what says which way the metric is better, for which it is asked again."""
    kept = set(noted[0]["parsed"])
    assert "torchmetrics.classification.accuracy" in kept
    assert not {"dtrain.trainer", "torch.nn.modules.loss", "torch.nn.modules.module", "torchmetrics.metric"} & kept


def test_a_check_parses_only_what_may_have_the_names_of_the_config(project: Path) -> None:
    """Parsing is most of what a check takes; these are long, are searched for names, and cannot have them."""
    SOURCE.forget()
    check(load_config("c.yaml"))
    parsed = set(SOURCE._modules)
    SOURCE.forget()
    assert {"start_cost_parts", "torch.nn.modules.loss"} <= parsed
    unneeded = {"torch.nn.functional", "torch.nn.modules.module", "torch.optim.optimizer"}
    unneeded |= {"monai.transforms", "monai.losses", "monai.networks.nets"}
    assert unneeded & parsed == set()


def test_after_a_mistake_garbage_is_collected_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = gc.get_threshold()
    assert main(["c.yaml", "optimizer.lrr=1"]) == 2
    assert gc.isenabled() and gc.get_threshold() == usual
