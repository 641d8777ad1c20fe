"""One run, resumed once, as MLflow 3 and other trackers have it: entities, event files, pages in a browser."""

import json
import os
import posixpath
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from stores import wait_until
from whole_runs import Place, last

from dtrain.tracking.logged_model import send_entity
from dtrain.tracking.mlflow_store import MlflowStore

pytestmark = pytest.mark.slow

OWN = '''"""Trackers of a user's own."""
import json, os, time

class ToLines:
    def __init__(self, path):
        self.path = path
    def put(self, *what):
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def start(self, config):
        self.put("start", config["run"], config["optimizer"]["lr"])
    def log(self, step, figures):
        self.put("log", step, figures)
    def picture(self, step, key, path):
        assert os.path.getsize(path)
        self.put("picture", step, key)
    def end(self, status):
        self.put("end", status)

class Raises:
    def log(self, step, figures):
        raise ConnectionError("no such host")

class Hangs:
    def log(self, step, figures):
        time.sleep(3600)

class Vanishes:
    def log(self, step, figures):
        os._exit(5)
'''
TRACKERS = [{"name": "TensorBoard"}, {"name": "ToLines", "path": "tracked.jsonl"}]
FAILING = [{"name": name} for name in ("Raises", "Hangs", "Vanishes", "Wandb")]
CHANGES = {
    "experiment": "shown", "modules": ["toy", "own_trackers"], "trackers": TRACKERS, "mlflow.register": "toy-net",
    "metrics": {"ConfusionMatrix": {"name": "ConfusionMatrix", "task": "multiclass", "num_classes": 3},
                "right": {"name": "Right"}},
    "loaders.test": {"size": 7, "seed": 2}, "trainer.ema_decay": 0.5,
    "mlflow.exit_timeout_seconds": 150,
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(place: Place) -> dict[str, Any]:
    """A run of two epochs, then two more: its folder, its store's address, and what the second start printed."""

    def make() -> dict[str, Any]:
        place.write("own_trackers.py", OWN)
        place.run(place.config("shown", **CHANGES), "optimizer.lr=0.2", mlflow=True)
        config = place.config("shown", **CHANGES | {"trackers": TRACKERS + FAILING})
        told = place.run(config, "optimizer.lr=0.2", "trainer.max_epochs=4", mlflow=True)
        uri = f"sqlite:///{place.folder}/mlflow.db"
        return {"folder": str(place.path("shown")), "uri": uri, "told": told.stdout + told.stderr}

    return dict(place.once("shown", make))


@pytest.fixture(scope="module")
def run(shown: dict[str, Any]) -> Any:
    import mlflow

    mlflow.set_tracking_uri(shown["uri"])
    (found,) = mlflow.search_runs(experiment_names=["shown"], output_format="list")
    return found


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]


# MLflow 3


def test_the_run_is_named_after_what_was_overridden(run: Any) -> None:
    assert re.fullmatch(r"shown-lr0\.2-\d{4}", run.info.run_name)
    assert run.info.status == "FINISHED"


def test_the_data_sets_are_there_once_though_the_training_was_resumed(run: Any) -> None:
    sets = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 3
    assert {context: json.loads(data.profile)["samples"] for context, data in sets.items()} == {
        "train": 29, "val": 11, "test": 7,
    }  # fmt: skip
    assert {data.name for data in sets.values()} == {"Points"}
    assert len({data.digest for data in sets.values()}) == 3


