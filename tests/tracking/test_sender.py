"""The sender, against real sqlite stores and MLflow's own server, whole, lossy, away or silent."""

import errno
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY
from stores import GONE_PID, deliver, rows_of, run_of, runs_in, wait_until, write_run

from dtrain.tracking import delivery, file_queue, mlflow_store, retry, sender, start_sender
from dtrain.tracking.delivery import HOPELESS, Delivery, follow
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow_store import MlflowStore, connect, mlflow_key
from dtrain.tracking.run_folder import close_run_of, lives, read_run, update_run
from dtrain.tracking.start_sender import find_run
from dtrain.tracking.uri import sqlite_file

pytestmark = pytest.mark.usefixtures("client_settings")


# A store that answers


@pytest.mark.usefixtures("quiet_journal")
def test_a_whole_run(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints/step-1").mkdir(parents=True)
    (folder / "checkpoints/step-1/model.safetensors").write_bytes(b"weights")
    (folder / "checkpoints/best").symlink_to("step-1")
    (folder / "config.yaml").write_text("seed: 0\n")
    artifacts = [("config.yaml", "config"), ("checkpoints/best/model.safetensors", ""), ("checkpoints/best", "all")]
    params = {"optimizer.lr": 1e-3, "seed": None, "model.name": "ViT"}
    write_run(folder, range(0, 2500, 50), params, artifacts=artifacts, tags={"mine": "x"}, world_size=2)
    assert deliver(folder, uri) == 0

    run = run_of(folder, uri)
    assert run.data.params == {"optimizer.lr": "0.001", "seed": "None", "model.name": "ViT"}
    assert run.info.status == "FINISHED" and run.info.run_name == "vit"
    facts = read_run(folder)
    assert run.info.start_time == round(facts["started"] * 1000) <= run.info.end_time
    tags = run.data.tags
    assert tags["dtrain.checkpoint_dir"] == str(folder) and tags["mine"] == "x" and tags["world_size"] == "2"
    assert tags["mlflow.source.name"] == "dtrain" and tags["host"] == socket.gethostname()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (line["step"], line["values"]["train/loss"], round(line["time"] * 1000))
        for line in lines
        if line["kind"] == "metrics"
    ]
    assert rows_of(folder, uri, "train/loss") == expected and len(expected) == 50
    files = Path(run.info.artifact_uri)
    assert files.is_relative_to(sqlite_file(uri).parent / "mlruns")  # type: ignore[union-attr]
    stored = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
    assert stored == ["all/model.safetensors", "config/config.yaml", "model.safetensors"]


@pytest.mark.usefixtures("quiet_journal")
def test_a_second_delivery_has_nothing_to_do(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(5))
    assert deliver(folder, uri) == 0
    assert deliver(folder, "http://127.0.0.1:9") == 0  # it does not even connect


@pytest.mark.usefixtures("quiet_journal")
def test_a_replay_adds_nothing(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(1500), {"lr": 1}, experiment="replay")
    assert deliver(folder, uri) == 0
    before = rows_of(folder, uri, "train/loss")
    (folder / "mlflow.json").unlink()
    assert deliver(folder, uri) == 0
    assert rows_of(folder, uri, "train/loss") == before and len(before) == 1500
    assert len(runs_in(uri, "replay")) == 1
    assert run_of(folder, uri).data.params == {"lr": "1"}


def test_a_sync_that_fails_ends_with_where_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, uri = tmp_path / "run", "http://me:secret@127.0.0.1:9"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "run.json").write_text('{"state": "FINISHED"}')

    def refused(work: Delivery) -> int:
        work.report("Connection refused")
        return 1

    monkeypatch.setattr(sender, "follow", refused)
    monkeypatch.setattr(mlflow_store, "CLIENT_SETTINGS", {})  # which a sender puts into its environment
    assert sender.main([str(folder), "--tracking-uri", uri]) == 1
    text = f"MLflow (http://***@127.0.0.1:9) does not have all of {folder}: Connection refused"
    assert capsys.readouterr().err.splitlines()[-1] == f"dtrain sync: {text}; nothing is lost, try again later"


