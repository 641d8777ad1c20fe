"""load_model: what a training has made, ready for use, from its run folder, a checkpoint or a weight file."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from ml_collections import ConfigDict
from torch.nn import Module
from torch.nn.parameter import is_lazy

from dtrain.checkpoint.checkpoint_files import MANIFEST
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.resume import ResumeError, folder_of_run
from dtrain.checkpoint.weights import fitted, is_folder_of_shards, load_weights, misfits_of
from dtrain.config.errors import ConfigError, first_few
from dtrain.config.load import load_config
from dtrain.config.resolve import module_mistake
from dtrain.config.schema import calls, listed_modules, mistake
from dtrain.data import rng
from dtrain.modelloader import get_model
from dtrain.tracking.run_folder import RunFolder


class Saved(NamedTuple):
    """What a path leads to."""

    weights: Path  # a checkpoint folder, or a weight file
    config: Path | None  # of the run that it belongs to; None where none is found
    is_verified: bool = False  # the checkpoint's files were just compared with its manifest


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    model: Module | None = None,
    tracking_uri: str | None = None,
) -> Module:
    """The model of a run with the weights that its figures belong to, in eval mode; no data are read.

    They are the best checkpoint's, else the last one's, and of a checkpoint with averaged weights (`ema_decay`) those.

    Args:
        source: A run folder, a checkpoint folder, a weight file in a run folder, or an MLflow run id.
        device: Where the model is put.
        model: The model to load them into. Default: as the run's config.yaml names it, whose `modules` are looked for
            in the current folder and on Python's path; a weight file from elsewhere, and a run whose model was an
            object made in Python, need one.
        tracking_uri: Where an MLflow run id is looked up. Default: as for a training.

    Raises:
        ConfigError: There is no such thing, its model cannot be built, or the weights do not fit it.
    """
    saved = find_saved(source, tracking_uri)
    if model is None:
        if saved.config is None:
            raise ConfigError(f"no config.yaml beside {saved.weights} or above it, so give the model: model=...")
        model = model_of(load_config(saved.config))
    load_into(model, saved)
    return model.to(device).eval()


def find_saved(source: str | Path, tracking_uri: str | None = None) -> Saved:
    """Where the weights are that a run folder, a checkpoint, a weight file or an MLflow run id leads to."""
    path = Path(source)
    try:
        if not path.exists() and re.fullmatch(r"[0-9a-f]{32}", str(source)):
            path = folder_of_run(Path(), str(source), tracking_uri)
    except ResumeError as error:
        raise ConfigError(str(error)) from error
    if not path.exists():
        raise ConfigError(f"{source}: no such run folder, checkpoint, weight file or MLflow run id")
    if path.is_file() or (path / MANIFEST).exists() or is_folder_of_shards(path):
        return Saved(path, _config_above(path))
    folder = path.parent if path.name == "checkpoints" else path
    checkpoints = Checkpoints(RunFolder(folder).checkpoints)
    found = checkpoints.to_use()
    if found is None:
        if checkpoints.folders():
            raise ConfigError(f"no checkpoint in {checkpoints.folder} is whole; those that are damaged are named above")
        raise ConfigError(f"{folder} holds no checkpoint; a run folder is what trainer.checkpoint_dir names")
    return Saved(found, _config_above(found), is_verified=True)


def _config_above(path: Path) -> Path | None:
    """The config.yaml of the run folder in which something lies, at most as deep as a checkpoint of a branch."""
    folders = [*path.resolve().parents][:4]
    return next((file for folder in folders if (file := RunFolder(folder).config).is_file()), None)


def model_of(config: ConfigDict) -> Module:
    """The model that a config names, as it is built; the random numbers stay as they are."""
    if missing := [mistake(config, path, wrong) for path, module in listed_modules(config, "modules")
                   if (wrong := _wrong_module(module))]:  # fmt: skip
        raise ConfigError(missing)
    section = calls(config).get("model")
    if section is not None and section.stands_for_object and section.object is None:
        raise ConfigError(f"model: {section.name} was an object made in Python: make one again, and give it as model=")
    with importable(), rng.untouched():
        return get_model(config)


def _wrong_module(module: object) -> str:
    with importable():
        return module_mistake(module)


@contextmanager
def importable() -> Iterator[None]:
    """Have modules of the current folder found, as the command line has them."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path or "PYTHONSAFEPATH" in os.environ:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load_into(model: Module, saved: Saved) -> None:
    """Give a model the weights that figures belong to; a ConfigError says what does not fit."""
    try:
        weights = fitted(model, load_weights(saved.weights, averaged=None, is_verified=saved.is_verified))
    except (CheckpointError, OSError) as error:
        raise ConfigError(str(error)) from error
    shapes_are_known = not any(map(is_lazy, (*model.parameters(), *model.buffers())))
    if shapes_are_known and (misfits := misfits_of(model, weights)):
        raise ConfigError(f"{saved.weights} does not fit the model: {first_few(misfits, 10, '; ')}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # of a lazy module, or one that loads in a way of its own
        raise ConfigError(f"{saved.weights} does not fit the model: {error}") from error
