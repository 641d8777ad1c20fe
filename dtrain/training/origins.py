"""Where a training's data and its model's code come from, for MLflow."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import to_plain
from dtrain.config.schema import Call, calls
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


def own_code(model: Call | None) -> dict[str, list[str]]:
    """Of a model's class, and of those inside its arguments: the user's own files, and the packages it is found in."""
    code, packages = set(), set()
    inside = [model, *model.components.values()] if model is not None and not model.stands_for_object else []
    for call in inside:
        top = call.target.module.partition(".")[0]
        found = module_file(top)
        file = found.path if found else None
        if top == "dtrain" or file is None or {"site-packages", "dist-packages"} & set(file.parts):
            packages.add(top.replace("_", "-"))
        else:
            code.add(str(file.parent if file.name == "__init__.py" else file))
    return {"code": sorted(code), "packages": sorted(packages)}
