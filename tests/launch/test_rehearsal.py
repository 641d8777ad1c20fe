"""dtrain check on the real command line: what a training would do only after an epoch, or at its very end, is tried."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from conftest import RunCli

PARTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, grows=False, normalised=False, with_step=False):
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4) if normalised else nn.Identity()
        self.grows = grows
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.grows:
            self.seen = torch.cat([self.seen, torch.zeros(1)])
        return self.norm(self.layer(x))

class Data(torch.utils.data.Dataset):
    def __init__(self, size=9): self.size = size
    def __len__(self): return self.size
    def __getitem__(self, index): return torch.ones(2) * index, torch.tensor(index % 4)

class Loss(nn.Module):
    def __init__(self, grows=False):
        super().__init__()
        self.scale, self.grows = nn.Parameter(torch.zeros(())), grows
        self.register_buffer("counts", torch.zeros(1))

    def forward(self, output, target):
        if self.grows:
            self.counts = torch.cat([self.counts, torch.zeros(1)])
        return nn.functional.cross_entropy(output * self.scale.exp(), target)

class NeedsMore(torch.optim.SGD):
    def step(self): return [group["no_such_key"] for group in self.param_groups]

class Forgetful(torch.optim.SGD):
    def load_state_dict(self, state): raise ValueError("the state of another machine")
"""
CONFIG = {
    "modules": ["parts"], "device": "cpu", "model": {"name": "Net"}, "loss": {"name": "CrossEntropyLoss"},
    "loaders": {"name": "Data", "batch_size": 4, "train": {}, "val": {"size": 3}},
    "optimizer": {"name": "SGD", "lr": 0.1}, "trainer": {"max_epochs": 1, "checkpoint_dir": "run"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_each_part_is_tried_and_nothing_written(run_cli: RunCli, project: Path) -> None:
    result = run_cli(["check", "c.yaml"], timeout=200)
    assert result.rc == 0, result.text
    every = [line.partition("  ")[2] for line in result.stdout.splitlines()]
    found = every[: next(number for number, line in enumerate(every) if line.startswith("ok "))]  # the table follows
    assert [line.partition(", loss")[0] for line in found[-4:]] == [
        "train: one batch forward and backward",
        "train: the epoch's last batch of 1 sample",
        "val: one batch",
        "state: can be saved and resumed",
    ]
    assert found[-4].endswith("and an optimizer step")
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "model.normalised=true",
            "loaders.train: the last batch of each epoch has 1 sample, with which the model fails",
        ),
        ("model.grows=true", "model: could not be resumed: .*other shape: seen is"),
        ("loss={name: Loss, grows: true}", "loss: could not be resumed: .*other shape: counts is"),
        ("optimizer.name=Forgetful", "optimizer: could not be resumed: .*the state of another machine"),
    ],
)
def test_what_would_fail_later_is_one_line_now(run_cli: RunCli, override: str, told: str) -> None:
    result = run_cli(["check", "c.yaml", override], timeout=200)
    assert result.rc == 2, result.text
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.search(told, lines[0])


def test_a_loss_with_parameters_of_its_own_can_be_resumed_and_the_gpu_may_be_elsewhere(run_cli: RunCli) -> None:
    result = run_cli(
        ["check", "c.yaml", "loss={name: Loss}", "device=cuda"], timeout=200, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.rc == 0, result.text
    first = result.stdout.splitlines()[0]
    assert "'cuda' was asked for, but " in first and first.endswith("sees no GPU; one process on the CPU"), result.text


def test_an_optimizer_whose_step_fails_fails_the_check(run_cli: RunCli) -> None:
    result = run_cli(["check", "c.yaml", "optimizer.name=NeedsMore"], timeout=200)
    assert result.rc == 1
    assert "no_such_key" in result.text


@pytest.mark.parametrize("has_label", [True, False])
def test_the_test_of_whole_volumes_is_tried_too(run_cli: RunCli, project: Path, has_label: bool) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        with h5py.File(project / f"{name}.h5", "w") as file:
            file["raw"] = rng.normal(size=(12, 16, 16)).astype("float32")
            if name == "train" or has_label:
                file["label"] = (file["raw"][:] > 0).astype("uint8")
    test = {"file_paths": "test.h5"} | ({} if has_label else {"label_internal_path": None})
    config = {
        "device": "cpu", "seed": 0,
        "model": {"name": "UNet3D", "in_channels": 1, "out_channels": 2, "f_maps": [4, 8], "num_groups": 2},
        "loaders": {
            "name": "StandardHDF5Dataset", "batch_size": 1,
            "slice_builder": {"name": "SliceBuilder", "patch_shape": [8, 16, 16], "stride_shape": [8, 16, 16]},
            "train": {"file_paths": "train.h5"}, "test": test,
        },
        "loss": {"name": "CrossEntropyLoss"}, "optimizer": {"name": "SGD", "lr": 0.1},
        "metrics": {"name": "MeanIoU", "num_classes": 2}, "predictor": {},
        "trainer": {"max_steps": 1, "checkpoint_dir": "run"},
    }  # fmt: skip
    (project / "v.yaml").write_text(yaml.safe_dump(config))
    result = run_cli(["check", "v.yaml"], timeout=200)
    if has_label:
        assert result.rc == 0, result.text
        assert "test: the first planes of a volume, MeanIoU " in result.stdout
    else:
        assert result.rc != 0
        assert "label" in result.text
