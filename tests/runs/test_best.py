"""Which way 'best' lies, through the real command line: best, the plateau schedule and early stop follow the metric."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Points
from whole_runs import Place, figures, last

from dtrain.checkpoint.checkpoint_files import load

pytestmark = pytest.mark.timeout(900)

# Nothing here names dtrain: what somebody writes beside a config.
OWN = '''
import torch
import torchmetrics


def wrong(output, target):
    """The share of wrong answers."""
    return (output.argmax(1) != target).float().mean()


def told_wrong(output, target):
    return wrong(output, target)


told_wrong.higher_is_better = False


class Both:
    """Two figures, of which each has its own direction."""

    higher_is_better = {"right": True, "wrong": False}

    def __init__(self):
        self.reset()

    def reset(self):
        self.values = []

    def update(self, output, target):
        self.values += (output.argmax(1) != target).float().tolist()

    def compute(self):
        share = sum(self.values) / len(self.values)
        return {"right": 1 - share, "wrong": share}


class Silent(Both):
    higher_is_better = None


class Learner(torch.nn.Module):
    """Numbers for numbers: the squared error falls in every epoch at a small rate."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        torch.nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x):
        return self.layer(x)[:, 0]


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.x = torch.linspace(-1, 1, size * 8).reshape(size, 8)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum()


class Halves(Numbers):
    """Whether the sum is positive, as binary cross entropy wants it."""

    def __getitem__(self, index):
        x, total = super().__getitem__(index)
        return x, (total > 0).float()[None]


def judged():
    """Only the object knows: it is made of others."""
    return torchmetrics.MetricCollection({"error": torchmetrics.MeanSquaredError(), "r2": torchmetrics.R2Score()})
