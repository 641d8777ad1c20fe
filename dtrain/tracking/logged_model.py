"""The data sets of a run and its best model as MLflow's own entities, made of what the journal says and of files."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.tracking.environment import installed_packages
from dtrain.tracking.lineage import lineage
from dtrain.tracking.mlflow_store import MlflowRun, Row
from dtrain.tracking.run_folder import RunFolder, read_line, update_run
from dtrain.tracking.whole_file import write_text

LOADER = "dtrain.training.served_model"  # its `_load_pyfunc` makes of the folder `data` what MLflow loads
_NEEDED = ("dtrain", "torch", "numpy", "safetensors", "mlflow")


def send_entity(run: MlflowRun, folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Sends what a line of the journal, `datasets` or `model`, says of a run folder; a second time it adds nothing."""
    if kind == "datasets":
        described = lineage(facts["values"], Path(facts["folder"]))
        run.log_datasets(described)
        update_run(folder, digests={each["context"]: each["digest"] for each in described})
    elif not (folder / facts["path"]).is_file():  # removed since, or another line has taken its place
        return
    elif (model := run.model_of_step(facts["name"], facts["step"])) is not None:
        with tempfile.TemporaryDirectory() as made:
            lay_out(Path(made), folder, facts)
            run.log_model(model, Path(made), facts, figures_of(RunFolder(folder).journal, facts["step"]), LOADER)


def lay_out(place: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """What the model consists of besides its MLmodel: weights, config, the user's own modules, and what it needs."""
    weights = (folder / facts["path"]).resolve()
    (place / "data").mkdir()
    (place / "code").mkdir()
    (place / "data" / weights.name).symlink_to(weights)
    shutil.copy(RunFolder(folder).config, place / "data")
    for source in map(Path, facts.get("code", ())):
        _copy_code(source, place / "code")
    packages = installed_packages()
    own = facts.get("packages", ())
    needed = [f"{name}=={packages[name]}" for name in (*_NEEDED, *own) if name in packages]
    write_text(place / "requirements.txt", "".join(f"{line}\n" for line in dict.fromkeys(needed)))


def _copy_code(source: Path, place: Path) -> None:
    """A module, or a package with the Python files in it."""
    if source.is_file():
        shutil.copy(source, place)
    for path, folders, names in os.walk(source) if source.is_dir() else ():
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in names:
            if name.endswith(".py"):
                target = place / source.name / Path(path).relative_to(source)
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(path) / name, target)


def figures_of(journal: Path, step: int) -> list[Row]:
    """The figures that a checkpoint's model has: of the validation at its step, and of the test."""
    found: dict[str, Row] = {}
    with journal.open("rb") as lines:
        for line in lines:
            if not line.startswith(b'{"kind": "metrics"'):
                continue
            entry = read_line(line)
            for key, value in entry.get("values", {}).items():
                if key.startswith("test/") or (key.startswith("val/") and entry["step"] == step):
                    found[key] = (key, float(value), round(entry["time"] * 1000), int(entry["step"]))
    return [*found.values()]
