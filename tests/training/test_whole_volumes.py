"""A validation of whole volumes while training, on the real command line: its figures, and what a training promises.

Its patches hold foreground for certain in a share, and one of its volumes is smaller than a patch.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from predicting import convolutions, dataset_of, inference, loader_of, random_volume
from torch import Tensor, nn
from whole_runs import Place, close, figures, last, same_training

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.distributed.ranks import Ranks
from dtrain.loss import Criterion
from dtrain.metrics import Metrics
from dtrain.modelloader import Forward
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import logits
from dtrain.training.evaluate import evaluate_volumes

NET = """
import torch
from toy import Trouble

class Net(torch.nn.Sequential):
    def __init__(self):
        layers = [torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Tanh()]
        super().__init__(Trouble(), *layers, torch.nn.Conv3d(4, 3, 3, padding=1))
"""
VAL = {"x": (12, 9, 10), "y": (8, 8, 8), "z": (8, 15, 8)}
PATCHES = {"name": "SliceBuilder", "patch_shape": [8, 8, 8]}


def write(path: Path, shape: tuple[int, ...], seed: int, has_foreground: bool = True) -> None:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, shape).astype(np.uint8) if has_foreground else np.zeros(shape, np.uint8)
    with h5py.File(path, "w") as file:
        file["raw"], file["label"] = label + rng.normal(0, 0.5, shape).astype(np.float32), label


def write_data(folder: Path) -> None:
    for number, (stem, shape) in enumerate({"a": (10, 12, 9), "small": (6, 10, 9), "empty": (9, 9, 9)}.items()):
        write(folder / "wv-train" / f"{stem}.h5", shape, number, stem != "empty")
    for number, (stem, shape) in enumerate(VAL.items()):
        write(folder / "wv-val" / f"{stem}.h5", shape, 10 + number)


def config(place: Place, name: str, **changes: Any) -> str:
    place.write("net3d.py", NET)
    place.once("wv-data", lambda: write_data(place.folder))
    foreground = {"name": "ForegroundSlices", "patch_shape": [8, 8, 8], "patches_per_volume": 4, "pad": "reflect"}
    sections = {
        "modules": ["toy", "net3d"], "model": {"name": "Net"},
        "loaders": {
            "name": "LazyHDF5Dataset", "global_batch_size": 2, "transforms": [{"name": "RandomFlip"}],
            "train": {"file_paths": "wv-train", "slice_builder": foreground},
            "val": {"file_paths": "wv-val", "slice_builder": PATCHES, "whole_volumes": "mirrored", "every_epochs": 2},
            "test": {"file_paths": ["wv-val/x.h5", "wv-val/y.h5", "wv-val/z.h5"]},
        },
        "metrics": {"name": "Accuracy", "task": "multiclass", "num_classes": 3},
        "predictor": {"patch_shape": [8, 8, 8], "stride_shape": [4, 4, 4], "mirror": [0, 2]},
        "trainer.max_epochs": 4, "trainer.ema_decay": 0.7, "trainer.keep_best": 3, "trainer.pictures": False,
    }  # fmt: skip
    return place.config(name, **(sections | changes))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    """A training of four epochs of six steps, on one rank."""
    place.once("wv-whole", lambda: place.run(config(place, "wv-whole")).stdout)
    return place.path("wv-whole")


def test_patches_and_whole_volumes_take_turns_under_names_of_their_own(place: Place, run: Path) -> None:
    found = figures(run)
    of_val = {name: list(values) for name, values in found.items() if name.startswith("val/")}
    whole, patches = [12, 24], [6, 18]
    assert of_val == {
        "val/loss": patches, "val/Accuracy": patches, "val/volume/loss": whole, "val/volume/Accuracy": whole,
    }  # fmt: skip
    best = max(found["val/volume/Accuracy"].values())
    assert last(run).state["best"] == best, "patches are not compared with whole volumes"
    assert found["test/Accuracy"][24] == pytest.approx(best, abs=1e-6), "the same mechanism, with the best weights"
    shown = place.once("wv-whole", str)
    assert shown.count("no foreground in empty.h5: patches of these lie anywhere") == 1


def test_the_figures_are_those_of_what_predict_writes(place: Place, run: Path) -> None:
    """With the averaged weights, overlapping patches and mirrored, as `dtrain predict` writes logits by default."""
    place.run(
        "predict", config(place, "wv-whole"), "--output-dir", "wv-out", "--checkpoint", f"{run}/checkpoints/last",
        "predictor.activation=none",
    )  # fmt: skip
    right, voxels, losses = 0, 0, []
    for stem, shape in VAL.items():
        with h5py.File(place.folder / f"wv-out/{stem}_predictions.h5") as out:
            logits = out["predictions"][...].astype(np.float64)
        with h5py.File(place.folder / f"wv-val/{stem}.h5") as file:
            label = file["label"][...].astype(int)
        assert logits.shape == (3, *shape)
        right, voxels = right + (logits.argmax(0) == label).sum(), voxels + label.size
        of_label = np.take_along_axis(logits, label[None], 0)[0]
        losses.append((np.log(np.exp(logits).sum(0)) - of_label).mean())
    found = figures(run)
    assert found["val/volume/Accuracy"][24] == pytest.approx(right / voxels, abs=1e-6)
    assert found["val/volume/loss"][24] == pytest.approx(np.mean(losses), rel=1e-5)
    assert not math.isclose(found["val/volume/Accuracy"][12], found["val/volume/Accuracy"][24])


def test_two_ranks_train_and_measure_the_same(place: Place, run: Path) -> None:
    place.run(config(place, "wv-two", **{"trainer.pictures": {"every_validations": 1}}), ranks=2)
    close(figures(place.path("wv-two")), figures(run))
    drawn = {path.name for path in (place.path("wv-two") / "pictures").glob("step-*")}
    assert len(drawn) == 4, f"of each validation, of patches and of volumes: {drawn}"


def test_a_stop_within_whole_volumes_changes_nothing(place: Place, run: Path) -> None:
    file = config(place, "wv-stopped")
    patches_of_first = 5  # batches of two, in the first validation: 4 + 1 + 4 patches, in five
    place.run(file, expect=75, do=f"eval {patches_of_first + 3} rank 0 TERM")
    assert list(figures(place.path("wv-stopped"))["val/loss"]) == [6]
    assert (
        "val/volume/loss" not in figures(place.path("wv-stopped"))
        and last(place.path("wv-stopped")).state["step"] == 12
    )
    place.run(file, expect=75, do="train 3 rank 0 TERM")
    place.run(file)
    same_training(place.path("wv-stopped"), run)
    assert figures(place.path("wv-stopped")) == figures(run)


def test_how_often_may_change_and_what_is_measured_not(place: Place, run: Path) -> None:
    more = {"trainer.max_epochs": 5, "loaders.val.every_epochs": 1}
    overrides = [f"{key}={value}" for key, value in more.items()]
    text = place.run(config(place, "wv-whole"), "loaders.val.whole_volumes=true", *overrides, expect=2).text
    assert re.search(r"loaders.val.whole_volumes: '?mirrored'? -> [Tt]rue", text) and "every_epochs: 2" not in text, (
        text
    )


def test_check_tries_patches_and_planes(place: Place) -> None:
    text = place.run("check", config(place, "wv-checked")).stdout
    assert "val: one batch, loss " in text and "val: the first planes of a volume, loss " in text


def test_patches_may_decide_what_is_best_and_each_set_is_measured_in_its_own_way(place: Place, run: Path) -> None:
    val = {"file_paths": "wv-val", "slice_builder": PATCHES}
    near = {**val, "label": "near", "whole_volumes": "mirrored", "every_epochs": 2}
    changes = {"loaders.val": [near, {**val, "label": "far"}], "trainer.monitor": "val/near/Accuracy"}
    place.run(config(place, "wv-sets", **changes, **{"trainer.early_stop_patience": 1}))
    one, found = figures(run), figures(place.path("wv-sets"))
    for name in ("loss", "Accuracy"):
        assert found[f"val/near/{name}"] == one[f"val/{name}"]
        assert found[f"val/near/volume/{name}"] == one[f"val/volume/{name}"]
        assert list(found[f"val/far/{name}"]) == [6, 12, 18, 24]
    best = max(found["val/near/Accuracy"].values())
    assert last(place.path("wv-sets")).state["best"] == best
    assert 12 in found["val/near/volume/Accuracy"], "which was not counted as a validation without a new best"


def mistakes(folder: Path, changes: dict[str, Any]) -> list[str]:
    (folder / "wv-data.made").write_text("null")  # nothing is read
    place = Place.__new__(Place)
    place.folder = folder
    try:
        conv = {"name": "Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}
        check(load_config(config(place, "wrong", **{"modules": [], "model": conv} | changes)), "train")
    except ConfigError as error:
        return [f"{item.place} {item.text}" for item in error.mistakes]
    return []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"loaders.val": [{"label": "a", "file_paths": "b", "every_epochs": 2}]},
            "loaders.val.0.every_epochs: says how often",
        ),
        ({"loaders.val.every_epochs": 0}, "loaders.val.every_epochs: must be at least 1, found 0"),
        ({"loaders.val.whole_volumes": "all"}, "loaders.val.whole_volumes: expected"),
        ({"loaders.val.whole_volumes": False}, "loaders.val.every_epochs: says how often whole volumes are measured"),
        ({"loaders.test.whole_volumes": True}, "loaders.test.whole_volumes: is for loaders.val"),
        ({"predictor": {}}, "loaders.val.whole_volumes: mirrored needs predictor.mirror"),
        ({"trainer.validate_every_steps": 3}, "loaders.val.every_epochs: counts epochs"),
        (
            {"trainer.strategy": "fsdp"},
            "loaders.val.whole_volumes: measures whole volumes, which a sharded model (strategy: fsdp) cannot",
        ),
        (
            {"loaders.val.every_epochs": 1, "trainer.monitor": "val/Accuracy"},
            "'val/Accuracy' is not a metric of the validation; did you mean 'val/volume/Accuracy'",
        ),
        (
            {"trainer.monitor": "val/volumes/Accuracy"},
            "possible: val/volume/Accuracy, val/volume/loss, val/Accuracy, val/loss",
        ),
    ],
)
def test_what_does_not_go_together_is_a_mistake_of_the_config(tmp_path: Path, changes: Any, text: str) -> None:
    found = mistakes(tmp_path, changes)
    assert len(found) == 1 and text in found[0] and "wrong.yaml:" in found[0], found


def test_volumes_and_labels_are_needed(place: Place) -> None:
    without = {"loaders.val": {"file_paths": "wv-val", "label_internal_path": None, "whole_volumes": True}}
    text = place.run(config(place, "wv-unlabelled", **without), expect=2).text
    assert "loaders.val.whole_volumes" in text and "wv-val/x.h5 is read without label" in text
    points = {"model": {"name": "MLP"}, "loaders": {
        "name": "Points", "train": {"size": 8}, "val": {"size": 8, "whole_volumes": True}}}  # fmt: skip
    text = place.run(config(place, "wv-points", **points), expect=2).text
    assert "loaders.val.whole_volumes: Points has no volumes" in text


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.other = convolutions(1), convolutions(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.main(x), "other": self.other(x)}


def of_both(output: Any, target: Tensor) -> Tensor:
    return output["out"].mean() + output["other"].mean()


def test_a_loss_of_several_outputs_is_not_that_of_one() -> None:
    model, data = Heads(), dataset_of(random_volume(6, 5, 4), label=lambda image: (image[0] > 0).astype(np.uint8))
    cpu = torch.device("cpu")
    ranks = Ranks(0, 0, 1, cpu)

    def measured(loss: Any) -> Any:
        forward = Forward(model, cpu, criterion=Criterion(loss))
        outcomes = logits(replace(inference(Predictor(), model), forward=forward), loader_of(data))
        return evaluate_volumes(model, outcomes, Metrics({}, ranks, cpu), ranks, forward=forward)

    assert measured(of_both) == {}
    image, label = data[0]
    expected = nn.functional.cross_entropy(model.main(image[None]), label[None]).item()
    assert measured(nn.CrossEntropyLoss()) == {"loss": pytest.approx(expected, rel=1e-5)}


def test_weights_belong_to_the_target_of_a_volume() -> None:
    data = dataset_of(random_volume(4, 4), label=lambda image: image[0] > 0)
    data.volumes[0].weight, data.volumes[0].has_weight = np.full((4, 4), 2.0), True  # type: ignore[attr-defined]
    ((_, _, (label, weight)),) = logits(inference(Predictor()), loader_of(data))
    assert label.shape == weight.shape == (1, 4, 4) and weight.eq(2).all()
