"""Subclasses of Trainer that a config names: what they override is called, by today's names and by that of before."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dtrain
from dtrain.data.samplers import ORDER as CURRENT_ORDER

ORDER = """
from dtrain.trainer import Trainer


class Told(Trainer):
    calls = []

    def train_epoch(self):
        self.calls.append("train_epoch")
        super().train_epoch()

    def training_step(self, batch):
        self.calls.append("training_step")
        return super().training_step(batch)

    def backward(self, loss, terms, micro):
        self.calls.append("backward")
        super().backward(loss, terms, micro)

    def optimizer_step(self):
        self.calls.append("optimizer_step")
        super().optimizer_step()

    def after_step(self, position):
        self.calls.append(f"after_step {position}")
        super().after_step(position)

    def after_epoch(self):
        self.calls.append(f"after_epoch {self.epoch}")
        super().after_epoch()

    def validate(self):
        self.calls.append("validate")
        return super().validate()

    def log(self):
        self.calls.append("log")
        super().log()

    def save(self):
        self.calls.append("save")
        super().save()

    def after_last_step(self):
        self.calls.append("after_last_step")
        super().after_last_step()
"""
EARLIER = """
from dtrain.trainer import Trainer


class Earlier(Trainer):
    def _after_epoch(self):
        super()._after_epoch()
        self.journal.log(self.step, {"train/epochs_done": float(self.epoch)})
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "told.py").write_text(ORDER)
    (tmp_path / "earlier.py").write_text(EARLIER)
    return {
        "device": "cpu",
        "modules": ["told", "earlier"],
        "model": {"name": "ViT", "image_size": 8, "patch_size": 4, "channels": 1, "num_classes": 10, "dim": 8,
                  "depth": 1, "heads": 1, "mlp_dim": 8},
        "loaders": {"name": "Digits", "batch_size": 500, "train": {"split": "train"}, "val": {"split": "val"}},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "trainer": {"max_epochs": 2, "checkpoint_dir": str(tmp_path / "run"), "pictures": False},
        "mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False},
    }  # fmt: skip


@pytest.mark.slow
def test_every_overridden_method_is_called_in_the_order_that_is_documented(config: dict[str, Any]) -> None:
    config["trainer"]["name"] = "Told"
    trainer = dtrain.create_trainer(config)
    assert trainer.fit() == "FINISHED"
    step = ["training_step", "backward", "optimizer_step"]
    epoch = ["train_epoch"]
    for position in (500, 1000, 1257):  # the digits' training split has 1,257 samples
        epoch += [*step, f"after_step {position}"]
    end = ["log", "validate", "save"]
    expected = [*epoch, "after_epoch 0", *end, *epoch, "after_epoch 1", *end, "after_last_step", *end]
    assert trainer.calls == expected
    assert (trainer.step, trainer.epoch, trainer.position) == (6, 2, 0)


@pytest.mark.slow
def test_a_subclass_that_overrides_the_name_of_before_works(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["name"] = "Earlier"
    assert dtrain.create_trainer(config).fit() == "FINISHED"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["kind"] == "metrics" and "train/epochs_done" in line["values"]]
    logged = [(line["step"], line["values"]["train/epochs_done"]) for line in own]
    assert logged == [(3, 1.0), (6, 2.0)]


def test_places_of_the_original_system_hold() -> None:
    from dtrain.dataloader import get_train_loaders
    from dtrain.loss import get_loss_criterion
    from dtrain.metrics import get_evaluation_metric
    from dtrain.modelloader import get_model
    from dtrain.trainer import NonFiniteError, Trainer, create_trainer

    assert dtrain.create_trainer is create_trainer and dtrain.Trainer is Trainer
    assert issubclass(NonFiniteError, ArithmeticError)
    places = {get_train_loaders: "dataloader", get_loss_criterion: "loss", get_evaluation_metric: "metrics"}
    places |= {get_model: "modelloader", create_trainer: "trainer"}
    assert {function.__module__ for function in places} == {f"dtrain.{name}" for name in places.values()}


BEFORE = (
    Path(__file__).parents[1] / "data" / "run-of-before"
)  # five steps, written by the program before its new layout


@pytest.mark.slow
def test_a_training_of_before_the_new_layout_resumes_as_if_it_had_never_stopped(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Dropout, AdamW, warm-up, a schedule by steps, averaged weights, accumulation: all of it lies in a checkpoint.

    It ends the epoch in the order of before, seeing each sample once, and has the orders of now from the next one on.
    """
    shutil.copytree(BEFORE, tmp_path / "run", symlinks=True)
    config["experiment"] = "before"
    config["model"]["dropout"] = 0.1
    config["loaders"]["batch_size"] = 64
    config["optimizer"] = {"name": "AdamW", "lr": 0.01}
    config["lr_scheduler"] = {"name": "ExponentialLR", "gamma": 0.9, "interval": "step", "warmup_steps": 3}
    config["trainer"] = {"max_steps": 14, "checkpoint_dir": str(tmp_path / "run"), "pictures": False, "ema_decay": 0.9,
                         "accumulate": 2, "checkpoint_every_steps": 1, "keep_last": 14}  # fmt: skip
    whole = copy.deepcopy(config)
    whole["trainer"]["checkpoint_dir"] = str(tmp_path / "whole")
    resumed = dtrain.create_trainer(config)
    assert (resumed.step, resumed.epoch, resumed.position) == (5, 0, 640)
    assert resumed.state.order == 1
    assert resumed.fit() == "FINISHED"
    uninterrupted = dtrain.create_trainer(whole)
    uninterrupted.state.order = 1
    assert uninterrupted.fit() == "FINISHED"
    assert (resumed.epoch, resumed.position, resumed.state.order) == (1, 512, CURRENT_ORDER)

    def weights(run: str, step: int, name: str = "model") -> dict[str, torch.Tensor]:
        return load_file(tmp_path / run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")

    for key, value in weights("whole", 14).items():
        torch.testing.assert_close(weights("run", 14)[key], value, rtol=1e-4, atol=1e-6)
    # The average was written before it had a ramp, which it has from here on.
    average = weights("run", 5, "ema")
    for number in range(5, 14):
        keeps = min(0.9, (1 + number) / (10 + number))
        newest = weights("run", number + 1)
        average = {key: keeps * value + (1 - keeps) * newest[key] for key, value in average.items()}
    for key, value in weights("run", 14, "ema").items():
        torch.testing.assert_close(average[key], value, rtol=1e-4, atol=1e-6)
    journal = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in journal if line["kind"] == "start"] == [1, 2]