def test_one_model_of_the_best_checkpoint_is_loaded_and_predicts_what_the_network_does(
    shown: dict[str, Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)  # where no toy.py lies
    (model,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    folder = Path(shown["folder"])
    best = (folder / "checkpoints" / "best").resolve()
    assert model.status == "READY" and model.tags["dtrain.step"] == str(int(best.name.removeprefix("step-")))
    ema = last(folder).ema if best == (folder / "checkpoints" / "last").resolve() else None
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    from safetensors.numpy import load_file

    weights = load_file(best / "ema.safetensors")
    hidden = np.tanh(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    wanted = hidden @ weights["layers.4.weight"].T + weights["layers.4.bias"]
    np.testing.assert_allclose(loaded.predict(x), wanted, rtol=1e-4, atol=1e-5)
    assert ema is None or set(ema) == set(weights)
    inputs, outputs = loaded.metadata.signature.inputs, loaded.metadata.signature.outputs
    assert (inputs.inputs[0].shape, outputs.inputs[0].shape) == ((-1, 8), (-1, 3))
    assert type(loaded.get_raw_model()).__name__ == "MLP"


def test_a_model_whose_sender_died_before_it_was_done_is_sent_again(
    shown: dict[str, Any], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # as in a sender
    client, experiment, folder = mlflow.MlflowClient(), run.info.experiment_id, Path(shown["folder"])
    (model,) = mlflow.search_logged_models([experiment], output_format="list")
    client.delete_logged_model_tag(model.model_id, "dtrain.whole")  # the last thing that a sender sets
    known = MlflowStore(shown["uri"]).known(run.info.run_id)
    assert known is not None
    send_entity(known, folder, "model", lines_of(folder, "model")[-1])
    (again,) = mlflow.search_logged_models([experiment], output_format="list")
    assert (again.model_id, again.tags["dtrain.whole"]) == (model.model_id, "true")
    outputs = [each.model_id for each in client.get_run(run.info.run_id).outputs.model_outputs]
    assert outputs.count(model.model_id) == 1


def test_the_models_figures_are_those_of_its_own_validation_and_of_the_test(shown: dict[str, Any], run: Any) -> None:
    import mlflow

    (model,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    step = int(model.tags["dtrain.step"])
    logged = [(entry["step"], entry["values"]) for entry in lines_of(Path(shown["folder"]), "metrics")]
    wanted = {key: float(value) for at, values in logged for key, value in values.items()
              if key.startswith("test/") or (at == step and key.startswith("val/"))}  # fmt: skip
    found = {each.key: each.value for each in model.metrics}
    assert found == pytest.approx(wanted) and "val/right" in found
    assert {each.key: each.dataset_name for each in model.metrics if each.key == "val/right"} == {"val/right": "Points"}


def test_the_model_is_one_version_of_the_registered_model(run: Any) -> None:
    import mlflow

    versions = mlflow.MlflowClient().search_model_versions("name = 'toy-net'")
    (model,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    # Each of the two starts has finished, and the model of the second may be the first's.
    assert f"models:/{model.model_id}" in {version.source for version in versions}
    assert len({version.source for version in versions}) == len(versions) <= 2


def test_packages_and_versions_are_artifacts_of_each_start(run: Any) -> None:
    import mlflow
    import torch

    folder = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="environment"))
    for place in (folder, folder / "resume_2"):
        assert f"torch=={torch.__version__}\n" in (place / "requirements.txt").read_text()
        assert json.loads((place / "environment.json").read_text())["python"] == sys.version.split()[0]
    assert run.data.tags["dtrain.torch"] == torch.__version__


def test_a_confusion_matrix_is_a_table_and_pictures_and_no_figure(shown: dict[str, Any], run: Any) -> None:
    import mlflow
    import pandas

    assert not [key for key in run.data.metrics if "ConfusionMatrix" in key]
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="tables/val/ConfusionMatrix.csv")
    table = pandas.read_csv(path, index_col="true")
    assert table.shape == (3, 3) and table.to_numpy().sum() == 11
    assert table.to_numpy().trace() / 11 == pytest.approx(run.data.metrics["val/right"])
    images = mlflow.MlflowClient().list_artifacts(run.info.run_id, "images")
    names = [posixpath.basename(image.path) for image in images]
    found = [re.fullmatch(r"val[~#]ConfusionMatrix[+%]step[+%](\d+)[+%].*", name) for name in names]
    assert {int(match[1]) for match in found if match} == {0, 8, 16, 24, 32}  # 0: where the page begins


# Other trackers


def test_a_tracker_of_ones_own_gets_each_figure_once_over_both_starts(shown: dict[str, Any], place: Place) -> None:
    lines = [json.loads(line) for line in (place.folder / "tracked.jsonl").read_text().splitlines()]
    assert [line[0] for line in lines if line[0] in ("start", "end")] == ["start", "end", "start", "end"]
    starts = [line for line in lines if line[0] == "start"]
    assert starts[0][1]["id"] == starts[1][1]["id"] and starts[0][2] == 0.2
    assert (starts[0][1]["step"], starts[1][1]["step"]) == (None, 16)
    logged = [(entry["step"], entry["values"]) for entry in lines_of(Path(shown["folder"]), "metrics")]
    assert [(line[1], line[2]) for line in lines if line[0] == "log"] == logged
    assert [line[1] for line in lines if line[0] == "end"] == ["FINISHED", "FINISHED"]
    pictures = [(line[1], line[2]) for line in lines if line[0] == "picture"]
    assert (8, "val/ConfusionMatrix") in pictures and len(set(pictures)) == len(pictures)


def test_tensorboard_has_each_point_once(shown: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    files = sorted((Path(shown["folder"]) / "tensorboard").iterdir())
    assert len(files) == 2, "one for each start"
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    wanted: dict[str, list[tuple[int, float]]] = {}
    for entry in lines_of(Path(shown["folder"]), "metrics"):
        for key, value in entry["values"].items():
            wanted.setdefault(key, []).append((entry["step"], np.float32(value)))
    assert found == wanted


@pytest.mark.parametrize(
    ("tracker", "problem"),
    [
        ("trackers[2], Raises", "ConnectionError: no such host"),
        ("trackers[3], Hangs", "was ended"),
        ("trackers[4], Vanishes", "its process ended with exit status 5"),
        ("trackers[5], Wandb", "wandb is not installed: pip install wandb"),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_harms_nothing(
    shown: dict[str, Any], run: Any, tracker: str, problem: str
) -> None:
    if "Wandb" in tracker and shutil.which("wandb"):
        pytest.skip("wandb is installed here")
    (line,) = [line for line in shown["told"].splitlines() if tracker in line]
    assert problem in line and "dtrain sync" in line
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ({"name": "Wandb"}, "trackers.0: wandb is not installed: pip install wandb"),
        ({"name": "toy:MLP"}, "trackers.0: toy:MLP has no method log(step, figures)"),
        ({"name": "TensorBord"}, "TensorBoard"),
        ({"name": "TensorBoard", "logdir": "x"}, "log_dir"),
    ],
)
def test_check_finds_a_tracker_that_cannot_be(place: Place, tracker: dict[str, Any], said: str) -> None:
    if tracker["name"] == "Wandb" and shutil.which("wandb"):
        pytest.skip("wandb is installed here")
    name = f"trackers-{re.sub(r'[^A-Za-z]', '', said)[:20]}"  # the cases run at once
    config = place.config(name, trackers=[tracker])
    result = place.run("check", config, expect=2)
    (line,) = result.stderr.splitlines()
    assert said in line and f"{name}.yaml:" in line


# A browser


@pytest.fixture(scope="module")
def pages(shown: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow ui` on the run's store, at its address."""
    if not shutil.which("chromium"):
        pytest.skip("SKIPPED, NOT TESTED HERE: chromium is not installed (apt-get install chromium)")
    port = str(free_port())
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        shown["uri"],
        "--port",
        port,
        "--workers",
        "1",
    ]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = tmp_path_factory.mktemp("ui") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200)
        except OSError:
            return False

    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def dom(address: str, profile: Path) -> str:
    """The text of a page as a browser shows it, and the addresses of the pictures in it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,5000", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=240, check=False)
    text = re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(script|style)\b.*?</\1>", "", done.stdout))
    pictures = re.findall(r'<img [^>]*src="get-artifact\?path=([^&"]+)', done.stdout)
    return " ".join(text.split() + pictures)


# Of the charts' page: a section for each group with the number of its charts, pictures included.
@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("runs", ["shown-lr0.2-", "Points (", "Model training"]),
        ("runs/{run}", ["Finished", "Points (", "toy-net", "shown", "val/right", "optimizer.lr"]),
        (
            "runs/{run}/model-metrics",
            ["test (3)", "train (1)", "val (5)", "images%2Fval~ConfusionMatrix%2Bstep%2B0%2B"],
        ),
        ("models/{model}", ["Ready", "toy-net", "val/right", "test/loss", "shown-lr0.2-"]),
    ],
)
def test_a_browser_shows_runs_figures_pictures_model_and_data(
    pages: str, run: Any, page: str, seen: list[str], tmp_path: Path
) -> None:
    import mlflow

    experiment = run.info.experiment_id
    (model,) = mlflow.search_logged_models([experiment], output_format="list")
    place = page.format(run=run.info.run_id, model=model.model_id)
    address = f"{pages}/#/experiments/{experiment}/{place}?workflowType=machine_learning"

    def shows_all() -> bool:  # a slow server's answers may come after the browser's look
        text = dom(address, tmp_path)
        print("missing:", [word for word in seen if word not in text], "in:", text[:1000])
        return all(word in text for word in seen)

    wait_until(shows_all)