@pytest.mark.usefixtures("quiet_journal")
def test_an_image_is_mlflows_image_of_its_step_however_often_it_is_sent(tmp_path: Path, uri: str) -> None:
    from PIL import Image

    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (600, 300), (1, 2, 3)).save(folder / "pictures/a.png")
    journal = Journal(folder, experiment="pictures", run_name="vit", tracking_uri=uri)
    journal.start({}, {})
    for step in (10, 20):
        journal.image("pictures/a.png", "val/sample 1", step)
    journal.image("pictures/a.png", "val/größe: 1", 20)
    journal.image("pictures/gone.png", "val/gone", 20)
    journal.finish("FINISHED")

    def stored() -> list[Path]:
        return sorted((Path(run_of(folder, uri).info.artifact_uri) / "images").iterdir())

    assert deliver(folder, uri) == 0
    of_other = [path for path in stored() if path.name.startswith("val~gr__e_ 1-")]  # MLflow takes ASCII alone here
    assert len(of_other) == 4
    before = [path for path in stored() if path not in of_other]
    times = [
        round(line["time"] * 1000) for line in map(json.loads, (folder / "metrics.jsonl").open()) if "step" in line
    ]
    for step, time_ms in zip((10, 20), times, strict=False):
        thumbnail, image = [path for path in before if path.name.startswith(f"val~sample 1+step+{step}+")]
        assert f"+timestamp+{time_ms}+" in image.name and thumbnail.name == f"{image.stem}+compressed.webp"
        with Image.open(image) as found:
            assert found.size == (600, 300) and found.getpixel((0, 0)) == (1, 2, 3)
    # MLflow's page begins at step 0, and of pictures of one step it shows the last one by name: the newest.
    at_first = [path.name for path in before if path.name.startswith("val~sample 1+step+0+")]
    assert [int(name.split("+")[4]) for name in at_first] == sorted(2 * [*{*times[:2]}])
    assert len(before) == 4 + len(at_first) and run_of(folder, uri).data.tags["mlflow.loggedImages"] == "True"
    (folder / "mlflow.json").unlink()
    thumbnail.unlink()  # of step 20: an attempt that was cut off between the image and its thumbnail
    assert deliver(folder, uri) == 0
    assert len(stored()) == len(before) + len(of_other) - 1 + 2 and {*before} - {thumbnail} < {*stored()}


@pytest.mark.usefixtures("quiet_journal")
@pytest.mark.parametrize(("status", "reason"), [("FINISHED", ""), ("FAILED", "a reason"), ("KILLED", "a reason")])
def test_the_status_is_how_the_run_ended(tmp_path: Path, uri: str, status: str, reason: str) -> None:
    folder = write_run(tmp_path, range(3), status=status)
    assert deliver(folder, uri) == 0
    run = run_of(folder, uri)
    assert run.info.status == status
    assert run.data.tags.get("dtrain.reason", "") == reason
    assert abs(run.info.end_time - round(read_run(folder)["ended"] * 1000)) < 1000


@pytest.mark.usefixtures("quiet_journal")
def test_a_resumed_training_continues_its_run(tmp_path: Path, uri: str) -> None:
    params = {"optimizer.lr": 1e-3, "seed": 0}
    write_run(tmp_path, range(0, 60, 10), params, status="KILLED", experiment="resumed")
    assert deliver(tmp_path, uri) == 0
    changed = {"optimizer.lr": 5e-4, "seed": 0, "new": 1}
    write_run(tmp_path, range(30, 90, 10), changed, experiment="resumed")
    assert deliver(tmp_path, uri) == 0

    run = run_of(tmp_path, uri)
    assert len(runs_in(uri, "resumed")) == 1
    assert run.info.status == "FINISHED"
    assert run.data.tags["dtrain.reason"] == ""  # not the first training's
    assert run.data.params == {"optimizer.lr": "0.001", "seed": "0", "resume_2/optimizer.lr": "0.0005", "new": "1"}
    assert [step for step, _, _ in rows_of(tmp_path, uri, "train/loss")] == list(range(0, 90, 10))


@pytest.mark.usefixtures("quiet_journal")
def test_two_trainings_undelivered_are_delivered_in_order(tmp_path: Path, uri: str) -> None:
    write_run(tmp_path, range(3), {"lr": 1}, status="FAILED")
    write_run(tmp_path, range(3, 6), {"lr": 2})
    assert deliver(tmp_path, uri) == 0
    run = run_of(tmp_path, uri)
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1", "resume_2/lr": "2"}
    assert [step for step, _, _ in rows_of(tmp_path, uri, "lr")] == list(range(6))


@pytest.mark.usefixtures("quiet_journal")
def test_a_deleted_run_gets_a_successor_with_the_whole_history(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, range(3), {"lr": 1}, status="KILLED")
    assert deliver(tmp_path, uri) == 0
    old = read_run(tmp_path)["run_id"]
    connect(uri).delete_run(old)
    write_run(tmp_path, range(3, 6), {"lr": 1})
    work = Delivery(tmp_path, MlflowStore(uri))
    assert follow(work) == 0
    new = read_run(tmp_path)["run_id"]
    run = run_of(tmp_path, uri)
    assert new != old and run.data.tags["dtrain.replaces"] == old and run.info.status == "FINISHED"
    assert [step for step, _, _ in rows_of(tmp_path, uri, "lr")] == list(range(6))
    assert run.data.params == {"lr": "1"}
    warnings = [record.getMessage() for record in caplog.records if old in record.getMessage()]
    assert len(warnings) == 1 and new in warnings[0]
    assert json.loads((tmp_path / "mlflow.json").read_text())["note"] == warnings[0]


