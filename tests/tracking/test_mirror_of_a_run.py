"""A run folder's mirror: what is brought there, in what order, whose it is; on a real S3 server and in a folder."""

import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from far_stores import BUCKET, KEY, SECRET, S3Server
from whole_runs import EXACT, Place, figures, same_training

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.tracking.mirror import _look
from dtrain.tracking.mirror_store import MirrorError, MirrorStore
from dtrain.tracking.mirror_upload import NotOursError, Upload
from dtrain.tracking.run_folder import update_run
from dtrain.tracking.start_mirror import Mirror, finish_mirror, look_at_mirror, resolve_mirror

pytestmark = pytest.mark.slow
WAIT_SECONDS = 200.0


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server for a test file, and the environment in which this process finds it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    before = dict(os.environ)
    os.environ.update(server.env)
    server.start()
    yield server
    server.kill()
    os.environ.clear()
    os.environ.update(before)


class Far:
    """One side of a mirror, as somebody without dtrain reads it."""

    def __init__(self, address: str, server: S3Server | None) -> None:
        self.address, self._server = address, server

    def files(self) -> dict[str, bytes]:
        if self._server is not None:
            return self._server.files(self.address.removeprefix(f"s3://{BUCKET}/"))
        root = Path(self.address)
        found = {}
        for path in root.rglob("*"):
            with suppress(FileNotFoundError):  # removed meanwhile
                if path.is_file():
                    found[path.relative_to(root).as_posix()] = path.read_bytes()
        return found