'''
FALLING: dict[str, Any] = {
    "modules": ["best_own", "toy"], "model": {"name": "Learner"}, "loss.name": "MSELoss", "optimizer.lr": 0.01,
    "loaders": {"name": "Numbers", "batch_size": 10, "train": {"size": 40}, "val": {"size": 10}},
    "lr_scheduler": {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.1},
    "trainer.early_stop_patience": 2, "trainer.max_epochs": 5, "trainer.pictures": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(place: Place) -> Place:
    place.write("best_own.py", OWN)
    return place


def best_step(run: Path) -> int:
    return int(load(run / "checkpoints" / "best").manifest["step"])


@pytest.mark.parametrize(
    ("name", "metrics", "monitor"),
    [
        ("class", {"name": "MeanSquaredError"}, "val/MeanSquaredError"),
        ("label", {"rmse": {"name": "MeanSquaredError", "squared": False}}, "val/rmse"),
        ("made", {"name": "judged"}, "val/judged_error"),
    ],
)
def test_a_figure_that_falls_is_followed_downwards(here: Place, name: str, metrics: Any, monitor: str) -> None:
    changes = FALLING | {"metrics": metrics, "trainer.monitor": monitor}
    here.run(here.config(f"falling-{name}", **changes))
    found = figures(here.path(f"falling-{name}"))
    scores = [found[monitor][step] for step in (4, 8, 12, 16, 20)]  # early stop would have ended it
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.9 * scores[0]
    assert best_step(here.path(f"falling-{name}")) == 20
    assert set(found["lr"].values()) == {0.01}


def test_a_figure_that_rises_is_followed_upwards(here: Place) -> None:
    changes = FALLING | {"metrics": {"name": "judged"}, "trainer.monitor": "judged_r2"}
    here.run(here.config("rising", **changes))
    found = figures(here.path("rising"))
    assert found["val/judged_r2"][20] > found["val/judged_r2"][4]
    assert best_step(here.path("rising")) == 20
    assert set(found["lr"].values()) == {0.01}


@pytest.mark.parametrize(
    ("metric", "monitor", "best"),
    [("told_wrong", "val/told_wrong", min), ("Both", "val/Both_wrong", min), ("Both", "val/Both_right", max)],
)
def test_what_a_function_or_an_object_says_is_heeded(here: Place, metric: str, monitor: str, best: Any) -> None:
    name = monitor.replace("/", "-")
    changes = {"modules": ["best_own", "toy"], "metrics": {"name": metric}, "trainer.monitor": monitor}
    here.run(here.config(name, **changes, **{"trainer.validate_every_steps": 2, "optimizer.lr": 1.0}))
    scores = figures(here.path(name))[monitor]
    assert len(set(scores.values())) > 2
    assert scores[best_step(here.path(name))] == best(scores.values())


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_metric_that_does_not_say_must_be_given_the_mode(here: Place, command: str) -> None:
    config = here.config("unsaid", modules=["best_own", "toy"], metrics={"name": "wrong"})
    result = here.run(command, config, expect=2, cold=True)
    assert result.stderr.count("\n") == 1, result.text
    assert "trainer.mode: missing: wrong does not say whether a higher or a lower val/wrong is better" in result.stderr
    assert not here.path("unsaid").exists()


def test_the_mode_of_the_config_is_taken_and_a_contradiction_is_told(here: Place) -> None:
    config = here.config(
        "contrary", modules=["best_own", "toy"], metrics={"name": "told_wrong"}, **{"trainer.mode": "max"}
    )
    result = here.run("check", config)
    assert "trainer.mode: max, though by what the metric itself says it is min for val/told_wrong" in result.stdout


def test_losses_need_no_mode(here: Place) -> None:
    changes = {"modules": ["best_own", "toy"], "metrics": {"name": "wrong"}, "loss.name": "Terms"}
    here.run(here.config("terms", **changes, **{"trainer.monitor": "val/loss_ce", "optimizer.lr": 1.0}))
    found = figures(here.path("terms"))["val/loss_ce"]
    assert found[best_step(here.path("terms"))] == min(found.values())


def test_who_tests_without_knowing_the_direction_takes_what_the_training_chose(here: Place) -> None:
    """A config for testing alone need not say what the training monitored, nor which way it was better."""
    changes = {"modules": ["best_own", "toy"], "metrics": {"name": "Silent"}, "loaders.test": {"size": 11, "seed": 1}}
    saving = {"trainer.keep_best": 3, "trainer.keep_last": 9, "optimizer.lr": 1.0, "trainer.validate_every_steps": 2}
    for mode, best in (("max", max), ("min", min)):
        config = here.config(
            f"kept-{mode}", **changes, **saving, **{"trainer.monitor": "val/Silent_right", "trainer.mode": mode}
        )
        here.run(config)
        run = here.path(f"kept-{mode}")
        scores = figures(run)["val/Silent_right"]
        assert len(set(scores.values())) > 2
        here.config(f"tests-{mode}", **changes, **{"trainer.checkpoint_dir": str(run)})
        told = here.run("test", f"tests-{mode}.yaml").stdout
        assert f"Silent_right {best(scores.values()):.4f}" in told


# A monitor that the validation does not give


@pytest.mark.parametrize(
    ("name", "metrics", "monitor", "given"),
    [
        ("dict", {"name": "Silent"}, None, "val/loss, val/Silent_right, val/Silent_wrong"),
        ("typo", {"name": "F1Score", "task": "multiclass", "num_classes": 3, "average": "none"}, "val/F1Score_11",
         "val/loss, val/F1Score, val/F1Score_0, val/F1Score_1, val/F1Score_2"),
        ("table", {"name": "ConfusionMatrix", "task": "multiclass", "num_classes": 3}, "val/ConfusionMatrix",
         "val/loss"),
    ],
)  # fmt: skip
def test_check_compares_the_monitor_with_the_figures_of_a_validation(
    here: Place, name: str, metrics: Any, monitor: str | None, given: str
) -> None:
    changes = {"modules": ["best_own", "toy"], "metrics": metrics, "trainer.mode": "max", "trainer.monitor": monitor}
    wanted = monitor or f"val/{metrics['name']}"
    result = here.run("check", here.config(name, **changes), expect=2)
    assert f"trainer.monitor: the validation gives no '{wanted}'" in result.stderr
    assert given in result.stderr
    assert "Traceback" not in result.text


def test_a_training_whose_monitor_is_not_given_saves_what_it_trained_and_resumes(here: Place) -> None:
    changes = {"modules": ["best_own", "toy"], "metrics": {"name": "Silent"}, "trainer.mode": "min"}
    result = here.run(here.config("lost", **changes), expect=2, ranks=2)
    assert "trainer.monitor: the validation gives no 'val/Silent'" in result.stderr
    assert "Traceback" not in result.stderr
    facts = json.loads((here.path("lost") / "run.json").read_text())
    assert (facts["state"], facts["exit_status"]) == ("FAILED", 2)
    mended = {"trainer.monitor": "Silent_wrong", "trainer.resume": "last"}
    here.run(here.config("lost", **changes, **mended), ranks=2)
    found = figures(here.path("lost"))["train/loss"]
    assert sorted(found) == list(range(1, 9)), "4 steps of 8 samples in each of 2 epochs, none of them twice"


# Short forms


def test_the_short_form_of_metrics_measures_what_loss_and_model_say(here: Place) -> None:
    model = {"name": "Linear", "in_features": 8, "out_features": 3}
    changes = {"modules": ["toy"], "model": model, "metrics": {"name": ["Precision", "Recall"]}}
    here.run(here.config("short", **changes, **{"optimizer.lr": 0.0, "metrics.Recall": {"average": "macro"}}))
    weights, points = last(here.path("short")).weights, Points(11, seed=1)
    guess = (points.x @ weights["weight"].T + weights["bias"]).argmax(1)
    found = figures(here.path("short"))
    assert found["val/Precision"][8] == pytest.approx(float((guess == points.y).float().mean()))
    recall = [float((guess[points.y == index] == index).float().mean()) for index in points.y.unique()]
    assert found["val/Recall"][8] == pytest.approx(sum(recall) / len(recall))


def test_the_short_form_beside_a_binary_loss_takes_its_floating_point_targets(here: Place) -> None:
    model = {"name": "Linear", "in_features": 8, "out_features": 1}
    changes = {
        "modules": ["best_own"],
        "model": model,
        "metrics": {"name": "Accuracy"},
        "loss": {"name": "BCEWithLogitsLoss"},
    }
    here.run(here.config("binary", **changes, loaders=FALLING["loaders"] | {"name": "Halves"}))
    weights, found = last(here.path("binary")).weights, figures(here.path("binary"))
    x = torch.linspace(-1, 1, 80).reshape(10, 8)
    right = ((x @ weights["weight"].T + weights["bias"] > 0) == (x.sum(1, keepdim=True) > 0)).float().mean()
    assert found["val/Accuracy"][8] == pytest.approx(float(right))
