"""Files that lie differently in space than those of the training are told, before a figure suffers from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import RunCli
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.space import difference, space_of

CONFIG = """
model: {name: Conv3d, in_channels: 1, out_channels: 2, kernel_size: 1}
loaders:
  name: NiftiDataset
  train: {images: train, labels: labels/train}
  val: {images: val, labels: labels/val}
  test: {images: test, labels: labels/test}
  predict: {images: train}
loss: {name: CrossEntropyLoss}
metrics: {name: PixelAccuracy}
optimizer: {name: SGD, lr: 0.01}
predictor: {}
trainer: {max_steps: 1, checkpoint_dir: run, pictures: false}
"""
ALIKE, OTHER = np.diag([1.0, 1, 2, 1]), np.diag([-2.0, 2, 4, 1])
LINE = "files lie differently in space, and nothing is turned or resampled unless a transform does it: "


def scans(folder: Path, affine: np.ndarray, count: int = 1) -> None:
    """Images in a folder, and labels in labels/ beside it."""
    for where in (folder, folder.parent / "labels" / folder.name):
        where.mkdir(parents=True)
        for number in range(count):
            values = (np.arange(5 * 6 * 7) % 2).reshape(5, 6, 7).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(values, affine), where / f"{number}.nii.gz")


@pytest.mark.slow
def test_files_that_lie_differently_are_told_in_one_line(tmp_path: Path, run_cli: RunCli) -> None:
    scans(tmp_path / "train", ALIKE, 2)
    scans(tmp_path / "val", ALIKE)
    scans(tmp_path / "test", OTHER)
    (tmp_path / "nifti.yaml").write_text(CONFIG)
    all_phases = "train RAS, voxels of 1 x 1 x 2 mm; val RAS, voxels of 1 x 1 x 2 mm; test LAS, voxels of 2 x 2 x 4 mm"

    def told(*command: str) -> list[str]:
        done = run_cli([*command], timeout=200)
        assert done.rc == 0, done.text
        return [line.partition(LINE)[2] for line in done.text.splitlines() if LINE in line]

    with_predict = f"{all_phases}; predict RAS, voxels of 1 x 1 x 2 mm"
    assert told("check", "nifti.yaml") == [with_predict]
    assert told("train", "nifti.yaml") == [with_predict]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["space"]
    assert recorded == {"orientations": {"RAS": "0.nii.gz"}, "least": [1, 1, 2], "most": [1, 1, 2]}
    now = "training RAS, voxels of 1 x 1 x 2 mm; now LAS, voxels of 2 x 2 x 4 mm"
    assert told("test", "nifti.yaml") == [now]
    assert told("predict", "nifti.yaml") == []
    elsewhere = ["loaders.predict.images=test", "trainer.checkpoint_dir=other", "--output-dir", "out"]
    assert told("predict", "nifti.yaml", *elsewhere, "--checkpoint", "run/checkpoints/best/model.safetensors") == [now]


def dataset(*affines: np.ndarray, dims: int = 3) -> Any:
    volumes = [
        SimpleNamespace(path=Path(f"/data/{number}.nii"), affine=affine, shape=(4,) * dims)
        for number, affine in enumerate(affines)
    ]
    return SimpleNamespace(volumes=volumes)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_an_orientation_is_nibabels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    lengths = rng.uniform(0.5, 5, 3)
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(lengths)
    small = rng.uniform(-0.1, 0.1)  # a scan is not quite straight
    turn = np.array([[np.cos(small), -np.sin(small), 0], [np.sin(small), np.cos(small), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    space = space_of(dataset(affine))
    assert space is not None
    assert list(space["orientations"]) == ["".join(nibabel.aff2axcodes(affine))]
    assert np.allclose(space["least"], lengths) and np.allclose(space["most"], lengths)


def test_what_differs_within_a_phase_or_a_little_only() -> None:
    mixed = space_of(dataset(ALIKE, np.diag([1.0, 1, 3, 1]), np.diag([1.0, -1, 2, 1])))
    assert difference({"train": mixed}) == (
        f"{LINE}train RAS (0.nii) and RPS (2.nii), voxels of 1 x 1 x 2 to 1 x 1 x 3 mm"
    )
    near = space_of(dataset(np.diag([1.005, 1, 2, 1])))
    assert difference({"train": space_of(dataset(ALIKE)), "val": near, "test": None}) == ""
    flat = space_of(dataset(np.diag([1.0, 1, 2, 1]), dims=2))
    assert difference({"train": flat, "val": space_of(dataset(ALIKE))}).endswith("val RAS, voxels of 1 x 1 x 2 mm")
    assert space_of(SimpleNamespace()) is None and space_of(dataset()) is None
    assert space_of(SimpleNamespace(volumes=[SimpleNamespace(path=Path("a.h5"), shape=(1, 2, 3))])) is None