@pytest.mark.usefixtures("quiet_journal")
def test_a_run_deleted_while_it_is_fed_gets_a_successor_too(tmp_path: Path, uri: str) -> None:
    write_run(tmp_path, range(3), status="KILLED")
    work = Delivery(tmp_path, MlflowStore(uri))
    assert follow(work) == 0
    connect(uri).delete_run(read_run(tmp_path)["run_id"])
    write_run(tmp_path, range(3, 6))
    assert follow(work, patience_seconds=20) == 0  # the same process, which still holds the run
    assert [step for step, _, _ in rows_of(tmp_path, uri, "lr")] == list(range(6))


@pytest.mark.usefixtures("quiet_journal")
def test_a_deleted_experiment_keeps_its_name_and_the_training_goes_on_in_the_next(tmp_path: Path, uri: str) -> None:
    write_run(tmp_path, range(3), experiment="thrown away", status="KILLED")
    assert deliver(tmp_path, uri) == 0
    client = connect(uri)
    client.delete_experiment(client.get_experiment_by_name("thrown away").experiment_id)
    write_run(tmp_path, range(3, 6), experiment="thrown away")
    assert deliver(tmp_path, uri) == 0
    assert client.get_experiment(run_of(tmp_path, uri).info.experiment_id).name == "thrown away (2)"
    assert len(rows_of(tmp_path, uri, "lr")) == 6


@pytest.mark.usefixtures("quiet_journal")
def test_no_param_is_lost_or_refused(tmp_path: Path, uri: str) -> None:
    params: dict[str, Any] = {f"model.layer {index}.α-β_{index}": index for index in range(250)}
    odd = [
        "a@b",
        "a#b",
        "a[0]",
        "a//b",
        "a/../b",
        "/a",
        "a/",
        "..",
        ".",
        "..a",
        "",
        "x" * 300,
        "x" * 301,
        "a\nb",
        "\ud800",
    ]
    params |= {key: index for index, key in enumerate(odd)}
    params |= {
        "long": "y" * 20_000,
        "none": None,
        "list": [],
        "empty": "",
        "nul": "a\0b",
        "half": "\udc80",
        "umlaut": "ü",
    }
    folder = write_run(tmp_path, params=params)
    assert deliver(folder, uri) == 0
    stored = run_of(folder, uri).data.params
    assert len(stored) == len(params)
    assert stored["long"] == "y" * 6000 and stored["none"] == "None" and stored["umlaut"] == "ü"
    assert stored["model.layer 7.α-β_7"] == "7"
    assert Counter(stored.values())["3"] == 2  # 'a//b' and layer 3


@pytest.mark.parametrize("name", ["a@b", "a//b", "/a", "..", "", ".", "..a/x", "x" * 300, "a\n", "🙂", "a/./b", "..."])
def test_a_mended_key_is_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(mlflow_key(name))
    assert len(mlflow_key(name)) <= 250
    assert mlflow_key(name) != mlflow_key(name + "@")
    assert mlflow_key(mlflow_key(name)) == mlflow_key(name)


@pytest.mark.usefixtures("quiet_journal")
def test_figures_that_are_no_finite_numbers_and_odd_names(tmp_path: Path, uri: str) -> None:
    figures = {"nan": float("nan"), "inf": float("inf"), "minus": float("-inf"), "Recall@5": 0.5, "val/IoU": 0.25}
    folder = write_run(tmp_path, [7], figures=lambda step: figures)
    assert deliver(folder, uri) == 0
    stored = run_of(folder, uri).data.metrics
    assert math.isnan(stored["nan"]) and stored["inf"] > 1e308 and stored["minus"] < -1e308
    assert stored[mlflow_key("Recall@5")] == 0.5 and stored["val/IoU"] == 0.25
    (folder / "mlflow.json").unlink()
    assert deliver(folder, uri) == 0
    assert all(len(rows_of(folder, uri, key)) == 1 for key in stored)


@pytest.mark.usefixtures("quiet_journal")
def test_a_value_that_mlflow_refuses_takes_no_other_with_it(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "mlflow_key", lambda name: name)  # as if MLflow's rules had become stricter
    folder = write_run(
        tmp_path, range(20), figures=lambda step: {"good": step, f"bad@{step}" if step in (3, 4) else "a": 1}
    )
    assert deliver(folder, uri) == 0
    run = run_of(folder, uri)
    assert run.info.status == "FINISHED" and set(run.data.metrics) == {"good", "a"}
    assert len(rows_of(folder, uri, "good")) == 20
    refused = [record.getMessage() for record in caplog.records if "refuses metric" in record.getMessage()]
    assert len(refused) == 2 and "bad@3" in refused[0] and "bad@4" in refused[1]
    assert run.data.tags["dtrain.refused"] == "metric bad@3, metric bad@4"


