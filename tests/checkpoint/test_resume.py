"""Where a training starts: real run folders with real checkpoints, and what is made of them."""

import socket
import subprocess
import time

import pytest
import torch

from dtrain.checkpoint import checkpoint_files
from dtrain.checkpoint.checkpoint_files import load
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.resume import ResumeError, find_start, move_aside
from dtrain.tracking.run_folder import update_run

EPOCHS = {"max_epochs": 10, "max_steps": None}


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of steps 10 and 20."""
    folder = tmp_path / "runs" / "digits"
    for step in (10, 20):
        Checkpoints(folder / "checkpoints").save(step, {"w": torch.ones(2)}, {"step": step})
    update_run(folder, state="RUNNING", run_name="first", run_id="a" * 32, **EPOCHS)
    return folder


def start(folder, resume="auto", **limits):
    return find_start(folder, resume, "new", EPOCHS | limits, None)


def test_an_empty_folder_is_a_new_training(tmp_path):
    found = start(tmp_path / "none")
    assert (found.checkpoint, found.run_name, found.finished) == (None, "new", "")


def test_an_unfinished_training_resumes_from_its_newest_checkpoint_under_its_name(folder):
    found = start(folder)
    assert found.checkpoint.name == "step-00000020"
    assert found.run_name == "first"
    assert not found.finished


def test_a_damaged_newest_checkpoint_is_passed_over(folder):
    file = folder / "checkpoints" / "step-00000020" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.warns(UserWarning, match="step-00000020"):
        assert start(folder).checkpoint.name == "step-00000010"


def test_what_a_start_has_verified_is_hashed_once(folder, monkeypatch):
    hashed = []
    seal = checkpoint_files._seal
    monkeypatch.setattr(checkpoint_files, "_seal", lambda path: hashed.append(path.name) or seal(path))
    found = start(folder)
    assert load(found.checkpoint, found.is_verified).state == {"step": 20}
    assert hashed == ["model.safetensors", "state.pt"]
    named = start(folder, str(folder / "checkpoints" / "step-00000010"))
    assert not named.is_verified, "nobody has looked at that one yet"
    assert load(named.checkpoint, named.is_verified).state == {"step": 10}
    assert hashed == ["model.safetensors", "state.pt"] * 2


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_name(tmp_path):
    update_run(tmp_path, state="FAILED", run_name="first", **EPOCHS)
    assert start(tmp_path).run_name == "first"
    assert start(tmp_path).checkpoint is None


@pytest.mark.parametrize("state", ["FAILED", "KILLED", "RUNNING"])
def test_only_a_finished_training_is_left_alone(folder, state):
    update_run(folder, state=state)
    assert not start(folder).finished


def test_a_finished_training_is_left_alone_and_says_how_to_continue(folder):
    update_run(folder, state="FINISHED")
    text = start(folder).finished
    assert "holds a finished training" in text
    for way in ("trainer.max_epochs", "trainer.resume=none", "trainer.checkpoint_dir"):
        assert way in text


@pytest.mark.parametrize(
    ("limits", "continues"),
    [
        ({"max_epochs": 11}, True),
        ({"max_epochs": 10}, False),
        ({"max_epochs": 9}, False),
        ({"max_epochs": None, "max_steps": 5}, True),  # the limit of before is gone
        ({"max_epochs": 10, "max_steps": 99}, False),  # a new limit raises nothing
    ],
)
def test_a_finished_training_continues_when_its_limit_was_raised(folder, limits, continues):
    update_run(folder, state="FINISHED")
    assert bool(start(folder, **limits).finished) is not continues


def test_none_begins_anew_and_moves_nothing_before_the_training_starts(folder):
    found = start(folder, "none")
    assert (found.checkpoint, found.run_name, found.moves_aside) == (None, "new", True)
    assert (folder / "checkpoints").is_dir()


def test_moving_aside_keeps_everything_and_never_lands_on_an_older_one(folder):
    places = [move_aside(folder)]
    (folder / "later").mkdir(parents=True)
    places.append(move_aside(folder))
    moved = sorted(folder.parent.iterdir())
    assert len(moved) == 2 and sorted(places) == moved
    assert sum((place / "checkpoints" / "step-00000020").is_dir() for place in moved) == 1


def test_moving_aside_nothing_says_nothing(tmp_path):
    assert move_aside(tmp_path / "none") is None


def test_a_checkpoint_by_its_path(folder):
    path = folder / "checkpoints" / "step-00000010"
    assert start(folder, str(path)).checkpoint == path
    assert start(folder, str(path)).run_name == "first"


def test_another_trainings_checkpoint_begins_a_run_of_its_own(folder, tmp_path):
    found = start(tmp_path / "other", str(folder))
    assert found.checkpoint.name == "step-00000020"
    assert (found.folder, found.run_name) == (tmp_path / "other", "new")


def test_an_mlflow_run_id_that_this_folder_has(folder):
    assert start(folder, "a" * 32).checkpoint.name == "step-00000020"


@pytest.mark.parametrize("resume", ["latest", "runs/nowhere", "abc"])
def test_what_is_not_there_is_refused(folder, resume):
    with pytest.raises(ResumeError, match=f"'{resume}' is neither auto, none, a checkpoint"):
        start(folder, resume)


def test_a_folder_without_checkpoints_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResumeError, match="holds no checkpoint"):
        start(folder, str(tmp_path / "empty"))


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_folder_that_another_training_writes_is_busy(folder, resume):
    with subprocess.Popen(["sleep", "600"]) as other:
        facts = {"pid": other.pid, "host": socket.gethostname(), "attempt_started": time.time()}
        update_run(folder, **facts)
        assert f"process {other.pid}" in start(folder, resume).busy
        update_run(folder, host="another machine")
        assert start(folder, resume).busy == ""  # nobody can tell from here
        update_run(folder, **facts)
        other.kill()
    assert start(folder, resume).busy == ""
