"""Kubeflow, Kueue, SkyPilot and dstack: the recipes fit the published schemas, and start a training."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from dtrain.cli import parse
from dtrain.distributed.exit_status import FAILED, STOPPED_EARLY, WRONG_CONFIG

RECIPES = REPOSITORY / "scripts" / "cluster"
SCHEMAS = yaml.safe_load((REPOSITORY / "tests" / "data" / "clusters" / "schemas.yaml").read_text())
PUBLISHED = json.loads((REPOSITORY / "tests" / "data" / "clusters" / "published.json").read_text())["schemas"]
KINDS = {"skypilot.yaml": "SkyPilotTask", "skypilot-volume.yaml": "SkyPilotVolume", "digits.dstack.yml": "DstackTask"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / name).read_text()))


def schema_of(kind: str) -> dict[str, Any]:
    """What a server checks beyond names and types, in a form condensed by hand."""
    described = SCHEMAS[kind]
    own = {"spec": described["spec"]} if "spec" in described else described["top"]
    about = {"apiVersion": {"const": described["apiVersion"]}, "kind": {"const": kind}}
    return {
        "$defs": SCHEMAS["$defs"],
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", *own],
        "properties": about | {"metadata": {"$ref": "#/$defs/metadata"}} | own,
        "additionalProperties": False,
    }


def mistakes(document: dict[str, Any], kind: str) -> list[str]:
    schemas = [PUBLISHED[kind]] if kind in PUBLISHED else []
    if kind in SCHEMAS:
        schemas.append(schema_of(kind))
    assert schemas, f"no schema of {kind}"
    found = [error for schema in schemas for error in validator_for(schema)(schema).iter_errors(document)]
    if kind == "SkyPilotTask":  # whose schema leaves them open
        resources = Draft202012Validator(PUBLISHED["SkyPilotResources"])
        found += resources.iter_errors(document["resources"])
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("name", ["trainjob.yaml", "kueue.yaml", *KINDS])
def test_a_recipe_fits_the_published_schema(name: str) -> None:
    for document in documents(name):
        assert mistakes(document, KINDS.get(name) or document["kind"]) == []


def test_what_does_not_fit_is_found() -> None:
    runtime, job = documents("trainjob.yaml")
    for key, value in (("numNode", 2), ("numProcPerNode", "four"), ("env", [{"key": "A"}])):
        wrong = copy.deepcopy(job)
        wrong["spec"]["trainer"][key] = value
        assert mistakes(wrong, "TrainJob"), key
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0][
        "action"
    ] = "Fail"
    assert mistakes(runtime, "TrainingRuntime")
    runtime, _ = documents("trainjob.yaml")
    runtime["spec"]["mlPolicy"]["torch"] = {"numProcPerNode": "auto"}  # of an earlier Trainer; a server refuses it
    assert mistakes(runtime, "TrainingRuntime")


@pytest.mark.parametrize(
    ("name", "place", "key"),
    [
        ("skypilot.yaml", (), "num_node"),
        ("skypilot.yaml", ("resources",), "use_spott"),
        ("skypilot.yaml", ("resources", "job_recovery"), "max_restarts_on_error"),
        ("digits.dstack.yml", (), "node"),
        ("digits.dstack.yml", ("retry",), "on_event"),
        ("trainjob.yaml", ("spec", "trainer", "resourcesPerNode"), "limit"),
    ],
)
def test_a_key_that_nobody_reads_is_found(name: str, place: tuple[str, ...], key: str) -> None:
    document = documents(name)[-1]
    part = document
    for each in place:
        part = part[each]
    part[key] = 1
    assert mistakes(document, KINDS.get(name) or document["kind"])


def test_the_parts_belong_together() -> None:
    runtime, job = documents("trainjob.yaml")
    by_kind = {item["kind"]: item for item in documents("kueue.yaml")}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == by_kind["LocalQueue"]["metadata"]["name"]
    assert by_kind["LocalQueue"]["spec"]["clusterQueue"] == by_kind["ClusterQueue"]["metadata"]["name"]
    (group,) = by_kind["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == by_kind["ResourceFlavor"]["metadata"]["name"]
    assert [item["name"] for item in flavor["resources"]] == group["coveredResources"]
    assert set(job["spec"]["trainer"]["resourcesPerNode"]["limits"]) == set(group["coveredResources"])
    (volume,) = documents("skypilot-volume.yaml")
    assert volume["name"] in documents("skypilot.yaml")[0]["volumes"].values()


def test_stopped_early_starts_again_and_a_mistake_does_not() -> None:
    runtime, _ = documents("trainjob.yaml")
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    of_job = replicated["template"]["spec"]
    final, disrupted = of_job["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", sorted([FAILED, WRONG_CONFIG]))
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert STOPPED_EARLY not in final["onExitCodes"]["values"] and of_job["backoffLimit"] > 0
    (sky,) = documents("skypilot.yaml")
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED_EARLY]
    (dstack,) = documents("digits.dstack.yml")
    assert dstack["retry"]["on_events"] == ["no-capacity", "interruption"]


def commands() -> dict[str, tuple[str, set[str], dict[str, str]]]:
    """Of each recipe: its command, the variables that it finds, and what it sets itself."""
    _, job = documents("trainjob.yaml")
    (sky,), (dstack,) = documents("skypilot.yaml"), documents("digits.dstack.yml")
    trainer = job["spec"]["trainer"]
    own = {item["name"]: item["value"] for item in trainer["env"]}
    script = trainer["command"][trainer["command"].index("-c") + 1]
    (line,) = dstack["commands"]
    return {
        "trainjob": (script, {"PET_MASTER_ADDR", "PET_MASTER_PORT"}, own),
        "skypilot": (
            sky["run"],
            {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"},
            sky["envs"],
        ),
        "dstack": (
            line,
            {"DSTACK_NODES_NUM", "DSTACK_GPUS_PER_NODE", "DSTACK_MASTER_NODE_IP"},
            dict(item.split("=", 1) for item in dstack["env"]),
        ),
    }


@pytest.mark.parametrize("recipe", ["trainjob", "skypilot", "dstack"])
def test_a_recipe_starts_the_training_with_its_run_folder_on_the_volume(recipe: str) -> None:
    script, given, own = commands()[recipe]
    assert set(re.findall(r"\$\{?([A-Z_]+)", script)) == given | ({*own} & set(re.findall(r"\$([A-Z_]+)", script)))
    values = dict.fromkeys(given, "2") | own | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    # A shell puts the words together as it would there; `python` is not run.
    shell = f'python() {{ printf "%s\\n" "$@"; }}\n{script.replace("exec ", "")}'
    done = subprocess.run(["bash", "-uc", shell, "sh"], env=values, capture_output=True, text=True, check=True)
    words = done.stdout.split("\n")[:-1]
    words = words[words.index("launch") :]
    options = parse(words)
    assert (options.config, options.nnodes) == ("configfiles/digits.yaml", 2)
    assert options.overrides == [f"trainer.checkpoint_dir={own['RUN_FOLDER']}"]
    assert re.fullmatch(r"(2|10\.0\.0\.1):(2|29500)", options.rdzv_endpoint)
    assert own["RUN_FOLDER"].startswith(("/volume/", "/training/"))