@pytest.mark.usefixtures("quiet_journal")
def test_damaged_lines_are_left_out(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path, range(3), status=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('not JSON\n[1]\n{"kind": "metrics", "time": 1.0}\n{"kind": "metrics", "ti')
    close_run_of(folder, GONE_PID)
    assert deliver(folder, uri) == 0
    assert len(rows_of(folder, uri, "lr")) == 3
    assert run_of(folder, uri).info.status == "FAILED"
    assert len([record for record in caplog.records if "damaged" in record.getMessage()]) == 3


@pytest.mark.usefixtures("quiet_journal")
def test_files_cannot_hold_up_a_status_nor_leave_the_run_folder(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "good").write_text("x")
    write_run(folder, range(3), artifacts=[("missing", ""), ("link", ""), ("good", "")])
    work = Delivery(folder, MlflowStore(uri))
    work.is_draining = True
    work._open()
    place = Path(run_of(folder, uri).info.artifact_uri)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file where the folder should be")  # the artifact store is out of order
    work.step()
    assert run_of(folder, uri).info.status == "FINISHED"
    assert follow(work) == 1 and work.memory.problem.startswith("not sent: good: ")
    assert (
        len([record for record in caplog.records if "is not there, or not in the run folder" in record.getMessage()])
        == 2
    )
    place.unlink()
    assert deliver(folder, uri) == 0
    assert [path.name for path in place.iterdir()] == ["good"]


class Shelf:
    """A store that takes figures and, of files, only those that are not in `refuses`; each try takes `seconds`."""

    uri, id, name, experiment_id = "shelf:", "1", "vit", "0"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds, self.refuses = 1000.0, 0.0, {"bad"}
        self.tries: list[tuple[float, str]] = []
        self.figures: list[float] = []  # when some came
        self.status = ""
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, time=time.time)
        monkeypatch.setattr(delivery, "time", clock)
        monkeypatch.setattr(retry, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def known(self, run_id: str | None) -> "Shelf":
        return self

    create = known

    def log_metrics(self, rows: Any) -> None:
        self.figures += [self.now] if rows else []

    def log_params(self, values: Any, attempt: int) -> None:
        pass

    def log_tags(self, values: Any) -> None:
        pass

    def set_status(self, status: str, time_ms: int) -> None:
        self.status = status

    def log_file(self, path: Path, to: str) -> None:
        self.tries.append((self.now, path.name))
        self.now += self.seconds
        if path.name in self.refuses:
            raise OSError(f"{path.name} is too large")

    def log_image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        self.log_file(path, "")

    def train(self, work: Delivery, seconds: float) -> None:
        """A figure and a look every tenth of a second."""
        end = self.now + seconds
        while self.now < end:
            line = {"kind": "metrics", "time": time.time(), "step": round(self.now * 10), "values": {"loss": 1.0}}
            with (work.folder / "metrics.jsonl").open("a") as journal:
                journal.write(json.dumps(line) + "\n")
            work.step()
            self.now += 0.1


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Shelf, Delivery]:
    """It, and the delivery of a run with five files, of which one is refused."""
    shelf, names = Shelf(monkeypatch), ["bad", *"1234"]
    for name in names:
        (tmp_path / name).write_text("x")
    write_run(tmp_path, artifacts=[(name, "") for name in names], status=None)
    return shelf, Delivery(tmp_path, shelf)


@pytest.mark.usefixtures("quiet_journal")
def test_a_refused_file_holds_up_neither_other_files_nor_figures(shelf: tuple[Shelf, Delivery]) -> None:
    store, work = shelf
    began = store.now
    store.train(work, 65)
    assert [name for _, name in store.tries[:5]] == ["bad", *"1234"] and store.tries[4][0] < began + 2
    again, names = zip(*store.tries[5:], strict=True)
    assert names == ("bad",) * 3 and all(b - a >= 30 for a, b in pairwise(again))
    assert max(b - a for a, b in pairwise(store.figures)) < 1.5
    assert work.problem == "not sent: bad: bad is too large" and not work.done
    store.refuses = set()
    store.train(work, 31)
    assert work.problem == "" and not work.memory.artifacts


@pytest.mark.usefixtures("quiet_journal")
def test_files_that_fail_slowly_leave_figures_their_turn(shelf: tuple[Shelf, Delivery]) -> None:
    store, work = shelf
    store.seconds, store.refuses = 20.0, {"bad", *"1234"}
    began = store.now
    store.train(work, 1200)
    busy = 20.0 * len(store.tries)
    assert len(store.tries) >= 3 and busy / (store.now - began) < 0.12


@pytest.mark.usefixtures("quiet_journal")
@pytest.mark.parametrize("is_mended", [False, True])
def test_after_the_run_a_file_is_tried_at_once_and_a_few_times_more(
    shelf: tuple[Shelf, Delivery], is_mended: bool
) -> None:
    store, work = shelf
    store.train(work, 100)
    write_run(work.folder, status="FINISHED")
    tried, ended = len(store.tries), store.now
    store.refuses -= {"bad"} if is_mended else set()
    assert follow(work) == (0 if is_mended else 1)
    assert len(store.tries) - tried == (1 if is_mended else file_queue._TRIES_AT_END)
    assert store.now - ended < 8 and store.status == "FINISHED"


