"""A run in MLflow: created, found, written to; the only importer of mlflow, when it is first needed."""

import contextlib
import functools
import getpass
import hashlib
import itertools
import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.tracking.run_folder import locked_file
from dtrain.tracking.secrets import redact
from dtrain.tracking.sqlite_template import begin_store
from dtrain.tracking.uri import sqlite_file

# One attempt per request: the pauses between attempts are `delivery.follow`'s, and a request whose answer was lost must
# not be repeated behind its back (a repeated "create run" would make a second run).
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_UPLOAD_TIMEOUT_SECONDS = "300"  # a server may answer late when it has gigabytes to put away
_MOST_AT_ONCE = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits per request
_LONGEST_KEY, _LONGEST_PARAM, _LONGEST_TAG = 250, 6000, 5000
_IMAGES = "images"  # MLflow's folder for them, and its names, of which the thumbnail's is the last one written
_REFUSED_IN_IMAGES = r"[^a-zA-Z0-9_.\-/ ]"  # in a key; of figures MLflow takes letters of all languages
_IMAGE = re.compile(r"(?P<key>.+)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%](?P<time>\d+).+\.webp")
_log = logging.getLogger(__name__)
_REFUSED = "dtrain.refused"  # the tag that names what MLflow did not take
# MLflow's pages then show charts and parameters first, not the views for language models.
_KIND = {"mlflow.experimentKind": "custom_model_development"}

Row = tuple[str, float, int, int]  # a figure: key, value, timestamp in ms, step


_PASSING = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
}


_QUICK_SECONDS = 1.0


class RunIsGoneError(Exception):
    """The run was deleted while it was being fed."""


