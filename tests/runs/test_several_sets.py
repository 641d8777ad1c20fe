"""Several validation and test sets: figures of each by its label, exact on two ranks, and every command knows them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import MLP, Points
from whole_runs import Place, close, figures, last, same_training

pytestmark = pytest.mark.timeout(600)

SETS: dict[str, Any] = {
    "loaders.val": [{"label": "near", "size": 11, "seed": 1}, {"label": "far", "size": 3, "seed": 2, "batch_size": 2}],
    "loaders.test": [{"label": "one", "size": 5, "seed": 3}, {"label": "other", "size": 6, "seed": 4}],
    "metrics": {"name": "Right"}, "trainer.monitor": "val/far/Right", "trainer.pictures": {"worst": 2},
}  # fmt: skip


def trained(place: Place) -> Path:
    place.once("sets", lambda: place.run(place.config("sets", **SETS)).rc)
    return place.path("sets")


def by_hand(weights: dict[str, Any], size: int, seed: int) -> tuple[float, float]:
    """Loss and share of right answers of a model with these weights, over one set at once."""
    model, data = MLP().eval(), Points(size, seed)
    model.load_state_dict(weights)
    with torch.no_grad():
        output = model(data.x)
    assert isinstance(output, torch.Tensor)
    return float(F.cross_entropy(output, data.y)), float((output.argmax(1) == data.y).float().mean())


def test_each_set_has_its_own_figures_and_the_monitored_one_chooses_the_best(place: Place) -> None:
    found = figures(trained(place))
    steps = max(found["train/loss"])
    sets = {"val/near": (11, 1), "val/far": (3, 2)}
    assert {name for name in found if name.startswith(("val", "test"))} == {
        f"{name}/{figure}" for name in (*sets, "test/one", "test/other") for figure in ("loss", "Right")
    }
    for name, data in sets.items():
        expected = by_hand(last(trained(place)).weights, *data)
        for figure, value in zip(("loss", "Right"), expected, strict=True):
            assert math.isclose(found[f"{name}/{figure}"][steps], value, rel_tol=1e-5, abs_tol=1e-6), name
    state = last(trained(place)).state
    assert state["best"] == max(found["val/far/Right"].values())


def test_two_ranks_give_the_same_figures_of_each_set(place: Place) -> None:
    changes = SETS | {"loaders.batch_size": 2, "loaders.val": [{**one, "batch_size": 2} for one in SETS["loaders.val"]]}
    place.run(place.config("sets-of-two", **changes), ranks=2)
    close(figures(trained(place)), figures(place.path("sets-of-two")))


def test_a_stop_in_the_second_set_repeats_the_validation(place: Place) -> None:
    file = place.config("sets-stopped", **SETS)
    place.run(file, do="eval 4 rank 0 TERM", expect=75)  # near has 3 batches, far 2
    assert not any(name.startswith("val") for name in figures(place.path("sets-stopped")))
    place.run(file)
    same_training(place.path("sets-stopped"), trained(place))
    assert figures(place.path("sets-stopped")) == figures(trained(place))


def test_pictures_test_check_and_predict_know_the_sets(place: Place) -> None:
    run = trained(place)
    step = max(figures(run)["val/near/loss"])
    drawn = {path.name for path in (run / "pictures" / f"step-{step:08d}").iterdir()}
    assert {"near-confusion.png", "far-confusion.png"} <= drawn
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "val/far/confusion" in json.dumps(lines)
    file = place.config("sets", **SETS)
    text = place.run("test", file).text
    assert "one/loss" in text and "other/Right" in text
    text = place.run("check", file).text
    assert all(f"{name}: one batch, loss" in text for name in ("val/near", "val/far", "test/one", "test/other"))
    assert "# loaders.val/far:" in place.run("config", file).stdout
    result = place.run("predict", file, expect=2)
    assert "loaders.test: holds several sets; name what is predicted" in result.stderr


CLOCKS = '''"""The clock by which validations are drawn: each look at it takes a second on rank 1, none on rank 0."""
import itertools
import os
from dtrain.reporting.picture_time import PictureTime
from toy import MLP

ticks = itertools.count(0, int(os.environ["RANK"]))
PictureTime.__init__.__defaults__ = (None, lambda: next(ticks), lambda: 0.0)
PictureTime.in_thread = lambda self, work: work  # whether a thread still draws does not count

class Net(MLP):
    """So that this module is imported."""
'''


def test_rank_0_decides_by_its_clock_which_validations_are_drawn_of_all_sets(place: Place) -> None:
    place.write("clocks_of_ranks.py", CLOCKS)
    keys = {"modules": ["toy", "clocks_of_ranks"], "model.name": "clocks_of_ranks.Net", "trainer.max_epochs": 3}
    done = place.run(place.config("sets-by-time", **SETS | keys), ranks=2)
    drawn = sorted((place.path("sets-by-time") / "pictures").iterdir())
    steps = sorted(figures(place.path("sets-by-time"))["val/near/loss"])
    assert len(steps) == 3 and [path.name for path in drawn] == [f"step-{step:08d}" for step in steps]
    for path in drawn:  # rank 1 alone would leave the second one out, and rank 0 would miss what it saw
        assert {each.name for each in path.iterdir()} >= {"near-confusion.png", "far-confusion.png"}
    assert "warning" not in done.text and "left out" not in done.text, done.text


def test_the_first_metric_of_the_first_set_is_monitored_where_nothing_else_is_said(place: Place) -> None:
    file = place.config("sets-first", **{key: value for key, value in SETS.items() if key != "trainer.monitor"})
    place.run(file, "trainer.max_epochs=1")
    assert last(place.path("sets-first")).state["best"] == max(
        figures(place.path("sets-first"))["val/near/Right"].values()
    )


def test_a_list_of_one_set_without_a_label_is_that_set(place: Place) -> None:
    file = place.config(
        "sets-one", **{"loaders.val": [{"size": 11, "seed": 1}], "loaders.test": [{"label": "t", "size": 2}]}
    )
    place.run(file, "trainer.max_epochs=1")
    assert {"val/loss", "val/Right", "test/t/loss"} <= set(figures(place.path("sets-one")))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trainer.monitor": "Right"}, "trainer.monitor: 'Right' is not a metric of the validation"),
        ({"trainer.monitor": "val/farr/Right"}, "did you mean 'val/far/Right'"),
        ({"loaders.val": [{"size": 2}, {"label": "b", "size": 2}]}, "loaders.val.0: needs a 'label'"),
        ({"loaders.val": [{"label": "a", "size": 2}, {"label": "a", "size": 2}]}, "loaders.val.1.label: a second set"),
        ({"loaders.val": [{"label": "a/b", "size": 2}]}, "loaders.val.0.label: expected a label of letters"),
        ({"loaders.val": []}, "loaders.val: the list is empty"),
        ({"loaders.val": [{"label": "far", "sise": 2}]}, "'sise'; did you mean 'size'"),
        ({"loaders.val": [{"label": "far", "size": 2, "batch_size": 0}]}, "loaders.val.0.batch_size: must be"),
        ({"loaders.train": [{"size": 2}]}, "loaders.train: expected a mapping, found list"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_a_line(
    changes: dict[str, Any], text: str, place: Place, request: pytest.FixtureRequest
) -> None:
    name = f"sets-wrong-{request.node.callspec.indices['changes']}"
    result = place.run("config", place.config(name, **SETS | changes), expect=2)
    assert text in result.stderr and "Traceback" not in result.text
