"""Writes tests/data/clusters/published.json: the schemas that are in the packages of the recipes' own systems.

pip install --target /tmp/published skypilot==0.14.1 dstack==0.22.5 kubeflow-trainer-api==2.3.0
PYTHONPATH=/tmp/published python scripts/recipe_schemas.py
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What Kubernetes takes as a number or a text; the package has a class of its own for it.
QUANTITY = {"IoK8sApimachineryPkgApiResourceQuantity": {"type": ["string", "number"]}}
TARGET = Path(__file__).parents[1] / "tests" / "data" / "clusters" / "published.json"


def bare(schema: Any, is_strict: bool) -> Any:
    """A schema without its texts; strict: what has named properties takes no others, as a Kubernetes server sees it."""
    if isinstance(schema, list):
        return [bare(item, is_strict) for item in schema]
    if not isinstance(schema, dict):
        return schema
    texts = {key for key in ("title", "description", "default") if not isinstance(schema.get(key), dict)}
    kept = {key: bare(item, is_strict) for key, item in schema.items() if key not in texts}
    closed = is_strict and isinstance(kept.get("properties"), dict) and "type" in kept
    return kept | ({"additionalProperties": False} if closed else {})


def of_kubernetes(model: Any) -> Any:
    """The schema of a resource."""
    schema = bare(model.model_json_schema(), is_strict=True)
    return {**schema, "$defs": schema["$defs"] | {name: QUANTITY[name] for name in schema["$defs"].keys() & QUANTITY}}


def published() -> dict[str, Any]:
    """JSON Schemas by kind; of SkyPilot, whose task leaves its resources open, both."""
    from dstack._internal.core.models.configurations import TaskConfiguration
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
    from sky.utils import schemas

    schemas._allow_additional_properties = lambda: False  # as on a server without plugins
    return {
        "TrainJob": of_kubernetes(TrainerV1alpha1TrainJob),
        "TrainingRuntime": of_kubernetes(TrainerV1alpha1TrainingRuntime),
        "SkyPilotTask": bare(schemas.get_task_schema(), is_strict=False),
        "SkyPilotResources": bare(schemas.get_resources_schema(), is_strict=False),
        "SkyPilotVolume": bare(schemas.get_volume_schema(), is_strict=False),
        "DstackTask": bare(TaskConfiguration.model_json_schema(), is_strict=False),
    }


if __name__ == "__main__":
    sources = {name: version(name) for name in ("kubeflow-trainer-api", "skypilot", "dstack")}
    TARGET.write_text(json.dumps({"from": sources, "schemas": published()}, separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size / 2**10:.0f} KiB of {sources}")
