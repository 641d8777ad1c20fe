"""`dtrain init`: a small project that trains as it is, with everything that is one's own to change."""

import re
from pathlib import Path
from string import Template

from dtrain.config.errors import ConfigError
from dtrain.config.signatures import is_standard, module_file

TASKS = ("classification", "segmentation", "regression")
CONFIG = """\
# $title: the whole training. `dtrain check config.yaml` tries it, `dtrain train config.yaml` trains.
# yaml-language-server: $$schema=dtrain.schema.json
# (for completion in an editor: dtrain schema config.yaml > dtrain.schema.json)

experiment: $package
seed: 0
modules: [$package]      # your own components are found by name

model:
  name: Net              # $package/model.py
  channels: 1
  outputs: $outputs
  width: 16

loaders:
  name: Shapes           # $package/data.py
  batch_size: 32
  num_workers: 0         # processes that load
  train: {count: 600, first: 0}
  val: {count: 120, first: 600}
  test: {count: 120, first: 720}

loss: {name: $loss}

metrics: {name: $metric}  # $package/metrics.py

optimizer: {name: AdamW, lr: 3e-3}

lr_scheduler: {name: CosineAnnealingLR, interval: step}

trainer:
  max_epochs: $epochs
  checkpoint_dir: runs/$package
  monitor: val/$metric
"""
DATA = '''\
"""The data: images of one shape each, drawn when they are asked for. Put your own in place of them."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

SIZE = 24  # pixels


class Shapes(Dataset):
    """Noisy images of a disk, a square or a cross.

    Args:
        count: How many there are.
        first: The number of the first one: other numbers are other images, so that phases share none.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """$item"""
        draw = torch.Generator().manual_seed(self.first + index)
        kind = int(torch.randint(3, (), generator=draw))
        radius = 3 + 4 * torch.rand((), generator=draw)
        y, x = (torch.arange(SIZE) - SIZE / 2 + 4 * (torch.rand((), generator=draw) - 0.5) for _ in range(2))
        y, x = y[:, None].abs(), x[None, :].abs()
        cross = (torch.minimum(x, y) < 1.5) & (x + y < 1.5 * radius)
        inside = [x**2 + y**2 < radius**2, torch.maximum(x, y) < radius, cross]
        image = inside[kind].float() + 0.3 * torch.randn(SIZE, SIZE, generator=draw)
        return image[None], $target
'''
MODELS = {
    False: '''\
"""The model."""

from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions, the mean over the image, one linear layer.

    Args:
        channels: Of the images.
        outputs: Numbers per image.
        width: Channels of the first convolution.
    """

    def __init__(self, channels: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width * 16, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to $shape."""
        return self.head(self.features(images))$squeeze
''',
    True: '''\
"""The model."""

from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions that keep the image's size.

    Args:
        channels: Of the images.
        outputs: Classes of pixels.
        width: Channels in between.
    """

    def __init__(self, channels: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 5, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to $shape."""
        return self.layers(images)
''',
}
METRICS = '''\
"""What is measured. A function of (output, target) is a metric, and a loss as well."""

from torch import Tensor


def $metric(output: Tensor, target: Tensor) -> Tensor:
    """$says"""
    $formula


$metric.higher_is_better = $higher  # what `best` means
'''
TEST = '''\
"""The project's own test: run `pytest`."""

from pathlib import Path

import torch
from dtrain import load_config
from dtrain.config.check import check
from $package import Net, Shapes, $metric

CONFIG = Path(__file__).parent.parent / "config.yaml"


def test_the_config_is_right():
    check(load_config(CONFIG))


def test_an_image_and_its_target():
    image, target = Shapes(count=3)[0]
    assert image.shape == (1, 24, 24) and target.shape == $target_shape
    assert torch.equal(Shapes(count=3)[0][0], image)  # the same number is the same image


def test_the_loss_goes_down():
    torch.manual_seed(0)
    model, loss = Net(channels=1, outputs=$outputs), torch.nn.$loss()
    images, targets = map(torch.stack, zip(*(Shapes(count=32)[index] for index in range(32)), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss(model(images), targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch.isfinite($metric(model(images), targets))
'''
README = """\
# $title

A project for dtrain: $task of small images, to be replaced by your own.

    pip install -e .
    pytest                            # its own test
    dtrain check config.yaml          # build everything, try one batch
    dtrain train config.yaml          # train; again: resume
    dtrain test config.yaml           # the best checkpoint on the test data
    torchrun --nproc_per_node=4 -m dtrain config.yaml

| File | What to change there |
|---|---|
| `config.yaml` | the whole training |
| `$package/data.py` | the images and their targets |
| `$package/model.py` | the model |
| `$package/metrics.py` | what is measured |
| `job.sh` | a batch job |

`mlflow ui --backend-store-uri sqlite:///mlflow.db` shows the curves.
"""
PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$project"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = []  # dtrain itself is installed from its own checkout

