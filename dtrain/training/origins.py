"""Where a training's data and its model's code come from, for MLflow."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import to_plain
from dtrain.config.schema import calls, own_modules
from dtrain.config.signatures import module_file


def data_sets(config: ConfigDict, datasets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each set by name: its class, its arguments and its number of samples."""
    described = calls(config)
    folds = described.get("loaders.folds")
    found = {}
    for name, dataset in datasets.items():
        call = described.get(f"loaders.{name}")
        if call is None:  # given in Python without a section
            kind, arguments = type(dataset).__qualname__, {}
        else:
            kind = str(call.name)
            arguments = {key: to_plain(value) for key, value in call.arguments.items() if not call.stands_for_object}
        if folds is not None and name in ("train", "val"):
            arguments["folds"] = {key: to_plain(value) for key, value in folds.arguments.items()}
        size = len(dataset) if hasattr(dataset, "__len__") else None
        short = kind.replace(":", ".").rpartition(".")[2]
        found[name] = {"name": short, "class": kind, "arguments": arguments, "samples": size}
    return found


def own_code(config: ConfigDict) -> dict[str, list[str]]:
    """What a model's class, those inside its arguments, and `modules` need: the user's own files, and packages."""
    code, packages = set(), set()
    model = calls(config).get("model")
    inside = [model, *model.components.values()] if model is not None and not model.stands_for_object else []
    for top in {name.partition(".")[0] for name in (*own_modules(config), *(call.target.module for call in inside))}:
        found = module_file(top)
        file = found.path if found else None
        if top == "dtrain" or file is None or {"site-packages", "dist-packages"} & set(file.parts):
            packages.add(top.replace("_", "-"))
        else:
            code.add(str(file.parent if file.name == "__init__.py" else file))
    return {"code": sorted(code), "packages": sorted(packages)}