@pytest.fixture(params=["folder", "s3"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Far:
    if request.param == "folder":
        return Far(str(tmp_path / "far" / "run"), None)
    return Far(f"s3://{BUCKET}/{tmp_path.name}", request.getfixturevalue("s3"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder: two checkpoints, a journal whose last line is being written, a log, a picture, hidden files."""
    folder = tmp_path / "run"
    folder.mkdir()
    update_run(folder, id="our-run", attempt_started=10.0, host="here", pid=1, state="RUNNING")
    (folder / "metrics.jsonl").write_bytes(
        b'{"kind": "start", "facts": {"attempt_started": 5.0}}\n{"kind": "metrics", "step": 1}\n{"kind": "met'
    )
    for name, text in {
        "config.yaml": "seed: 0",
        "logs/rank-0.log": "hello",
        "pictures/step-1/worst.png": "png",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "predictions").mkdir()
    (folder / "predictions" / "large.h5").write_text("large")
    save(folder, 10)
    save(folder, 20, score=0.5)
    return folder


def save(folder: Path, step: int, score: float | None = None) -> Path:
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=2, keep_best=1)
    return checkpoints.save(step, {"w": torch.full((3,), float(step))}, {"step": step}, score=score)


def mirrored(folder: Path, far: Far, **options: Any) -> Upload:
    upload = Upload(folder, MirrorStore(far.address), **options)
    assert upload.step(is_last=True)
    return upload


def visible(folder: Path) -> dict[str, bytes]:
    """What a mirror of a folder has: neither hidden files nor links, predictions, or the mirror's own memory."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        linked = any(part.is_symlink() for part in (path, *path.parents))
        if path.is_file() and not linked and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path.read_bytes()
    return {name: text for name, text in found.items() if not name.startswith("predictions/") and name != "mirror.json"}


def test_a_mirror_has_what_is_finished_and_nothing_else(run: Path, far: Far) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000030")
    (run / "checkpoints" / "step-00000030" / "manifest.json").unlink()  # is being written, or was when it was killed
    mirrored(run, far)
    there = far.files()
    assert json.loads(there.pop("links.json")) == {
        "checkpoints/last": "step-00000020", "checkpoints/best": "step-00000020",
    }  # fmt: skip
    expected = {name: text for name, text in visible(run).items() if "step-00000030" not in name}
    expected["metrics.jsonl"] = expected["metrics.jsonl"].removesuffix(b'{"kind": "met')  # whole lines
    assert there == expected


def test_checkpoints_are_rotated_there_as_they_are_here(run: Path, far: Far) -> None:
    upload = mirrored(run, far)
    save(run, 30)
    save(run, 40)
    assert not (run / "checkpoints" / "step-00000010").exists(), "keep_last is 2, and 20 is the best"
    assert upload.step(is_last=True)
    steps = {name.split("/")[1] for name in far.files() if name.startswith("checkpoints/")}
    assert steps == {"step-00000020", "step-00000030", "step-00000040"}
    if not far.address.startswith("s3"):
        assert {path.name for path in Path(far.address, "checkpoints").iterdir()} == steps, "nor an empty folder"


def test_a_run_folder_that_lost_its_checkpoints_takes_none_from_the_mirror(run: Path, far: Far) -> None:
    mirrored(run, far)
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").write_text("seed: 1")
    mirrored(run, far)
    assert "checkpoints/step-00000020/manifest.json" in far.files()
    assert far.files()["config.yaml"] == b"seed: 1"


def test_nothing_is_sent_to_where_the_mirror_was(run: Path, far: Far, tmp_path: Path) -> None:
    """The folder below a disk that is no longer mounted would take it all, and hide it once the disk is back."""
    upload = mirrored(run, far)
    there = far.files()
    store, is_folder = MirrorStore(far.address), not far.address.startswith("s3")
    if is_folder:
        Path(far.address).rename(tmp_path / "away")
    else:
        store.remove(there)
    save(run, 30)
    for _ in range(2):
        with pytest.raises(MirrorError, match="what was mirrored there is gone; is its disk still mounted"):
            upload.step(is_last=True)
        upload.remember("gone")
    assert not store.sizes()
    if is_folder:
        (tmp_path / "away").rename(far.address)
    else:
        for name, content in there.items():
            store.upload(name, io.BytesIO(content), len(content))
    assert upload.step(is_last=True)
    assert "checkpoints/step-00000030/manifest.json" in far.files()


def test_the_manifest_comes_last_and_goes_first_and_the_journal_is_never_older_than_a_checkpoint(
    run: Path, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    upload, remove = MirrorStore.upload, MirrorStore.remove
    monkeypatch.setattr(MirrorStore, "upload", lambda *a: order.append(a[1]) or upload(*a))
    monkeypatch.setattr(
        MirrorStore, "remove", lambda self, names: order.extend(f"-{n}" for n in names) or remove(self, names)
    )
    one = mirrored(run, far)
    assert order[0] == "run.json", "first of all whose it is"
    folder = "checkpoints/step-00000020"
    of_one = [name for name in order if name.startswith(folder)]
    assert of_one == [f"{folder}/{name}" for name in ("model.safetensors", "state.pt", "manifest.json")]
    order.clear()
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write('rics", "step": 2}\n')
    for step in (30, 40):
        save(run, step)
    one._files_at = float("inf")  # as if files that change were not due yet
    assert one.step()
    assert order.index("metrics.jsonl") < order.index("checkpoints/step-00000040/manifest.json")
    assert next(name for name in order if name.startswith("-")).endswith("step-00000010/manifest.json")


def test_only_what_changed_is_sent_again_also_by_the_next_start(
    run: Path, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(run, far)
    order: list[str] = []
    upload = MirrorStore.upload
    monkeypatch.setattr(MirrorStore, "upload", lambda *a: order.append(a[1]) or upload(*a))
    (run / "logs" / "rank-0.log").write_text("hello, world")
    mirrored(run, far)
    assert set(order) <= {"logs/rank-0.log", "metrics.jsonl"}, "the journal had half a line"


def test_a_damaged_checkpoint_is_not_mirrored_and_is_named(run: Path, far: Far) -> None:
    weights = run / "checkpoints" / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    said: list[str] = []
    mirrored(run, far, say=said.append)
    assert "checkpoints/step-00000020/manifest.json" not in far.files()
    assert "checkpoints/step-00000010/manifest.json" in far.files()
    assert len(said) == 1 and "step-00000020 is damaged and is not mirrored" in said[0]


def test_what_arrives_otherwise_than_it_was_sent_is_found_and_sent_again(
    run: Path, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, spoiled = MirrorStore._write, []

    def spoil(self: MirrorStore, place: str, source: Any, size: int) -> str:
        sent = write(self, place, source, size)
        if place.endswith("model.safetensors") and not spoiled:
            spoiled.append(place)
            self._files.pipe_file(place, b"x" * size)  # of the same size
        return sent

    monkeypatch.setattr(MirrorStore, "_write", spoil)
    upload = Upload(run, MirrorStore(far.address))
    with pytest.raises(OSError, match="read back"):
        upload.step(is_last=True)
    assert not any("manifest" in name for name in far.files())
    assert upload.step(is_last=True)
    for step in (10, 20):
        name = f"checkpoints/step-000000{step}/model.safetensors"
        assert far.files()[name] == (run / name).read_bytes()


def test_a_mirror_belongs_to_one_training_and_to_its_latest_start(run: Path, far: Far, tmp_path: Path) -> None:
    mirrored(run, far)
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    (other / "mirror.json").unlink()
    update_run(other, id="another-run", attempt_started=99.0)
    (other / "metrics.jsonl").write_text('{"kind": "start", "facts": {"attempt_started": 99.0}}\n')
    with pytest.raises(NotOursError, match="it holds another training"):
        Upload(other, MirrorStore(far.address)).step()
    before = far.files()
    elsewhere = tmp_path / "elsewhere"  # fetched from the mirror, and continued: its journal knows our start
    shutil.copytree(run, elsewhere, symlinks=True)
    with (elsewhere / "metrics.jsonl").open("w") as journal:
        journal.write('{"kind": "start", "facts": {"attempt_started": 10.0}}\n')
        journal.write('{"kind": "start", "facts": {"attempt_started": 11.0}}\n')
    update_run(elsewhere, attempt_started=11.0, host="there")
    mirrored(elsewhere, far)
    (run / "config.yaml").write_text("seed: 9")
    with pytest.raises(NotOursError, match="a start on there has continued"):
        mirrored(run, far)
    assert far.files()["config.yaml"] == before["config.yaml"]
    mirrored(run, far, accepts=11.0)  # decided at its start: its own checkpoints are newer
    assert far.files()["config.yaml"] == b"seed: 9"


def test_an_upload_that_was_killed_is_cleared_away(run: Path, far: Far, s3: S3Server) -> None:
    mirrored(run, far)
    if far.address.startswith("s3"):
        client, prefix = s3.client(), far.address.removeprefix(f"s3://{BUCKET}/")
        for key in (f"{prefix}/checkpoints/step-00000030/model.safetensors", "of-somebody-else/file"):
            client.create_multipart_upload(Bucket=BUCKET, Key=key)
    else:
        half = Path(far.address, ".0123456789ab-config.yaml")
        half.write_text("half")
        assert half.name not in MirrorStore(far.address).sizes() and half.exists(), "a start looks while one is written"
    (run / "config.yaml").write_text("seed: 1")
    mirrored(run, far)
    if far.address.startswith("s3"):
        begun = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
        assert [each["Key"] for each in begun] == ["of-somebody-else/file"]
    assert not [name for name in far.files() if name.startswith(".")]


# --------------------------------------------------------------------------------------------------- whose mistake


def test_what_is_wrong_with_an_address_is_told(s3: S3Server, tmp_path: Path) -> None:
    said: list[str] = []
    missing = look_at_mirror("s3://no-such-bucket/run", say=said.append, silent_seconds=0.0)
    assert said == ["waiting for the mirror (s3://no-such-bucket/run), 60 s more at most"]
    assert missing["is_mistake"] and "bucket 'no-such-bucket'" in missing["error"]
    with pytest.raises(MirrorError, match=r"pip install 'dtrain\[gcs\]'"):
        MirrorStore("gs://bucket/run")
    (tmp_path / "file").write_text("x")
    for under in ("file", "file/run"):
        found = look_at_mirror(str(tmp_path / under))
        assert found["is_mistake"] and str(tmp_path / "file") in found["error"]
    for place in (tmp_path, tmp_path / "run", tmp_path / "run" / "inside"):
        with pytest.raises(ValueError, match="the run folder"):
            resolve_mirror(str(place), tmp_path / "run")
    assert resolve_mirror("S3://Bucket/Run/", tmp_path) == "s3://Bucket/Run"
    assert resolve_mirror(f"file://{tmp_path}/far", tmp_path / "run") == str(tmp_path / "far")


@pytest.mark.parametrize(
    ("text", "is_mistake"),
    [
        ("An error occurred (InvalidAccessKeyId) when calling the PutObject operation", True),
        ("An error occurred (SignatureDoesNotMatch) when calling the PutObject operation", True),
        ("Unable to locate credentials", True),
        ("Access Denied", True),
        ('Could not connect to the endpoint URL: "http://127.0.0.1:1/b/x"', False),
        ("An error occurred (SlowDown) when calling the PutObject operation", False),
        ("An error occurred (403) when calling the HeadObject operation: Forbidden", True),
        ('Could not connect to the endpoint URL: "http://minio:9401/signatures/step-00000403/state.pt"', False),
    ],
)
def test_credentials_are_the_users_an_outage_is_not(text: str, is_mistake: bool) -> None:
    found = MirrorStore(f"s3://{BUCKET}/x").error(OSError(text))
    assert found.is_mistake is is_mistake
    assert ("AWS_PROFILE" in str(found)) is is_mistake


def test_a_checkpoint_that_is_removed_while_a_start_looks_is_not_there(run: Path, far: Far) -> None:
    mirrored(run, far)
    store = MirrorStore(far.address)
    names = [*store.sizes(), "checkpoints/step-00000005/manifest.json"]  # as they were, before rotation took one
    store.sizes = lambda: dict.fromkeys(names, 1)  # type: ignore[method-assign]
    assert set(_look(store)["checkpoints"]) == {"checkpoints/step-00000010", "checkpoints/step-00000020"}


# ------------------------------------------------------------------------------------------------ the process itself


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def large(folder: Path, step: int) -> None:
    Checkpoints(folder / "checkpoints").save(step, {"w": torch.rand(4_000_000)}, {"step": step})


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_the_process_is_killed_in_mid_upload_and_another_one_brings_the_rest(
    run: Path, far: Far, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.tracking.start_mirror._FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("dtrain.tracking.start_mirror._SILENT_SECONDS", 0.0)
    said: list[str] = []
    update_run(run, pid=os.getpid())
    mirror, chance = Mirror(far.address, WAIT_SECONDS, said.append), random.Random(kills)
    mirror.start(run)
    wait_for(lambda: mirror._process is not None)
    for number in range(kills):
        large(run, 100 + number)
        time.sleep(chance.uniform(0.5, 2.0))  # anywhere between its start and its end
        process = mirror._process
        if process is not None and process.poll() is None:
            process.kill()
            wait_for(lambda killed=process: mirror._process is not killed)
        there, still = far.files(), far.files()  # of what is removed meanwhile, the manifest goes first
        for name in there.keys() & still.keys():
            folder, _, file = name.rpartition("/")
            if file == "manifest.json":
                assert there.keys() >= {f"{folder}/{each}" for each in json.loads(there[name])["files"]}
    assert mirror.finish() == ""
    there = far.files()
    assert {name: there[name] for name in there if name.startswith("checkpoints/")} == {
        name: text for name, text in visible(run).items() if name.startswith("checkpoints/")
    }
    assert sum("it is started again" in line for line in said) == 1
    assert [line.partition(",")[0] for line in said[-2:]] == [
        "waiting for the mirror",
        "the mirror has all of this run",
    ]


# ------------------------------------------------------------------------------------------------- whole trainings


def lost_node(place: Place, folder: Path, name: str) -> None:
    """Its disk is gone, and the mirror's process with it."""
    wait_for(lambda: not any("dtrain.tracking.mirror" in line for line in place.tagged.command_lines()))
    shutil.move(folder, place.folder / name)


MIRRORED = {**EXACT, "trainer.max_epochs": 20, "trainer.checkpoint_every_steps": 5, "trainer.pictures": False}


@pytest.fixture(scope="module")
def disturbed(place: Place, s3: S3Server) -> dict[str, Any]:
    """A node is lost; on another one S3 dies and comes back empty; it is stopped, and started to its end."""
    place.once("mirror-whole", lambda: place.run(place.config("mirror-whole", **MIRRORED)).rc)
    to = {"trainer.mirror_to": f"s3://{BUCKET}/whole", "trainer.mirror_exit_timeout_seconds": WAIT_SECONDS}
    # Each worker has a server of its own, and so a training of its own.
    name = f"mirror-lost-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    config, folder = place.config(name, **MIRRORED, **to), place.path(name)
    place.run(config, do="train 40 rank 0 KILL", env=s3.env, expect=-signal.SIGKILL)
    lost_node(place, folder, f"lost-{name}")
    # So slow that it does not end before the server is back, which on a busy machine takes a while.
    (second,) = place.start(config, do="train all rank 0 lag", env=s3.env | {"TOY_LAG": "1"})
    wait_for(lambda: list(folder.glob("checkpoints/step-*")))
    s3.kill()
    wait_for(lambda: "the training continues, and the mirror gets the rest later" in second.output().text)
    s3.start()
    wait_for(lambda: "answers; what was kept is sent" in second.output().text)
    os.kill(second.pid, signal.SIGTERM)
    stopped = second.result(WAIT_SECONDS)
    first_far = s3.files("whole")
    third = place.run(config, env=s3.env)
    return {
        "folder": folder, "whole": place.folder / "run-mirror-whole", "config": config, "stopped": stopped,
        "stopped_far": first_far, "third": third, "far": s3.files("whole"),
    }  # fmt: skip


def test_another_node_continues_from_the_mirror_bit_for_bit(disturbed: dict[str, Any]) -> None:
    assert "fetching the run from the mirror (s3://trainings/whole): step " in disturbed["stopped"].text
    same_training(disturbed["folder"], disturbed["whole"])
    assert figures(disturbed["folder"]) == figures(disturbed["whole"])
    starts = [line for line in (disturbed["folder"] / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 3, "one run, continued twice"


def test_a_mirror_that_is_away_costs_one_line_and_gets_all_of_it_when_it_is_back(disturbed: dict[str, Any]) -> None:
    text, far = disturbed["stopped"].text, disturbed["stopped_far"]
    assert text.count("the training continues, and the mirror gets the rest later") == 1
    assert text.count("answers; what was kept is sent") == 1
    assert "Could not connect to the endpoint URL" in text or "onnection" in text
    assert disturbed["stopped"].rc == 75
    step = json.loads(far["links.json"])["checkpoints/last"]
    assert f"checkpoints/{step}/manifest.json" in far and f"config/{Path(disturbed['config']).name}" in far


def test_the_mirror_of_a_training_has_all_of_it_and_no_secret(disturbed: dict[str, Any]) -> None:
    far, expected = dict(disturbed["far"]), visible(disturbed["folder"])
    far.pop("links.json")
    log, mirrored_log = expected.pop("logs/rank-0.log"), far.pop("logs/rank-0.log")
    assert log.startswith(mirrored_log) and b"status: FINISHED" in mirrored_log
    assert far == expected
    assert json.loads(far["run.json"])["state"] == "FINISHED"
    assert not [name for name, text in far.items() if SECRET.encode() in text or KEY.encode() in text]
    assert SECRET not in disturbed["third"].text


def test_a_mirror_of_another_training_is_refused_before_anything_is_fetched(
    disturbed: dict[str, Any], place: Place, s3: S3Server
) -> None:
    name = f"mirror-other-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    folder = place.path(name)
    config = place.config(name, **{**MIRRORED, "optimizer.lr": 0.5}, trainer__mirror_to=f"s3://{BUCKET}/whole")
    refused = place.run(config, env=s3.env, expect=2).stderr
    assert f"{name}.yaml:" in refused and "trainer.mirror_to: s3://trainings/whole holds a training" in refused
    assert "optimizer.lr: 0.02 -> 0.5" in refused
    assert not folder.exists()
    begun = place.run(disturbed["config"], "trainer.resume=none", env=s3.env, expect=2).stderr
    assert "holds a training (" in begun and "which is not overwritten" in begun and "resume is none" in begun


def test_sync_brings_what_the_mirror_lacks(run: Path, far: Far, capfd: pytest.CaptureFixture[str]) -> None:
    assert finish_mirror(run) == 0, "a run without a mirror"
    update_run(run, mirror_to=far.address)
    assert finish_mirror(run) == 0
    assert f"all of {run} is in {far.address}" in capfd.readouterr().out
    assert (
        far.files()["checkpoints/step-00000020/state.pt"] == (run / "checkpoints/step-00000020/state.pt").read_bytes()
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nodes_that_are_lost_in_mid_upload_lose_no_training(place: Place, s3: S3Server) -> None:
    """kill -9 of training and uploader at a random moment, the disk gone with it; the same command on an empty one."""
    changes = {**MIRRORED, "trainer.max_epochs": 3, "trainer.checkpoint_every_steps": 1}
    place.run(place.config("mirror-soak-whole", **changes))
    chance, found = random.Random(7), []
    for number in range(20):
        name = f"mirror-soak-{number}"
        to = {"trainer.mirror_to": f"s3://{BUCKET}/{name}", "trainer.mirror_exit_timeout_seconds": WAIT_SECONDS}
        config, folder = place.config(name, **changes, **to), place.folder / f"run-{name}"
        (first,) = place.start(config, do="train all rank 0 lag", env=s3.env)
        wait_for(lambda folder=folder: list(folder.glob("checkpoints/step-*")))
        time.sleep(chance.uniform(0, 6))
        place.tagged.kill()
        first.process.wait(WAIT_SECONDS)
        shutil.move(folder, place.folder / f"lost-{name}")
        text = place.run(config, env=s3.env).text
        found.append(text.partition("step ")[2].partition(",")[0])
        same_training(folder, place.folder / "run-mirror-soak-whole")
    print(f"20 of 20 ended bit for bit as if nothing had been; fetched at steps {found}")
