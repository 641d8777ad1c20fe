"""Whole volumes for metrics, a model's layout, and memory that does not grow with the volume."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from predicting import (
    batches_of,
    dataset_of,
    inference,
    loader_of,
    random_volume,
    read,
)
from torch import Tensor, nn

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.dataloader import Loaders
from dtrain.distributed.ranks import Ranks
from dtrain.modelloader import Forward
from dtrain.predict.inference import Inference
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import at_once, logits, predict
from dtrain.reporting.progress import Progress


def test_logits_of_whole_volumes_are_dealt_out(tmp_path: Path) -> None:
    images = [random_volume(7 + k, 6, 5, seed=k) for k in range(5)]
    data = dataset_of(*images, patch=[5, 4, 5], stride=[3, 4, 2], label=lambda image: (image[0] > 0).astype(np.uint8))
    seen = []
    for rank in range(3):
        ranks = Ranks(rank, rank, 3, torch.device("cpu"))
        for number, output, label in logits(inference(Predictor(), ranks=ranks), loader_of(data)):
            assert np.array_equal(output[0].numpy(), images[number])
            assert label.dtype == torch.int64
            assert np.array_equal(label[0].numpy(), images[number][0] > 0)
            seen.append((rank, number))
    assert sorted(seen) == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2)]


def test_a_volume_without_label_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match=r"volume-0.h5 has no label"):
        list(logits(inference(Predictor()), loader_of(dataset_of(random_volume(6, 6, 6)))))


class Viewer(nn.Conv2d):
    """Cannot bear a layout with its channels last."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(len(x), -1).view(x.shape)


def test_a_model_that_needs_its_own_layout_has_it() -> None:
    model = Viewer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = Forward(model, torch.device("cpu"))
    viewer = Inference(Predictor(), forward, model, Ranks(0, 0, 1, torch.device("cpu")), Progress(), Path(), {})
    image = torch.randn(2, 2, 8, 8)
    with torch.inference_mode():
        expected = model(image)
        with viewer.channels_last():
            assert not model.weight.is_contiguous()
            assert torch.equal(viewer.output(image), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.weight.is_contiguous()


MEASURE = """
import resource, sys
from pathlib import Path
import h5py, torch
sys.path.insert(0, {tests!r})
from predicting import predicted
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset
from dtrain.components.datasets.slices import SliceBuilder

def peak(folder, depth):
    with h5py.File(f"{{folder}}.h5", "w") as file:
        file.create_dataset("raw", (depth, 256, 256), "f4", chunks=(16, 64, 64))  # nothing is stored: it reads as zeros
    builder = SliceBuilder([16, 128, 128], [12, 96, 96], [2, 8, 8])
    data = LazyHDF5Dataset([f"{{folder}}.h5"], label_internal_path=None, slice_builder=builder)
    predicted(Path(folder), data, **{keys!r})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

small = peak("small", 48)
print(small, peak("large", 512))
"""


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"save_segmentation": True}, {"instances": "inverted"}])
def test_memory_does_not_grow_with_the_volume(tmp_path: Path, keys: dict[str, Any]) -> None:
    """A volume of 128 MB: what is held is of the size of some patches and planes."""
    script = MEASURE.format(tests=str(REPOSITORY / "tests"), keys=keys)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert large - small < 48, done.stdout


def test_data_are_predicted_also_where_this_rank_has_no_batch_of_them(tmp_path: Path) -> None:
    data = dataset_of(random_volume(4, 5, 6))
    second = batches_of(data, 1, 2)  # of two ranks, for one batch
    assert len(second) == 0
    surroundings = replace(inference(Predictor(activation="none"), nn.Identity()), has_weights=True)
    result = predict(surroundings, Loaders(predict=second), Checkpoints(tmp_path), None, tmp_path / "out", False)
    assert np.array_equal(read(result.files[0]), data.volumes[0].image)


def test_large_patches_go_one_by_one_on_a_cpu() -> None:
    viewer, small, large = inference(Predictor()), random_volume(6, 6, 6), np.zeros((1, 64, 64, 32), np.float32)
    assert at_once(viewer, Predictor().source(dataset_of(large)), 4) == 1
    assert at_once(viewer, Predictor().source(dataset_of(large, small)), 4) == 4
    assert at_once(replace(viewer, is_training=True), Predictor().source(dataset_of(large)), 4) == 4
    wish = inference(Predictor(batch_size=3))
    assert at_once(wish, wish.predictor.source(dataset_of(large)), 4) == 3