class MlflowStore:
    """MLflow at a resolved tracking URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @functools.cached_property
    def client(self) -> Any:
        """MLflow's client, connected when it is first needed; see `connect`."""
        return connect(self.uri)

    def known(self, run_id: str | None) -> "MlflowRun | None":
        """The run of that id, unless it is not there or deleted."""
        run = _get_run(self.client, run_id) if run_id else None
        return MlflowRun(self.client, run) if run else None

    def create(self, folder: Path, facts: Mapping[str, Any]) -> "MlflowRun":
        """Creates a run from its folder's run.json; by its `id`, a tag, it is found if an earlier answer was lost."""
        experiment = self._active_experiment(str(facts["experiment"]))
        user = "unknown"
        with contextlib.suppress(KeyError, OSError):  # in a container a user may have no name
            user = getpass.getuser()
        tags = {"dtrain.id": str(facts["id"]), "dtrain.checkpoint_dir": str(folder), "mlflow.user": user}
        if facts.get("run_id"):
            tags["dtrain.replaces"] = facts["run_id"]
        return MlflowRun(self.client, _ask(self._find_or_create, experiment, facts, tags))

    def recent(self, most: int) -> list[dict[str, Any]]:
        """The runs that began last, of all experiments, with the last step and value of each figure."""
        experiments = {each.experiment_id: each.name for each in _ask(self.client.search_experiments)}
        order = ["attributes.start_time DESC"]
        found = _ask(self.client.search_runs, list(experiments), max_results=most, order_by=order)
        return [_plain(run, experiments[run.info.experiment_id]) for run in found]

    def whole(self, run_id: str) -> dict[str, Any]:
        """One run with the history of each figure, except those of the system."""
        run = _ask(self.client.get_run, run_id)
        plain = _plain(run, _ask(self.client.get_experiment, run.info.experiment_id).name)
        keys = [key for key in run.data.metrics if not key.startswith("system/")]
        history = {key: self.history(run_id, key) for key in keys}
        return {**plain, "history": history, "datasets": dict(map(_plain_data, run.inputs.dataset_inputs))}

    def history(self, run_id: str, key: str) -> list[tuple[int, float, int]]:
        """Step, value and time in ms of all points of a figure."""
        return [(row.step, row.value, row.timestamp) for row in _ask(self.client.get_metric_history, run_id, key)]

    def download(self, run_id: str, wanted: Sequence[str], to: Path) -> None:
        """Copy those files and folders of a run's artifacts that are there into a folder."""
        there = {item.path for item in _ask(self.client.list_artifacts, run_id)}
        for path in wanted:
            if path in there:
                _ask(self.client.download_artifacts, run_id, path, str(to))

    def download_images(self, run_id: str, to: Path) -> dict[str, tuple[int, Path]]:
        """Copy the last picture of each key into a folder; returns its step and its file."""
        last: dict[str, tuple[int, str]] = {}
        there = {item.path for item in _ask(self.client.list_artifacts, run_id, _IMAGES)}
        for path in there:
            if found := _IMAGE.fullmatch(posixpath.basename(path)):
                key, step = found["key"].replace("~", "/"), int(found["step"])
                whole = path.removesuffix("+compressed.webp").removesuffix("%compressed.webp") + ".png"
                last[key] = max(last.get(key, (-1, "")), (step, whole if whole in there else path))
        to.mkdir(parents=True, exist_ok=True)
        return {
            key: (step, Path(_ask(self.client.download_artifacts, run_id, path, str(to))))
            for key, (step, path) in last.items()
        }

    def _find_or_create(self, experiment: str, facts: Mapping[str, Any], tags: Mapping[str, str]) -> Any:
        """The run with this `id`, or a new one; an answer that says nothing may have been about a run that was made."""
        found = _ask(self.client.search_runs, [experiment], f"tags.`dtrain.id` = '{facts['id']}'", max_results=1)
        if found:
            return found[0]
        name = facts["run_name"]
        if facts.get("is_named_by_dtrain"):
            name = self._free_name(experiment, name)
        return self.client.create_run(experiment, round(facts["started"] * 1000), tags, run_name=name)

    def _free_name(self, experiment: str, name: str) -> str:
        """The name, with a number where a run has it: two of one day and one command line are told apart, too."""
        wanted = f"attributes.run_name LIKE '{name.replace(chr(39), '_')}%'"
        taken = {run.info.run_name for run in _ask(self.client.search_runs, [experiment], wanted, max_results=1000)}
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        return next(each for each in names if each not in taken)

    def _active_experiment(self, name: str) -> str:
        """The id of the experiment, made if need be; a deleted one keeps its name, so the next free name is taken."""
        count, candidate = 1, name
        while True:
            known = _ask(self.client.get_experiment_by_name, candidate)
            if known is None:
                if made := self._create_experiment(candidate):
                    return made
            elif known.lifecycle_stage == "active":
                for key in _KIND.keys() - known.tags.keys():  # made by another program, or an older MLflow
                    _ask(self.client.set_experiment_tag, known.experiment_id, key, _KIND[key])
                return str(known.experiment_id)
            else:
                count += 1
                candidate = f"{name} ({count})"

    def _create_experiment(self, name: str) -> str:
        """The id of a new experiment; '' where another training was faster, or an earlier answer was lost."""
        try:
            return str(_ask(self.client.create_experiment, name, tags=_KIND))
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS":
                return ""
            raise


