"""dtrain report: one HTML page about one or several runs."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtrain import __version__
from dtrain.config.errors import ConfigError, shown, to_plain
from dtrain.config.load import load_config
from dtrain.distributed.exit_status import DONE
from dtrain.launch.diff import environment_of, files_of_patch
from dtrain.launch.runs import progress_text, records_of
from dtrain.reporting.report_page import Page
from dtrain.tracking.run_record import RunRecord
from dtrain.tracking.secrets import leaves
from dtrain.tracking.whole_file import write_text

_PATHS_AND_NAMES = ("trainer.checkpoint_dir", "run_name", "mlflow.")
_MAIN_PACKAGES = ("torch", "accelerate", "numpy", "torchmetrics", "dtrain")


def report(runs: Sequence[str], uri: str | None, output: str | None) -> int:
    """Write the page, in the run's folder where it is of one, else into the current folder.

    Raises:
        ConfigError: A run is neither a run folder nor in MLflow, or the page cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="dtrain-") as fetched:
        records = records_of(runs, uri, "report", Path(fetched))
        alone = Path(runs[0]) if len(runs) == 1 and Path(runs[0]).is_dir() else Path()
        path = Path(output) if output else alone / "report.html"
        text = page_of(records).html()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"dtrain report: {path} cannot be written: {error.strerror}") from None
    print(f"{path}: {len(records)} run(s), {len(text.encode()) / 1e6:.1f} MB; open it in a browser")
    return DONE


def page_of(records: Sequence[RunRecord]) -> Page:
    """The page about these runs."""
    progress = []
    for record in records:
        steps = [step for series in record.journal.figures.values() for step in series]
        progress.append(progress_text(record.facts, max(steps, default=None)))
    differences = _differences(records) if len(records) > 1 else []
    return Page(records, progress, differences, _environments(records), f"dtrain {__version__}")


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The keys of the configs that do not have the same value in all, without names and places."""
    configs = []
    for record in records:
        try:
            configs.append(dict(leaves(to_plain(load_config(record.config_file)))))
        except ConfigError:  # there is none
            configs.append({})
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(_PATHS_AND_NAMES))
    rows = [(key, [shown(config[key]) if key in config else "" for config in configs]) for key in keys]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1]


def _environments(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """What was recorded of code, environment and data; of packages those that matter most, and those that differ."""
    found: dict[str, list[str]] = {"commit": [record.commit[:12] or "not recorded" for record in records]}
    patches = [files_of_patch(record.code_text("diff.patch")) for record in records]
    if any(patches):
        found["uncommitted changes"] = [", ".join(patch) or "none" for patch in patches]
    environments = [environment_of(record) for record in records]
    packages = {name for record in records for name in record.environment.get("packages") or ()}
    for name in dict.fromkeys(key for each in environments for key in each):
        texts = [each.get(name, "") for each in environments]
        if name not in packages or name in _MAIN_PACKAGES or len(set(texts)) > 1:
            found[name] = texts
    data = [{key: shown(value).strip("'") for key, value in leaves(record.data) if key} for record in records]
    for name in dict.fromkeys(key for each in data for key in each):
        found[f"data {name}"] = [each.get(name, "") for each in data]
    return found
