"""`dtrain schema`: valid configs are valid, a typo in any section is not, and one's own components are in it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jsonschema import Draft202012Validator

from dtrain.cli import main
from dtrain.config.docstrings import documented
from dtrain.config.errors import to_plain
from dtrain.config.json_schema import schema_of
from dtrain.config.load import load_config
from dtrain.config.rules import TOP_LEVEL
from dtrain.config.yaml12 import parse

EXAMPLES = [
    *sorted((REPOSITORY / "configfiles").glob("*.yaml")),
    *sorted((REPOSITORY / "tests" / "data" / "pytorch3dunet").glob("*.yml")),
]
OWN = '''
import torch

class Mixer(torch.nn.Module):
    """Mixes what it is given.

    Parameters
    ----------
    width : int
        Channels in the middle.
    kind : str
        Which of two.
    """

    def __init__(self, width: int, kind: Literal["hard", "soft"] = "soft", scale: float = 1.5):
        super().__init__()

def nearness(output, target, power: int = 2):
    """How near it is.

    :param power: Of the distance.
    """

class Points:
    def __init__(self, folder: str, augment=None):
        pass

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return index
'''


def schema(config: Path) -> dict[str, Any]:
    return schema_of(load_config(config))


def mistakes(schema: dict[str, Any], values: Any) -> list[str]:
    errors = Draft202012Validator(schema).iter_errors(values)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


def changed(values: Any, key: str, value: Any) -> Any:
    result = at = copy.deepcopy(values)
    *above, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for part in above:
        at = at[part]
    at[last] = value
    return result


QUICK = ("digits", "reference", "multiclass_train", "boundary_test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if file.stem in QUICK else pytest.mark.soak, id=file.name) for file in EXAMPLES],
)
def test_every_example_is_valid(file: Path) -> None:
    values, _ = parse(file.read_text(), str(file))
    assert mistakes(schema(file), values) == []


@pytest.fixture(scope="module")
def cells() -> tuple[dict[str, Any], Any]:
    file = REPOSITORY / "configfiles" / "unet3d_cells.yaml"
    return schema(file), parse(file.read_text(), str(file))[0]


@pytest.mark.slow
def test_a_mistake_in_any_section_is_refused_and_what_is_right_is_not(cells: tuple[dict[str, Any], Any]) -> None:
    described, values = cells
    wrong = {
        "seeed": 1,
        "seed": -1,
        "device": "gpu",
        "model.f_map": 3,
        "model.name": "UNet3DD",
        "model.in_channels": "1",
        "loaders.batchsize": 1,
        "loaders.train.file_path": "x",
        "loaders.train.batch_size": "2",
        "loaders.train.slice_builder.patch_shap": [1],
        "loaders.train.transforms.0.name": "Standardise",
        "loaders.train.transforms.0.meen": 1,
        "loss.alhpa": 1,
        "metrics.smoot": 1,
        "metrics.name.0": "BinaryIo",
        "metrics.DiceCoefficient.softt": 1,
        "optimizer.lrr": 1,
        "optimizer.lr": "fast",
        "optimizer.layer_decay": 1.5,
        "lr_scheduler.intervall": "step",
        "lr_scheduler.interval": "steps",
        "trainer.max_epoch": 1,
        "trainer.keep_last": 0,
        "trainer.ddp": {"bakend": "gloo"},
        "trainer.freeze": [{"mach": "x"}],
        "predictor.blend": "mean",
        "mlflow": {"tracking": 1},
        "cluster": {"tim": 1},
    }
    assert [key for key, value in wrong.items() if not mistakes(described, changed(values, key, value))] == []
    right = {
        "trainer.max_epochs": "${EPOCHS}",
        "optimizer.lr": 1,
        "optimizer": {"one": {"name": "Adam", "match": "a.*"}, "two": {"name": "SGD", "lr": 0.1}},
        "model": {"name": "some.package:Net", "whatever": 1},
        "metrics": [{"name": "BinaryIoU"}],
        "metrics.DiceCoefficient": None,
        "loaders.val": [{"label": "near", "file_paths": "a"}, {"label": "far", "file_paths": "b"}],
        "loss": {"name": "DeepSupervision", "loss": {"name": "BCEDiceLoss"}},
        "trainer.freeze": ["a.*", {"match": "b", "until_epoch": 2}],
        "lr_scheduler": None,
    }
    assert {
        key: found for key, value in right.items() if (found := mistakes(described, changed(values, key, value)))
    } == {}


@pytest.mark.slow
def test_ones_own_components_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_schema_parts.py").write_text(OWN)
    config = {
        "modules": ["own_schema_parts"],
        "model": {"name": "Mixer", "width": 3},
        "loaders": {"train": {"name": "Points", "folder": "a"}},
        "loss": {"name": "nearness"},
        "optimizer": {"name": "AdamW"},
        "trainer": {"max_epochs": 1},
    }
    Path("own.yaml").write_text(json.dumps(config))
    assert main(["schema", "own.yaml"]) == 0
    assert "own_schema_parts" not in sys.modules  # it is read, and not run
    described = json.loads(capsys.readouterr().out)
    assert described["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(TOP_LEVEL) < set(described["properties"])
    mixer = next(rule["then"] for rule in described["$defs"]["model"]["allOf"] if "Mixer" in str(rule["if"]))
    assert mixer["properties"]["name"]["description"] == "Mixes what it is given."
    assert mixer["properties"]["width"]["description"] == "Channels in the middle."
    assert mixer["properties"]["scale"]["default"] == 1.5
    assert mixer["required"] == ["width"]
    assert mistakes(described, config) == []
    for key, value in (("model.kind", "sof"), ("model.widht", 3), ("loss.powr", 3), ("loaders.train.foldr", "b")):
        assert mistakes(described, changed(config, key, value)), key
    assert mistakes(described, changed(config, "loaders.augment", {"name": "own_schema_parts.nearness"})) == []


@pytest.mark.slow
def test_nothing_is_required_where_bases_may_have_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((REPOSITORY / "configfiles" / "digits.yaml").read_text())
    (tmp_path / "own.yaml").write_text(
        "_base_: base.yaml\nmodel: {depth: 3}\nlr_scheduler: {_delete_: true, name: StepLR}\n"
    )
    values, _ = parse((tmp_path / "own.yaml").read_text(), "own.yaml")
    described = schema(tmp_path / "own.yaml")
    assert mistakes(described, values) == []
    assert mistakes(described, changed(values, "trainer", {"max_epoch": 3}))


@pytest.mark.soak
def test_without_a_config_all_libraries_are_in_it() -> None:
    described = schema_of()
    for name in ("digits", "unet3d_cells"):
        values = to_plain(load_config(REPOSITORY / "configfiles" / f"{name}.yaml"))
        assert mistakes(described, values) == []
        assert mistakes(described, changed(values, "model.dimm", 1))


@pytest.mark.parametrize(
    ("module", "name", "argument", "begins"),
    [
        ("torch.optim", "AdamW", "lr", "learning rate (default: 1e-3)"),
        ("torch.nn", "Conv2d", "kernel_size", "Size of the convolving kernel"),
        ("torch.optim.lr_scheduler", "StepLR", "gamma", "Multiplicative factor of learning rate decay"),
        ("dtrain.trainer", "Trainer", "max_epochs", "Passes over the training data."),
    ],
)
def test_what_docstrings_say_of_arguments_is_found(module: str, name: str, argument: str, begins: str) -> None:
    assert documented(module, name).arguments[argument].startswith(begins)