class MlflowRun:
    """One run in MLflow, open for writing; what MLflow cannot take is changed or left out, and said.

    Whatever is sent may be sent again: it adds nothing then. Errors are mlflow's own, of any class.
    """

    def __init__(self, client: Any, run: Any) -> None:
        self.id: str = run.info.run_id
        self.name, self.experiment_id = str(run.info.run_name), str(run.info.experiment_id)
        self._data: dict[str, tuple[str, str]] = {}  # name and digest of the sets that were sent
        self._client = client
        self._params: dict[str, str] = dict(run.data.params)
        self._tags: dict[str, str] = dict(run.data.tags)
        self._images: set[tuple[str, int, int]] | None = None  # key, step and time in ms of those that are there

    def log_metrics(self, rows: Sequence[Row]) -> None:
        """Sends figures; NaN stays NaN, infinities become the largest numbers that MLflow has."""
        from mlflow.entities import Metric

        self._log("metrics", [Metric(mlflow_key(key), value, time_ms, step) for key, value, time_ms, step in rows])

    def log_params(self, values: Mapping[str, str], attempt: int) -> None:
        """Sends params; of a resumed training (attempt 2, 3, ...), those that changed as `resume_2/<key>`.

        MLflow refuses a second value of a param, and with it everything in the same request.
        """
        from mlflow.entities import Param

        new: dict[str, str] = {}
        for name, text in values.items():
            key, value = mlflow_key(name), _clean(text, _LONGEST_PARAM)
            if self._params.get(key, value) != value:
                key = mlflow_key(f"resume_{attempt}/{key}")
            if key not in self._params:
                new[key] = value
        self._log("params", [Param(key, value) for key, value in new.items()])
        self._params.update(new)

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Sends tags; an empty one only where it takes the place of another."""
        from mlflow.entities import RunTag

        new = {key: _clean(text, _LONGEST_TAG) for key, text in values.items() if text or key in self._tags}
        self._log("tags", [RunTag(mlflow_key(key), text) for key, text in new.items()])
        self._tags.update(new)

    def log_file(self, path: Path, to: str) -> None:
        """Sends a file, or a folder with all that is in it."""
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with _long_timeout():
            _ask(send, self.id, str(path), to or None)

    def log_image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        """Sends a picture, unless it is there: MLflow would store a repetition under another name.

        The first one of a key is sent as that of step 0, too: there MLflow's page of a run begins to show them.
        """
        from PIL import Image

        if self._images is None:
            names = (posixpath.basename(item.path) for item in _ask(self._client.list_artifacts, self.id, _IMAGES))
            found = (_IMAGE.fullmatch(name) for name in names)
            self._images = {(match["key"], int(match["step"]), int(match["time"])) for match in found if match}
        name = mlflow_key(key, _REFUSED_IN_IMAGES)
        as_stored = name.replace("/", "~")
        is_first = not any((stored, at) == (as_stored, 0) for stored, at, _ in self._images)
        for wanted in {step, 0} if is_first else {step}:
            if (known := (as_stored, wanted, time_ms)) not in self._images:
                with _long_timeout(), Image.open(path) as image:
                    self._client.log_image(self.id, image, key=name, step=wanted, timestamp=time_ms, synchronous=True)
                self._images.add(known)

    def log_datasets(self, described: Sequence[Mapping[str, str]]) -> None:
        """Sends the sets of `lineage`; one that is there adds nothing."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        fields = ("name", "digest", "source_type", "source", "profile")
        inputs = [
            DatasetInput(
                Dataset(**{key: each[key] for key in fields}), [InputTag("mlflow.data.context", each["context"])]
            )
            for each in described
        ]
        _ask(self._client.log_inputs, self.id, inputs)
        self._data.update({each["context"]: (each["name"], each["digest"]) for each in described})

    def model_of_step(self, name: str, step: int) -> Any:
        """The run's model, made anew where it is of another step; None where that of this step is there as a whole."""
        wanted = f"tags.`dtrain.run` = '{self.id}'"
        of_this_step = None
        for model in _ask(self._client.search_logged_models, [self.experiment_id], wanted):
            if model.tags.get("dtrain.step") == str(step):
                of_this_step = model
            else:
                _ask(self._client.delete_logged_model, model.model_id)
        if of_this_step is not None:
            return None if of_this_step.tags.get("dtrain.whole") else of_this_step
        tags = {"dtrain.run": self.id, "dtrain.step": str(step)}
        return self._client.create_logged_model(self.experiment_id, mlflow_model_name(name), self.id, tags)

    def log_model(
        self, model: Any, folder: Path, facts: Mapping[str, Any], figures: Sequence[Row], loader: str
    ) -> None:
        """Sends a model: its files with an MLmodel that `loader` reads, its figures, its version in the registry."""
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.models import Model
        from mlflow.pyfunc import add_to_model

        made = Model(run_id=self.id, model_id=model.model_id, signature=_signature(facts.get("signature") or {}))
        add_to_model(made, loader, data="data", code="code")
        made.save(folder / "MLmodel")
        with _long_timeout():
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(self.id).outputs  # which a database takes once: a sender may have died since
        if model.model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(self.id, [LoggedModelOutput(model.model_id, int(facts["step"]))])
        linked = []
        for key, value, time_ms, step in figures:
            name, digest = self._data.get(key.rpartition("/")[0].removesuffix("/volume"), (None, None))
            linked.append(Metric(mlflow_key(key), value, time_ms, step, model.model_id, name, digest, self.id))
        self._log("metrics", linked)
        if name := facts.get("register"):
            self._register(str(name), model.model_id)
        self._client.set_logged_model_tags(model.model_id, {"dtrain.whole": "true"})

    def _register(self, name: str, model_id: str) -> None:
        """The model as the next version of a registered model; one version is enough."""
        try:
            self._client.create_registered_model(name)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
        known = _ask(self._client.search_model_versions, f"name = '{name}' and run_id = '{self.id}'")
        source = f"models:/{model_id}"
        version = next((each for each in known if source == each.source), None)
        if version is None:
            version = self._client.create_model_version(name, source, self.id, model_id=model_id)
        shown = json.dumps([{"name": name, "version": version.version}])
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": shown})  # by which its page shows it

    def set_status(self, status: str, time_ms: int) -> None:
        """RUNNING, or how and when the run ended."""
        if status == "RUNNING":
            _ask(self._client.update_run, self.id, status=status)
        else:
            _ask(self._client.set_terminated, self.id, status=status, end_time=time_ms)

    def _log(self, kind: str, items: list[Any]) -> None:
        most = _MOST_AT_ONCE[kind]
        for first in range(0, len(items), most):
            self._log_or_halve(kind, items[first : first + most])

    def _log_or_halve(self, kind: str, items: list[Any]) -> None:
        """MLflow stores nothing of a request in which it refuses one value: halve it until that one is alone."""
        try:
            _ask(self._client.log_batch, self.id, synchronous=True, **{kind: items})
        except Exception as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            if _get_run(self._client, self.id) is None:  # refused for this reason: all of it is to be sent again
                raise RunIsGoneError(f"MLflow run {self.id} was deleted") from error
            if len(items) == 1:
                known, one, key = self._tags.get(_REFUSED, ""), kind[:-1], items[0].key
                new = f"{one} {key}"
                text = known if new in known.split(", ") else _clean(f"{known}, {new}" if known else new, _LONGEST_TAG)
                # This raises where nothing at all can be written, as in a database that is read-only for a while.
                self._client.set_tag(self.id, _REFUSED, text)
                self._tags[_REFUSED] = text
                _log.warning("MLflow refuses %s %r; it stays in the journal: %s", one, key, describe_error(error))
                return
            half = len(items) // 2
            self._log_or_halve(kind, items[:half])
            self._log_or_halve(kind, items[half:])