@pytest.mark.usefixtures("quiet_journal")
def test_files_that_fail_slowly_at_the_end_are_given_up_in_time(shelf: tuple[Shelf, Delivery]) -> None:
    store, work = shelf
    store.seconds, store.refuses = 9.0, {"bad", *"1234"}
    write_run(work.folder, status="FINISHED")
    began = store.now
    assert follow(work, patience_seconds=20) == 1
    assert store.now - began < 40 and len(work.memory.artifacts) == 5
    assert work.problem.startswith("not sent: ")


@pytest.mark.usefixtures("quiet_journal")
def test_pictures_that_are_gone_before_they_could_be_sent_are_reported(shelf: tuple[Shelf, Delivery]) -> None:
    store, work = shelf
    work.memory.artifacts = [["pictures/step-8/val.png", "val/worst", 8, 0]]
    write_run(work.folder, status="FINISHED")
    store.refuses = set()
    assert follow(work) == 0
    assert work.memory.note == "pictures were removed before they could be sent, such as pictures/step-8/val.png"


def test_rank_0s_end_is_bounded_and_says_which_file_is_not_sent(tmp_path: Path) -> None:
    """By a sender of its own."""
    store, folder = tmp_path / "store", tmp_path / "run"
    folder.mkdir()
    (folder / "good").write_text("x")
    options: Any = {"experiment": "e", "run_name": "r", "system_metrics": False, "exit_timeout_seconds": 200}
    journal = Journal(folder, tracking_uri=str(store), **options)
    journal.start({}, {}, [("good", "")])
    wait_until(lambda: read_run(folder).get("run_id"))
    place = Path(run_of(folder, journal.tracking_uri).info.artifact_uri)
    wait_until((place / "good").exists)
    (folder / "late").write_text("x")
    (place / "there").write_text("a file where the folder should be")
    journal.artifact("late", "there")
    hint = journal.finish("FINISHED")
    assert "not sent: late: " in hint and f"dtrain sync {folder}" in hint
    assert run_of(folder, journal.tracking_uri).info.status == "FINISHED"
    (place / "there").unlink()
    assert deliver(folder, journal.tracking_uri) == 0 and (place / "there" / "late").exists()


@pytest.mark.usefixtures("quiet_journal")
def test_without_mlflow_the_journal_stays_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path, range(3))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert deliver(folder, "sqlite:////nowhere/mlflow.db") == HOPELESS
    problem = json.loads((folder / "mlflow.json").read_text())["problem"]
    assert problem == "mlflow is not installed here: pip install mlflow"
    assert [record.getMessage() for record in caplog.records] == [problem]


# Rank 0 is gone


@pytest.mark.usefixtures("quiet_journal")
def test_a_run_without_an_end_is_closed_as_failed(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(3), status=None)
    assert sender.main([str(folder), "--tracking-uri", uri]) == 0
    run, facts = run_of(folder, uri), read_run(folder)
    assert run.info.status == facts["state"] == "FAILED"
    assert run.data.tags["dtrain.reason"] == facts["reason"] == "rank 0 exited without reporting an error"
    assert len(rows_of(folder, uri, "lr")) == 3


@pytest.mark.usefixtures("quiet_journal")
def test_an_end_that_only_the_journal_knows_is_believed(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(3), status="KILLED")
    update_run(folder, state="RUNNING", reason="", pid=GONE_PID)  # killed between the two writes
    assert close_run_of(folder, GONE_PID)
    assert read_run(folder)["state"] == "KILLED" and read_run(folder)["reason"] == "a reason"
    assert deliver(folder, uri) == 0
    assert run_of(folder, uri).info.status == "KILLED"


@pytest.mark.usefixtures("quiet_journal")
def test_a_run_folder_that_a_new_rank_0_took_over_is_left_to_its_sender(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(3), status=None)
    update_run(folder, pid=os.getpid(), state="RUNNING")
    assert follow(Delivery(folder, MlflowStore(uri)), parent=GONE_PID) == 1
    assert read_run(folder)["state"] == "RUNNING" and read_run(folder)["run_id"] is None


@pytest.mark.usefixtures("quiet_journal")
def test_a_run_that_continues_is_not_closed(tmp_path: Path, uri: str) -> None:
    folder = write_run(tmp_path, range(3), status=None)
    update_run(folder, pid=os.getpid())
    assert sender.main([str(folder), "--tracking-uri", uri]) == 0
    assert run_of(folder, uri).info.status == read_run(folder)["state"] == "RUNNING"
    assert lives(read_run(folder)) and not lives({**read_run(folder), "pid": GONE_PID})
    assert not lives({**read_run(folder), "attempt_started": 0.0})  # another process with that number


