"""The configs that are shipped: each has no mistake, and trains, validates and tests, on one process and on two."""

import functools
import json
import math
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunCli

from dtrain.components.datasets.cell_volume import CellVolume
from dtrain.components.datasets.digits_scene import DigitsScene
from dtrain.components.datasets.make import make
from dtrain.config.check import check
from dtrain.config.load import load_config
from dtrain.tracking.run_folder import read_run

FOLDER = REPOSITORY / "configfiles"
FILES = sorted(FOLDER.glob("*.yaml"))
# Two small steps instead of minutes. A file that is not here gets the overrides of all.
ALL = ["trainer.max_steps=2", "trainer.log_every_steps=1"]
SHORT = {
    "pidnet_scene": ["loaders.global_batch_size=4", "loaders.val.source.length=3", "loaders.test.source.length=3"],
    "relation_teeth": ["loaders.train.length=64", "loaders.val.length=8", "loaders.test.length=8"],
    "transunet_cells": ["loaders.train.length=4", "loaders.val.length=1", "loaders.test.length=1"],
    # Group norm: batch norm sees each rank's own samples.
    "unet2d_scene": [
        "model.layer_order=gcr",
        "loaders.global_batch_size=4",
        "loaders.val.length=3",
        "loaders.test.length=3",
    ],
}
# One process runs them all, which saves a start of some seconds for each.
SEVERAL = """
import json, sys
from dtrain.cli import main

print("STATUS", json.dumps([main(words) for words in json.loads(sys.argv[1])]))
"""
TIMEOUT_SECONDS = 280  # a busy machine
NO_MLFLOW = "raise ImportError('kept out of this test')\n"


def name_of(file: Path) -> str:
    return file.stem


def arguments(file: Path, folder: Path) -> list[str]:
    return [str(file), *ALL, *SHORT.get(file.stem, []), f"trainer.checkpoint_dir={folder}"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A current folder with the files that the configs name, and with an mlflow that cannot be imported: it is slow."""
    counts = dict.fromkeys(("train", "val", "test"), 1)
    make(CellVolume, tmp_path / "data" / "cells", counts, shape=(16, 64, 64))
    make(DigitsScene, tmp_path / "data" / "scenes", counts, "images", digits=[0, 1, 4, 7])
    (tmp_path / "stubs" / "mlflow").mkdir(parents=True)
    (tmp_path / "stubs" / "mlflow" / "__init__.py").write_text(NO_MLFLOW)
    return tmp_path


def assert_done(folder: Path) -> dict[str, float]:
    """It trained two steps, validated and tested, with finite losses; the last value of each figure.

    Patches of volumes are tested as whole volumes, which have metrics and no loss.
    """
    assert read_run(folder)["state"] == "FINISHED"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "metrics"]
    assert max(row["step"] for row in rows) == 2
    found = {key: value for row in rows for key, value in row["values"].items()}
    assert all(math.isfinite(found[f"{phase}/loss"]) for phase in ("train", "val"))
    assert {key for key in found if key.startswith("test/") and not key.startswith("test/loss")}, "no metric"
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_config_has_no_mistake(file: Path) -> None:
    check(load_config(file))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_config_begins_with_the_command_that_runs_it(file: Path) -> None:
    text = file.read_text()
    assert re.search(rf"^#   (?:python|torchrun .*) -m dtrain configfiles/{file.name}$", text, re.M), "no such line"
    config = load_config(file)
    assert {"train", "val", "test"} <= set(config["loaders"])
    assert config["trainer"]["checkpoint_dir"].startswith("runs/")


def test_every_config_has_a_run_folder_and_an_experiment_of_its_own() -> None:
    configs = [load_config(file) for file in FILES]
    for value in ("experiment", "trainer.checkpoint_dir"):
        found = [functools.reduce(lambda part, key: part[key], value.split("."), config) for config in configs]
        assert len(set(found)) == len(found), found


def assert_predicted(folder: Path) -> None:
    """Something was predicted."""
    files = [path for path in (folder / "predictions").iterdir() if path.is_file()]
    assert files and all(path.stat().st_size for path in files), files


@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT_SECONDS)
def test_each_trains_validates_tests_and_predicts_and_two_ranks_do_the_same(place: Path, run_cli: RunCli) -> None:
    env = {"PYTHONPATH": f"{place / 'stubs'}:{REPOSITORY}"}
    commands = [arguments(file, place / "one" / file.stem) for file in FILES]
    commands += [["predict", *words] for words in commands]
    launcher = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    done = run_cli([], launcher=launcher, env=env, timeout=2 * TIMEOUT_SECONDS)
    assert f"STATUS {[0] * len(commands)}" in done.stdout, done.text
    found = {file.stem: assert_done(place / "one" / file.stem) for file in FILES}
    for file in FILES:
        assert_predicted(place / "one" / file.stem)

    name = "unet2d_scene"
    done = run_cli(arguments(FOLDER / f"{name}.yaml", place / "two"), nproc=2, env=env, timeout=TIMEOUT_SECONDS)
    assert done.rc == 0, done.text
    figures = assert_done(place / "two")
    same = [key for key in figures if key.startswith(("train/", "val/", "test/"))]
    assert [figures[key] for key in same] == pytest.approx([found[name][key] for key in same], rel=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(3 * TIMEOUT_SECONDS)
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_trains_and_predicts_on_two_ranks(place: Path, run_cli: RunCli, file: Path) -> None:
    env = {"PYTHONPATH": f"{place / 'stubs'}:{REPOSITORY}"}
    for words in (arguments(file, place / "two"), ["predict", *arguments(file, place / "two")]):
        done = run_cli(words, nproc=2, env=env, timeout=TIMEOUT_SECONDS)
        assert done.rc == 0, done.text
    assert_done(place / "two")
    assert_predicted(place / "two")
