"""A volume of 4 GB is trained on and predicted by a process that never holds 1 GB; run with --soak."""

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

SIDE = 1024  # of a volume of float32: 4 GiB
LIMIT_MB = 1000.0  # of which a process that has only imported torch and built the model holds some 400
PROGRAM = """
import sys
from dtrain.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print("peak MB:", int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
sys.exit(code)
"""
CONFIG = """
model: {model}
loaders:
  name: LazyHDF5Dataset
  slice_builder: {{name: SliceBuilder, patch_shape: [64, 128, 128], stride_shape: [64, 128, 128]}}
  transforms: [{{name: Normalize, min_value: 0, max_value: 1}}]
  train: {{file_paths: [large.h5]}}
  predict: {{file_paths: [large.h5], label_internal_path: null}}
loss: {{name: BCEDiceLoss}}
optimizer: {{name: SGD, lr: 1e-2}}
predictor: {{save_segmentation: true, compression: gzip}}
trainer: {{max_steps: 2, checkpoint_dir: run}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with large.h5, of which only some chunks are written: the others are 0 and take no room on the disk."""
    folder = tmp_path_factory.mktemp("large")
    chunks = (32, 128, 128)
    with h5py.File(folder / "large.h5", "w") as file:
        raw = file.create_dataset("raw", (SIDE,) * 3, np.float32, chunks=chunks, compression="gzip")
        label = file.create_dataset("label", (SIDE,) * 3, np.uint8, chunks=chunks, compression="gzip")
        for start in (0, 480, 992):
            values = np.random.default_rng(start).random((32, 128, 128), dtype=np.float32)
            raw[start : start + 32, :128, 896:] = values
            label[start : start + 32, :128, 896:] = values > 0.5
        assert raw.nbytes == 2**32
    assert (folder / "large.h5").stat().st_size < 50e6
    return folder


def peak_mb(folder: Path, env: dict[str, str], model: str, *arguments: str) -> float:
    """Run dtrain in a process and return the most memory that it held."""
    (folder / "large.yaml").write_text(CONFIG.format(model=model))
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^peak MB: ([\d.]+)$", done.stdout, re.M)
    assert found, done.stdout
    print(f"{arguments[0]}: {found[1]} MB")  # shown with -rP
    return float(found[1])


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_volume_of_4_gb_is_predicted_within_1_gb(folder: Path, clean_env: dict[str, str]) -> None:
    weights = folder / "weights.safetensors"  # the label again: where the image is above 0.5, scaled to -1 to 1
    model = "{name: Conv3d, in_channels: 1, out_channels: 1, kernel_size: 1}"
    save_file({"weight": torch.full((1, 1, 1, 1, 1), 8.0), "bias": torch.zeros(1)}, weights)
    words = ["predict", "large.yaml", "--checkpoint", str(weights), "--output-dir", "out"]
    assert peak_mb(folder, clean_env, model, *words) < LIMIT_MB
    (file,) = (folder / "out").glob("*.h5")
    with h5py.File(file) as found, h5py.File(folder / "large.h5") as given:
        predictions = found["predictions"]
        assert predictions.shape[-3:] == (SIDE,) * 3
        for start in (0, 480, 992):
            part = (slice(start, start + 32), slice(0, 130), slice(894, None))
            expected = given["label"][part]
            assert np.array_equal(predictions[part] if predictions.ndim == 3 else predictions[0][part], expected)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_volume_of_4_gb_is_trained_on_within_1_gb(folder: Path, clean_env: dict[str, str], workers: int) -> None:
    model = "{name: UNet3D, in_channels: 1, out_channels: 1, f_maps: [4, 8], num_groups: 2}"
    words = ["train", "large.yaml", f"loaders.num_workers={workers}", "trainer.resume=none"]
    assert peak_mb(folder, clean_env, model, *words) < LIMIT_MB