[project.optional-dependencies]
test = ["pytest"]

[tool.setuptools]
packages = ["$package"]

[tool.pytest.ini_options]
pythonpath = ["."]
testpaths = ["tests"]
"""
IGNORED = """\
__pycache__/
*.egg-info/
.venv/
/runs/
/mlruns/
/mlartifacts/
/mlflow.db*
/dtrain.schema.json
"""
JOB = """\
#!/bin/sh
# A SLURM job, requeued until the training is done: `sh job.sh` submits it, `sh job.sh --dry-run` shows the script.
exec dtrain submit config.yaml --nodes 1 --gpus-per-node 1 --time 12:00:00 "$$@"
"""
# What differs from task to task.
_CLASSES = {
    "outputs": "3", "loss": "CrossEntropyLoss", "metric": "accuracy", "epochs": "5", "shape": "logits (N, outputs)",
    "squeeze": "", "item": "An image (1, H, W), and the number of its shape.", "target": "torch.tensor(kind)",
    "target_shape": "()", "says": "The share of images whose largest logit is that of their class.",
    "formula": "return (output.argmax(1) == target).float().mean()", "higher": "True",
}  # fmt: skip
_PIXELS = {
    "outputs": "2", "loss": "CrossEntropyLoss", "metric": "iou", "epochs": "3", "shape": "logits (N, outputs, H, W)",
    "squeeze": "", "item": "An image (1, H, W), and for each pixel (H, W) whether it is of the shape.",
    "target": "inside[kind].long()", "target_shape": "(24, 24)",
    "says": "Intersection over union of the shapes in a batch.",
    "formula": "found, true = output.argmax(1) == 1, target == 1\n"
    "    return (found & true).sum() / (found | true).sum().clamp(min=1)",
    "higher": "True",
}  # fmt: skip
_NUMBER = {
    "outputs": "1", "loss": "MSELoss", "metric": "mean_error", "epochs": "5", "shape": "numbers (N,)",
    "squeeze": ".squeeze(1)", "item": "An image (1, H, W), and its shape's radius in pixels.", "target": "radius",
    "target_shape": "()", "says": "The mean distance from the truth, in pixels.",
    "formula": "return (output - target).abs().mean()", "higher": "False",
}  # fmt: skip


def make_project(folder: Path, task: str) -> list[Path]:
    """Write the files of a new project, and say which.

    Raises:
        ConfigError: One of them is there already; nothing is written.
    """
    texts = project_files(folder.absolute().name, task)
    present = [name for name in texts if (folder / name).exists()]
    if present:
        raise ConfigError(
            f"dtrain init: {folder} has {', '.join(present)} already; nothing is overwritten, name another folder"
        )
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"dtrain init: cannot write {error.filename}: {error.strerror}") from None
    return [folder / name for name in texts]


def project_files(name: str, task: str) -> dict[str, str]:
    """The files of a project of that name, by their paths in it."""
    package = package_name(name)
    words = {"classification": _CLASSES, "segmentation": _PIXELS, "regression": _NUMBER}[task]
    own = {"title": name, "package": package, "project": package.replace("_", "-"), "task": task}
    exports = '"""The project\'s components, which config.yaml names."""\n\n'
    imports = ("data", "Shapes"), ("metrics", words["metric"]), ("model", "Net")
    exports += "".join(f"from {package}.{module} import {item}\n" for module, item in imports)
    exports += f'\n__all__ = ["Net", "Shapes", "{words["metric"]}"]\n'
    texts = {
        "config.yaml": CONFIG,
        f"{package}/__init__.py": exports,
        f"{package}/data.py": DATA,
        f"{package}/model.py": MODELS[task == "segmentation"],
        f"{package}/metrics.py": METRICS,
        "tests/test_project.py": TEST,
        "README.md": README,
        "pyproject.toml": PYPROJECT,
        ".gitignore": IGNORED,
        "job.sh": JOB,
    }
    return {path: Template(text).substitute(own | words) for path, text in texts.items()}


def package_name(name: str) -> str:
    """A module's name for a folder's; not one that another module has."""
    word = re.sub(r"\W+", "_", name.lower(), flags=re.A).strip("_") or "project"
    word = f"project_{word}" if word[0].isdigit() else word
    is_taken = (
        not word.isidentifier() or is_standard(word) or word in ("tests", "runs") or module_file(word) is not None
    )
    return f"{word}_project" if is_taken else word