# A server that is away, lossy or silent: MLflow's own, in a thread


class Server:
    """MLflow's REST server on one port, which can be stopped and started, and made to misbehave."""

    def __init__(self, folder: Path) -> None:
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
        from mlflow.server import app

        self._app = app
        self._server: Any = None
        self.lost = 0.0  # share of the requests whose answer is lost, after they were carried out
        self.refused = 0.0  # share of the requests that meet a 503 instead
        self._random = random.Random(0)
        self.silent = threading.Event()
        self.port = 0
        self.start()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __call__(self, environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.silent.is_set():
            time.sleep(2)
        if self._random.random() < self.refused:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        if self._random.random() < self.lost:
            list(self._app(environment, lambda *_: None))
            raise ConnectionError("the answer got lost")
        return self._app(environment, start_response)

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *arguments: Any) -> None:
                pass

        self._server = make_server("127.0.0.1", self.port, self, request_handler=Quiet)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def server(server_process: Server) -> Iterator[Server]:
    yield server_process
    server_process.lost = server_process.refused = 0.0
    server_process.silent.clear()


@pytest.mark.usefixtures("quiet_journal", "impatient")
@pytest.mark.parametrize("fault", ["lost", "refused"])
def test_a_lossy_server_gets_each_row_once_and_one_run(tmp_path: Path, server: Server, fault: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = write_run(tmp_path, range(600), {"lr": 1, "x": 2}, experiment=fault, artifacts=[("file", "")])
    setattr(server, fault, 0.3)
    assert deliver(folder, server.uri, patience_seconds=300) == 0
    setattr(server, fault, 0.0)
    assert len(runs_in(server.uri, fault)) == 1
    run = run_of(folder, server.uri)
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1", "x": "2"}
    rows = rows_of(folder, server.uri, "lr")
    assert [step for step, _, _ in rows] == list(range(600))


@pytest.mark.usefixtures("quiet_journal")
def test_a_server_that_is_away_costs_nothing_but_time(tmp_path: Path, server: Server) -> None:
    folder = write_run(tmp_path, range(10), experiment="away")
    server.stop()
    try:
        assert deliver(folder, server.uri) == 1
    finally:
        server.start()
    memory = json.loads((folder / "mlflow.json").read_text())
    assert memory["problem"] == "Connection refused" and memory["offset"] == 0
    assert deliver(folder, server.uri) == 0
    assert len(rows_of(folder, server.uri, "lr")) == 10 and len(runs_in(server.uri, "away")) == 1


@pytest.mark.usefixtures("quiet_journal", "impatient")
def test_a_server_that_comes_back_gets_the_rest(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path, range(10))
    server.stop()
    work = Delivery(folder, MlflowStore(server.uri))
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(follow(work, patience_seconds=300)))
    thread.start()
    try:
        while not work.memory.problem and thread.is_alive():
            time.sleep(0.01)
    finally:
        server.start()
    thread.join(400)
    assert status == [0] and len(rows_of(folder, server.uri, "lr")) == 10
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith("dtrain")
    ]  # not MLflow's own
    assert messages == ["Connection refused", "delivering again"]


@pytest.mark.usefixtures("quiet_journal")
def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path, range(10))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # instead of 10
    server.silent.set()
    assert deliver(folder, server.uri) == 1
    assert "timed out" in json.loads((folder / "mlflow.json").read_text())["problem"].lower()
    server.silent.clear()
    monkeypatch.undo()
    assert deliver(folder, server.uri, patience_seconds=300) == 0
    assert len(rows_of(folder, server.uri, "lr")) == 10


# The process itself


def test_many_trainings_start_at_once_on_a_store_that_is_not_there(tmp_path: Path) -> None:
    """One import of mlflow, then four processes that meet in the same moment, as the jobs of an array do."""
    script = """
import os, sys
from dtrain.tracking.mlflow_store import MlflowStore
import mlflow
from mlflow.store.tracking import sqlalchemy_store
children = []
for index in range(4):
    pid = os.fork()
    if pid == 0:
        try:
            facts = {"experiment": "e", "id": str(index), "started": 1.0, "run_name": "r"}
            MlflowStore(sys.argv[1]).create("/x", facts)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    children.append(pid)
print([os.waitpid(pid, 0)[1] for pid in children])
"""
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", script, uri], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == str([0] * 4), done.stderr
    assert len(runs_in(uri, "e")) == 4


