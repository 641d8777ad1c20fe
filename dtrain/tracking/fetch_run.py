"""Runs read from MLflow: the recent ones, and one whole, laid out as a run folder is."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.tracking import mlflow_store
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.run_record import RunRecord
from dtrain.tracking.secrets import redact
from dtrain.tracking.uri import resolve_tracking_uri, sqlite_file
from dtrain.tracking.whole_file import write_json, write_text

Recent = tuple[RunRecord, int | None, dict[int, float], dict[str, float]]


def recent(uri: str | None, most: int) -> list[Recent]:
    """The runs that began last: each with its last step, the history of what it monitors, and its last figures.

    Raises LookupError where MLflow does not answer, and ValueError for a wrong address.
    """
    store = _reader(uri)
    try:
        return [_recent(store, run) for run in store.recent(most)]
    except Exception as error:
        raise LookupError(f"MLflow at {redact(store.uri)}: {mlflow_store.describe_error(error)}") from error


def _recent(store: mlflow_store.MlflowStore, run: Mapping[str, Any]) -> Recent:
    facts = _facts(run)
    record = RunRecord(str(facts["run_name"] or facts["run_id"]), Path(), str(facts["run_id"]), facts)
    last = {key: value for key, (_, value) in run["last"].items() if not key.startswith("system/")}
    if "monitor" not in facts and record.monitor not in last:
        facts["monitor"] = ""  # of another program's run nothing is known to be better than something else
    steps = [step for key, (step, _) in run["last"].items() if not key.startswith("system/")]
    values = (
        {step: value for step, value, _ in store.history(record.origin, record.monitor)}
        if record.monitor in last
        else {}
    )
    return record, max(steps, default=None), values, last


def fetch(run_id: str, uri: str | None, folder: Path, images: bool = True) -> RunRecord:
    """One run, whose config, code state, figures and, if wanted, last pictures are laid out in a folder.

    Raises LookupError where there is no such run or MLflow does not answer, and ValueError for a wrong address.
    """
    store = _reader(uri)
    try:
        run = store.whole(run_id)
        facts = _facts(run) | {"tracking_uri": redact(store.uri)}
        folder.mkdir(parents=True, exist_ok=True)
        store.download(run_id, ("config", "code", "environment"), folder)
        pictures = store.download_images(run_id, RunFolder(folder).pictures) if images else {}
    except Exception as error:
        raise LookupError(
            f"MLflow run {run_id} in {redact(store.uri)}: {mlflow_store.describe_error(error)}"
        ) from error
    _lay_out(folder, facts, run, pictures)
    return RunRecord(str(facts["run_name"] or run_id), folder, run_id)


def _lay_out(folder: Path, facts: Mapping[str, Any], run: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
    """What `fetch` has, as files of a run folder."""
    files = RunFolder(folder)
    with suppress(OSError):
        (files.config_as_written / files.config.name).replace(files.config)  # where MLflow has it
    attempts = [path.name.partition("_")[2] for path in (files.path / "code").glob("resume_*")]
    facts = {**facts, "attempt": max((int(each) for each in attempts if each.isdigit()), default=1)}
    write_json(files.run, facts)
    by_time: dict[tuple[float, int], dict[str, float | str]] = {}
    for key, rows in run["history"].items():
        for step, value, time_ms in rows:
            by_time.setdefault((time_ms / 1000, step), {})[key] = value if abs(value) < float("inf") else str(value)
    lines: list[dict[str, Any]] = [
        {"kind": "start", "time": facts["started"], "attempt": 1, "from_step": None, "facts": dict(facts)},
        {"kind": "tags", "time": facts["started"], "values": run["tags"]},
        {"kind": "datasets", "time": facts["started"], "values": run["datasets"]},
    ]
    lines += [
        {"kind": "metrics", "time": moment, "step": step, "values": values}
        for (moment, step), values in sorted(by_time.items())
    ]
    for key, (step, path) in pictures.items():
        lines.append({"kind": "image", "time": 0, "path": os.path.relpath(path, folder), "key": key, "step": step})
    if facts.get("ended"):
        end = {"status": facts["state"], "reason": facts["reason"]}
        lines.append({"kind": "end", "time": facts["ended"], **end})
    write_text(files.journal, "".join(f"{json.dumps(line)}\n" for line in lines))


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json would say, as far as MLflow knows it."""
    tags = run["tags"]
    facts: dict[str, Any] = {key: run[key] for key in ("run_id", "experiment", "run_name", "started", "ended")}
    facts |= {"state": run["status"], "reason": tags.get("dtrain.reason", ""), "attempt": 1}
    facts |= {key: tags[key] for key in ("host", "device") if key in tags}
    facts |= {key: tags[f"dtrain.{key}"] for key in ("monitor", "mode", "directory") if f"dtrain.{key}" in tags}
    facts |= {"folder": tags["dtrain.checkpoint_dir"]} if "dtrain.checkpoint_dir" in tags else {}
    for key in ("monitor", "mode"):
        if f"trainer.{key}" in run["params"]:
            facts.setdefault(key, run["params"][f"trainer.{key}"])
    for key, text in (
        *((key, tags.get(key)) for key in ("world_size",)),
        *((key, tags.get(f"dtrain.{key}")) for key in ("steps", "steps_per_epoch", "samples")),
        *((key, run["params"].get(f"trainer.{key}")) for key in ("max_epochs", "max_steps")),
    ):
        with suppress(ValueError, TypeError):  # what somebody has changed by hand
            facts[key] = json.loads(text)
    return facts


def _reader(uri: str | None) -> mlflow_store.MlflowStore:
    """MLflow to read from; a store that is not there is not made."""
    os.environ.update(mlflow_store.CLIENT_SETTINGS, MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
    resolved = resolve_tracking_uri(uri)
    if (database := sqlite_file(resolved)) and not database.exists():
        raise LookupError(f"there is no MLflow store {database}; --tracking-uri names another")
    return mlflow_store.MlflowStore(resolved)