def _plain(run: Any, experiment: str) -> dict[str, Any]:
    """An MLflow run in plain values; times in seconds."""
    info, data = run.info, run.data
    times = {"started": info.start_time / 1000, "ended": info.end_time / 1000 if info.end_time else None}
    # The step of a last value is in no public attribute; without it there are the values.
    points = {each.key: (each.step, each.value) for each in getattr(data, "_metric_objs", ())}
    return {
        "run_id": info.run_id,
        "run_name": info.run_name,
        "status": info.status,
        "experiment": experiment,
        **times,
        "params": dict(data.params),
        "tags": dict(data.tags),
        "last": points or {key: (0, value) for key, value in data.metrics.items()},
    }


def _plain_data(given: Any) -> tuple[str, dict[str, Any]]:
    """Of a run's dataset in MLflow the set's name (train, val, ...), and what is known of it."""
    context = next((tag.value for tag in given.tags if tag.key == "mlflow.data.context"), "data")
    known: dict[str, Any] = {"name": given.dataset.name, "digest": given.dataset.digest}
    for text, keys in ((given.dataset.source, ("class", "arguments")), (given.dataset.profile, ("samples",))):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of another program, or cut
            known |= {key: json.loads(text)[key] for key in keys}
    return context, known


@contextlib.contextmanager
def _long_timeout() -> Iterator[None]:
    """Lets a server take its time over a file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    usual = os.environ[name]
    os.environ[name] = _UPLOAD_TIMEOUT_SECONDS
    try:
        yield
    finally:
        os.environ[name] = usual


def get_ready() -> None:
    """Import mlflow, which takes seconds."""
    from mlflow import MlflowClient  # noqa: F401


def connect(uri: str) -> Any:
    """MLflow's client. One process at a time: of four that make the same sqlite store together, three die."""
    from mlflow import MlflowClient, __version__

    def open_store(uri: str) -> Any:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client

    database = sqlite_file(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # MLflow puts artifacts into ./mlruns of the folder it is in when it opens the store: let that be the store's own.
    with locked_file(database.with_name(f".{database.name}.lock"), 120), contextlib.chdir(database.parent):
        if not database.exists():
            begin_store(database, __version__, lambda file: open_store(f"sqlite:///{file}"))
        return open_store(uri)


def system_monitor(uri: str) -> Any:
    """MLflow's SystemMetricsMonitor, of which no thread is started."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    connect(uri)  # or the monitor's own client would make a new store, where all can see it half done
    return SystemMetricsMonitor(run_id="", tracking_uri=uri)


def machine_monitor() -> Any:
    """The same without a store."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # Its client is never used; of an http server it makes nothing.
    return SystemMetricsMonitor(run_id="", tracking_uri="http://unused.invalid")


def find(run_id: str, uri: str) -> dict[str, Any]:
    """What MLflow knows of a run, or why not, as {'error': ...}."""
    if (database := sqlite_file(uri)) and not database.exists():
        return {"error": f"there is no {database}"}
    try:
        run = connect(uri).get_run(run_id)
    except Exception as error:
        return {"error": describe_error(error)}
    known = {"run_id": run.info.run_id, "status": run.info.status, "lifecycle": run.info.lifecycle_stage}
    return {**known, "tags": dict(run.data.tags)}


def probe(experiment: str, uri: str) -> dict[str, Any]:
    """Whether MLflow can be written to, or why not, as {'error': ...}; a tag is set and taken away again."""
    try:
        client = connect(uri)
        # Where the experiment is not there, any other: a new one could not be removed without a trace.
        known = client.get_experiment_by_name(experiment) or next(iter(client.search_experiments(max_results=1)), None)
        if known is not None:
            client.set_experiment_tag(known.experiment_id, "dtrain.doctor", "probe")
            client.delete_experiment_tag(known.experiment_id, "dtrain.doctor")
        return {}
    except Exception as error:
        return {"error": describe_error(error)}


def _ask(request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A request that may be repeated: once, at once, where the server is quick to say that it is out of order.

    One of several backends may be. Where all are, or none answers, the pauses are `delivery.follow`'s.
    """
    began = time.monotonic()
    try:
        return request(*arguments, **options)
    except Exception as error:
        if not is_passing(error) or time.monotonic() > began + _QUICK_SECONDS:
            raise
    return request(*arguments, **options)


def is_passing(error: BaseException) -> bool:
    """Whether an error says nothing of what was asked for: no answer, or a server (status 5xx, 429) out of order."""
    return getattr(error, "error_code", "") in _PASSING


def describe_error(error: BaseException) -> str:
    """One line on an error: where it began ('Connection refused') says more than the six errors wrapped around it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed here: pip install {error.name}"
    root = error
    while below := root.__cause__ or root.__context__:
        root = below
    if isinstance(root, OSError) and root.strerror:
        return redact(f"{root.strerror}: {root.filename}" if root.filename else root.strerror)
    from_network = isinstance(root, OSError) or str(error).startswith("API request to")
    from_database = any(kind.__name__ == "DatabaseError" for kind in type(root).__mro__)  # as all drivers have it
    lines = str(root if from_network or from_database else error).strip().splitlines()
    return redact(lines[0][:300]) if lines else type(error).__name__


def _get_run(client: Any, run_id: str) -> Any:
    """The run as mlflow has it, None when it is not there or deleted; a server that is away is another matter."""
    try:
        run = _ask(client.get_run, run_id)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _signature(described: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """MLflow's signature of the tensors that a model takes and gives; None where they are not known."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    if not described:
        return None

    def schema(tensors: Sequence[Mapping[str, Any]]) -> Any:
        return Schema([TensorSpec(np.dtype(one["dtype"]), tuple(one["shape"]), one.get("name")) for one in tensors])

    return ModelSignature(schema(described["inputs"]), schema(described["outputs"]))


def mlflow_model_name(name: str) -> str:
    """A name that MLflow takes for a logged model: without the characters that its addresses are made of."""
    return re.sub(r"[/:.%\"'\s]+", "-", name).strip("-")[:200] or "model"


def mlflow_key(name: str, refused: str = r"[^\w.\-/ :]") -> str:
    """A key that MLflow takes: the name itself, or what can be left of it and a mark that keeps two of these apart."""
    clean = re.sub(refused, "_", name)
    whole = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
    if clean == name and whole and len(name) <= _LONGEST_KEY:
        return name
    names = [part for part in clean.split("/") if part.strip(".")]
    mark = hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{'/'.join(names).lstrip('.')[:240]}-{mark}"


def _clean(text: str, longest: int) -> str:
    """Text that every database takes: no NUL, no half of a surrogate pair, not too long."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\\0")[:longest]