def status_of(pid: int) -> dict[str, str]:
    """What /proc says of a process; a process that is gone has no memory, and a zombie has none either."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ignores(pid: int, number: int) -> bool:
    return bool(int(status_of(pid)["SigIgn"], 16) >> (number - 1) & 1)


def test_a_training_with_its_sender(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "t0p-s3cr3t")
    repository = tmp_path / "code of mine"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@x"]
    (repository / "train.py").write_text("lr = 1\n")
    (repository / "mlflow.py").write_text("raise RuntimeError('the wrong mlflow')\n")
    subprocess.run([*git[:3], "init", "-q"], check=True)
    subprocess.run([*git, "add", "train.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (repository / "train.py").write_text("lr = 2\napi_key = 'a-key-of-mine'\n")
    monkeypatch.chdir(repository)

    folder = tmp_path / "run"
    journal = Journal(folder, experiment="process", run_name="r", tracking_uri=uri, exit_timeout_seconds=200)
    journal.start({"lr": 1}, {"mlflow.source.name": "train.py"}, world_size=1)
    process = journal._sender
    assert process is not None and os.getpgid(process.pid) == process.pid  # no Ctrl-C, no torchrun reaches it
    command = Path(f"/proc/{process.pid}/cmdline").read_text()
    peaks: list[int] = []  # of resident memory, in kB; the last one is of its last moments
    threading.Thread(target=lambda: peaks.extend(peaks_until_gone(process.pid))).start()
    wait_until(lambda: ignores(process.pid, signal.SIGTERM))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process.pid, number)  # a batch system signals all processes of a job
    for step in range(100):
        journal.log(step, {"train/loss": step})
    assert journal.finish("FINISHED") == ""

    assert process.returncode == 0
    run = run_of(folder, uri)
    assert run.info.status == "FINISHED"
    assert len(rows_of(folder, uri, "train/loss")) == 100
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(run.data.metrics)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert run.data.tags["mlflow.source.git.commit"] == commit and run.data.tags["dtrain.code_changed"] == "True"
    code = Path(run.info.artifact_uri) / "code"
    assert (code / "commit.txt").read_text().strip() == commit
    assert "+lr = 2" in (code / "diff.patch").read_text() and "mlflow.py" in (code / "status.txt").read_text()
    assert "a-key-of-mine" not in (code / "diff.patch").read_text()
    assert uri not in command and "s3cr3t" not in (folder / "logs/sender.log").read_text()
    assert 0 < max(peaks) <= 350 * 1024


def peaks_until_gone(pid: int) -> Iterator[int]:
    while (fields := status_of(pid)).get("VmHWM"):
        yield int(fields["VmHWM"].split()[0])
        time.sleep(0.01)


RANK_0 = """
import os, sys, time
from dtrain.tracking.journal import Journal
journal = Journal(sys.argv[1], experiment="killed", run_name="r", tracking_uri=sys.argv[2])
journal.start({}, {}, world_size=1)
for _ in range(2):  # loader workers, which hold whatever rank 0 has open
    if os.fork() == 0:
        time.sleep(1000)
        os._exit(0)
print(journal._sender.pid, flush=True)
for step in range(10**9):
    journal.log(step, {"a": step})
    print(step, flush=True)
    time.sleep(0.001)
