"""Predictions of the very data that folds were trained on: each fold's by the model that has not seen it."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, load_config
from dtrain.config.schema import calls
from dtrain.predict.members import runs_in
from dtrain.tracking.run_folder import RunFolder


def of_all_folds(config: ConfigDict, folder: Path) -> tuple[ConfigDict, list[Path], dict[str, Any]]:
    """What predicts all data that `loaders.folds` splits.

    Args:
        config: With `loaders.folds`.
        folder: Of the folds' run folders, as `dtrain sweep` leaves them.

    Returns:
        A config whose `loaders.predict` is all of the data, as the validation reads them; the run of each fold; and the
        settings of the folds.

    Raises:
        ConfigError: The config has no folds, or one of them has no run, or several.
    """
    if "loaders.folds" not in calls(config):
        raise ConfigError("loaders: has no 'folds', so there is nothing to predict out of fold")
    settings = build(config, "loaders.folds")
    known = [run for run in runs_in(folder) if RunFolder(run).config.is_file()]
    runs: dict[int, Path] = {}
    for run in known:
        trained = load_config(RunFolder(run).config)
        if "loaders.folds" not in calls(trained):
            continue
        own = build(trained, "loaders.folds")
        fold = own["fold"]
        if {**own, "fold": 0} != {**settings, "fold": 0}:
            raise ConfigError(f"{run} was trained with other loaders.folds: {_told(own)}, here {_told(settings)}")
        if fold in runs:
            raise ConfigError(f"{folder} holds two runs of fold {fold}: {runs[fold].name} and {run.name}")
        runs[fold] = run
    if missing := [str(fold) for fold in range(settings["count"]) if fold not in runs]:
        raise ConfigError(f"{folder} holds no run of fold {', '.join(missing)}; dtrain sweep trains all")
    values = to_plain(config)
    loaders = values["loaders"]
    del loaders["folds"]
    loaders["predict"] = loaders.pop("val")
    loaders.pop("train")
    return from_mapping(values), [runs[fold] for fold in sorted(runs)], settings


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key != "fold" and value is not None)
