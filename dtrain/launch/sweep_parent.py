"""The sweep's own run in MLflow, under which those of its trials are shown."""

import time
from collections.abc import Callable
from typing import Any

from dtrain.config.build import build
from dtrain.launch.trial import Plan
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json

PARENT_SECONDS = 20.0  # so long the first trial waits for the run's id


def parent_run(plan: Plan) -> Any:
    """The journal of the sweep's run, started, or continued by a later start."""
    experiment = plan.base.get("experiment") or "default"
    name = f"{plan.base.get('run_name') or experiment}-sweep"
    options = dict(folder=plan.own_folder, experiment=experiment, run_name=name, sender=None, system_metrics=False)
    options |= dict(log_model=False, register=None)  # a sweep has none
    journal = build(plan.base, "mlflow", **options)
    params = {key: ", ".join(values) if isinstance(values, list) else str(values) for key, values in plan.swept.items()}
    journal.start(params, {"dtrain.sweep": str(plan.folder)})
    return journal


def parent_override(plan: Plan, is_stopped: Callable[[], bool] = bool) -> list[str]:
    """What puts a trial's run under it; nothing where MLflow does not answer soon: the trials have no parent then."""
    end = time.monotonic() + PARENT_SECONDS
    problem = ""
    while not (run_id := read_run(plan.own_folder).get("run_id")) and time.monotonic() < end and not is_stopped():
        if problem := read_json(RunFolder(plan.own_folder).delivery).get("problem") or "":
            break
        time.sleep(0.1)
    if not run_id and not is_stopped():
        print(f"sweep: the trials' runs have no parent in MLflow: {problem or 'no answer yet'}", flush=True)
    return [f"mlflow.parent_run_id={run_id}"] if run_id else []
