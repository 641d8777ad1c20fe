"""The frame of a run: what one start in this process leaves in the run folder, and how it is closed."""

import json
import socket
import subprocess
import time

import pytest

import dtrain
from dtrain.config.errors import ConfigError
from dtrain.tracking.run_folder import update_run
from dtrain.training import setup as create


@pytest.fixture
def config(tmp_path):
    return {
        "experiment": "frame",
        "device": "cpu",
        "model": {"name": "ViT", "image_size": 8, "patch_size": 4, "channels": 1, "num_classes": 10, "dim": 8,
                  "depth": 1, "heads": 1, "mlp_dim": 8},
        "loaders": {"name": "Digits", "batch_size": 64, "train": {"split": "train"}, "val": {"split": "val"}},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "trainer": {"max_steps": 2, "checkpoint_dir": str(tmp_path / "run")},
        "mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False},
    }  # fmt: skip


def test_what_is_said_is_in_the_log_and_the_figures_are_in_the_journal(config, tmp_path, capsys):
    trainer = dtrain.create_trainer(config)
    assert trainer.fit() == "FINISHED"
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    shown = capsys.readouterr().out
    for said in ("model: ViT", "step 2", "val", "status: FINISHED"):
        assert said in log
        assert said in shown
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_status"]) == ("FINISHED", 0)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if entry["kind"] == "metrics"] == [2, 2]


def test_an_error_is_in_the_log_with_its_traceback_and_the_run_is_closed_as_failed(config, tmp_path, monkeypatch):
    trainer = dtrain.create_trainer(config)
    monkeypatch.setattr(trainer.module, "forward", lambda images: images.no_such_method())
    with pytest.raises(AttributeError):
        trainer.fit()
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "no_such_method" in log
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_status"]) == ("FAILED", 1)
    assert "no_such_method" in facts["reason"]


def test_a_second_training_does_not_write_into_the_first_ones_folder(config, tmp_path):
    early = dtrain.create_trainer(config)
    with subprocess.Popen(["sleep", "600"]) as other:
        facts = {"pid": other.pid, "host": socket.gethostname(), "attempt_started": time.time()}
        (tmp_path / "run").mkdir()
        update_run(tmp_path / "run", state="RUNNING", **facts)
        before = sorted((tmp_path / "run").iterdir())
        with pytest.raises(ConfigError, match=f"process {other.pid}"):
            dtrain.create_trainer(config).fit()
        assert sorted((tmp_path / "run").iterdir()) == before
        other.kill()
    with pytest.raises(ConfigError, match="was written by another training while this one started"):
        early.fit()
    assert dtrain.create_trainer(config).fit() == "FINISHED"


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("model", "dim", 16, r"is of another training: .*; trainer.resume=none begins again"),
        ("optimizer", "name", "Adagrad", "its optimizer is SGD, the config's Adagrad"),
    ],
)
def test_a_training_that_became_another_one_is_not_gone_on_with(config, tmp_path, section, key, value, told):
    dtrain.create_trainer(config).fit()
    config[section][key], config["trainer"]["max_steps"] = value, 4
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"{section}.{key}: .* -> (?s:.*)trainer.resume=last continues it with"):
        dtrain.create_trainer(config)
    config["trainer"]["resume"] = "last"
    with pytest.raises(ConfigError, match=told):
        dtrain.create_trainer(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_state_of_another_version_is_refused_in_words(config, monkeypatch):
    dtrain.create_trainer(config).fit()
    config["trainer"]["max_steps"] = 4
    monkeypatch.setattr(create, "FORMAT", create.FORMAT + 1)
    with pytest.raises(ConfigError, match=r"of another version of dtrain .*trainer.pre_trained takes over weights"):
        dtrain.create_trainer(config)


def test_a_run_is_never_left_where_packages_are_installed(config, tmp_path, monkeypatch):
    """As the seed calls it: create_trainer(config, package.__file__), of a package that pip installed."""
    monkeypatch.chdir(tmp_path)
    config["trainer"]["checkpoint_dir"] = "mine"
    for folder, expected in (("project", tmp_path / "project" / "mine"), ("site-packages", tmp_path / "mine")):
        package = tmp_path / folder / "package" / "__init__.py"
        package.parent.mkdir(parents=True)
        package.touch()
        trainer = dtrain.create_trainer(config, str(package.parent.parent if folder == "project" else package))
        assert trainer.parts.start.folder.resolve() == expected