"""


def test_after_a_kill_of_rank_0_the_rest_is_delivered_and_the_run_is_failed(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "run"
    rank0 = subprocess.Popen(
        [sys.executable, "-c", RANK_0, folder, uri],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    assert rank0.stdout is not None
    try:
        sender_pid = int(rank0.stdout.readline())
        wait_until(lambda: read_run(folder).get("run_id"))
        rank0.kill()
        rank0.wait(200)
        wait_until(lambda: read_run(folder)["state"] != "RUNNING")
        wait_until(lambda: "VmHWM" not in status_of(sender_pid))
    finally:
        os.killpg(rank0.pid, signal.SIGKILL)
    last = int(rank0.stdout.read().split()[-1])
    rank0.stdout.close()
    assert read_run(folder)["state"] == run_of(folder, uri).info.status == "FAILED"
    assert read_run(folder)["reason"] == "rank 0 exited without reporting an error"
    assert [step for step, _, _ in rows_of(folder, uri, "a")][: last + 1] == list(range(last + 1))


def test_a_server_that_never_comes_costs_a_bounded_wait_and_a_hint(tmp_path: Path, uri: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://me:hunter2@127.0.0.1:{nobody.getsockname()[1]}"
        journal = Journal(tmp_path, experiment="e", run_name="r", tracking_uri=address, exit_timeout_seconds=2)
        journal.start({}, {}, world_size=1)
        journal.log(1, {"a": 1})
        process = journal._sender
        assert process is not None
        hint = journal.finish("FINISHED")  # where it would wait for ever, the test is ended
    assert f"dtrain sync {tmp_path}" in hint and "\n" not in hint
    assert process.returncode is not None  # gone with the run
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "hunter2" not in written
    assert sender.main([str(tmp_path), "--tracking-uri", uri]) == 0
    assert run_of(tmp_path, uri).info.status == "FINISHED"


@pytest.mark.usefixtures("quiet_journal")
def test_a_problem_that_cannot_be_written_down_ends_no_sender(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", range(10))

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dtrain.tracking.run_folder.Memory.save", full)
        assert deliver(folder, uri) == 1
    assert deliver(folder, uri) == 0
    assert len(rows_of(folder, uri, "train/loss")) == 10


@pytest.mark.usefixtures("quiet_journal")
def test_a_run_is_found_by_its_id(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, range(3))
    assert deliver(folder, uri) == 0
    monkeypatch.undo()  # the real sender
    run_id = read_run(folder)["run_id"]
    answer = find_run(run_id, uri, timeout_seconds=200)
    assert answer["tags"]["dtrain.checkpoint_dir"] == str(folder)
    assert (answer["run_id"], answer["status"], answer["lifecycle"]) == (run_id, "FINISHED", "active")


def test_a_run_that_is_not_there_is_an_error_that_says_where_it_was_looked_for(tmp_path: Path, uri: str) -> None:
    assert "not found" in mlflow_store.find("0" * 32, uri)["error"]
    with pytest.raises(LookupError, match="MLflow run abc in ") as caught:
        find_run("abc", str(tmp_path))
    assert str(caught.value).endswith(f"sqlite:///{tmp_path}/mlflow.db: there is no {tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []  # looking makes no store
    with pytest.raises(LookupError, match=r"no answer within 0\.01 s"):
        find_run("abc", uri, timeout_seconds=0.01)


@pytest.mark.usefixtures("quiet_journal")
def test_wrong_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in ([], [str(tmp_path)], [str(write_run(tmp_path / "a")), "--tracking-uri", "file:///x"]):
        with pytest.raises(SystemExit) as end:
            sender.main(arguments)
        assert end.value.code == 2
    update_run(tmp_path / "a", tracking_uri="postgresql://***@host/db")
    with pytest.raises(SystemExit):
        sender.main([str(tmp_path / "a")])
    assert "give --tracking-uri or MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_a_sender_gets_ready_before_there_is_a_run(tmp_path: Path, uri: str) -> None:
    sender = start_sender.prepare_sender(uri)
    assert sender is not None
    database = Path(uri.removeprefix("sqlite:///"))
    wait_until(database.exists)
    assert sender.poll() is None
    options: Any = {"run_name": "r", "tracking_uri": uri, "sender": sender, "exit_timeout_seconds": 200}
    journal = Journal(tmp_path / "run", experiment="ready", **options)
    journal.start({"lr": 1}, {}, world_size=1)
    journal.log(1, {"train/loss": 0.5})
    assert journal.finish("FINISHED") == ""
    assert sender.returncode == 0
    run = run_of(tmp_path / "run", uri)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.5)
    assert (tmp_path / "run" / "logs" / "sender.log").exists()


def test_a_sender_of_which_no_run_comes_ends_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sender = start_sender.prepare_sender("http://127.0.0.1:9")
    assert sender is not None and sender.stdin is not None
    sender.stdin.close()  # as when rank 0 ends
    assert sender.wait(200) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_sender_that_exited_while_it_waited_is_replaced(tmp_path: Path, uri: str) -> None:
    sender = start_sender.prepare_sender(uri)
    assert sender is not None
    sender.kill()
    sender.wait()
    options: Any = {"run_name": "r", "tracking_uri": uri, "sender": sender, "exit_timeout_seconds": 200}
    journal = Journal(tmp_path / "run", experiment="again", **options)
    journal.start({}, {}, world_size=1)
    assert journal.finish("FINISHED") == ""
    assert run_of(tmp_path / "run", uri).info.status == "FINISHED"


@pytest.mark.parametrize(("status", "expected"), [(None, "19"), ("FINISHED", "0")])
@pytest.mark.usefixtures("quiet_journal")
def test_only_while_a_training_runs_the_sender_stands_back(
    tmp_path: Path, uri: str, status: str | None, expected: str
) -> None:
    """Started late, for a run that has ended meanwhile, it would on a busy machine not come to work in time."""
    folder = write_run(tmp_path, [1], status=status)
    look = "import os, sys; from dtrain.tracking import sender; sender.main(sys.argv[1:]); print(os.nice(0))"
    words = [folder, "--parent", str(GONE_PID), "--tracking-uri", uri, "--no-system-metrics"]
    done = subprocess.run([sys.executable, "-c", look, *words], capture_output=True, text=True, timeout=200)
    assert (folder / "logs/sender.log").read_text().split()[-1:] == [expected], done.stderr


@pytest.mark.usefixtures("quiet_journal")
def test_a_new_store_is_made_under_its_lock_whoever_needs_it_first(tmp_path: Path) -> None:
    database = tmp_path / "new" / "mlflow.db"
    assert mlflow_store.system_monitor(f"sqlite:///{database}") is not None
    assert database.exists() and database.with_name(".mlflow.db.lock").exists()


def test_where_no_sender_can_be_prepared_the_run_will_say_so() -> None:
    assert start_sender.prepare_sender("file:///there") is None
