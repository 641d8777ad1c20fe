"""Models of several heads through the real command line: each metric measures the output and the target it names."""

from typing import Any

import numpy as np
import pytest
from whole_runs import Place, figures

pytestmark = pytest.mark.timeout(900)

# The model repeats what the data say, wrong in a known share of each head; so the figures follow from the data alone.
OWN = '''
import torch
from torch import nn
from torch.utils.data import Dataset

SIZE = 11


def truth():
    """Classes of masks (SIZE, 4) and labels (SIZE,), and the guesses of both, by plain arithmetic."""
    index = torch.arange(SIZE)
    mask = (index[:, None] + torch.arange(4)) % 3
    label = index % 3
    return mask, label, (mask + (mask == 2).long()) % 3, (label + (index % 2)) % 3


class Scenes(Dataset):
    def __init__(self, size=SIZE, form="heads"):
        self.size, self.form = size, form

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        mask, label, *_ = truth()
        image = torch.tensor(float(index))
        if self.form == "flat":
            return {"image": image, "label": label[index], "mask": mask[index]}
        if self.form == "boxes":
            return image, {"boxes": torch.arange(index % 3 + 1.0)}
        return image, {"label": label[index], "mask": mask[index]}


def listed(samples):
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


class Heads(nn.Module):
    def __init__(self, form="heads"):
        super().__init__()
        self.weight, self.form = nn.Parameter(torch.zeros(1)), form

    def forward(self, image):
        index = image.long()
        _, _, mask, label = truth()
        if self.form == "boxes":
            return [{"boxes": torch.arange(int(each) % 2 + 1.0) + 0 * self.weight} for each in index]
        if self.form == "label":
            return nn.functional.one_hot(label[index], 3) + 0 * self.weight
        heads = {"mask": nn.functional.one_hot(mask[index], 3).movedim(-1, 1) + 0 * self.weight,
                 "label": nn.functional.one_hot(label[index], 3) + 0 * self.weight}
        return tuple(heads.values()) if self.form == "tuple" else heads


def nothing(output, target):
    first = output
    while not isinstance(first, torch.Tensor):
        first = list(first.values() if isinstance(first, dict) else first)[0]
    return first.float().sum() * 0


class Boxes:
    """How many boxes there are in all samples: found and wanted."""

    higher_is_better = True

    def __init__(self):
        self.reset()

    def reset(self):
        self.found = self.wanted = self.samples = 0

    def update(self, output, target):
        assert len(output) == len(target) and all(isinstance(each, dict) for each in (*output, *target))
        self.samples += len(output)
        self.found += sum(len(each["boxes"]) for each in output)
        self.wanted += sum(len(each["boxes"]) for each in target)

    def compute(self):
        return {"found": self.found, "wanted": self.wanted, "samples": self.samples}


class WholeHeads(Boxes):
    """Takes the dicts of both heads."""

    def update(self, output, target):
        assert list(output) == list(target) == ["label", "mask"]
        self.samples += len(output["label"])
        self.found += int((output["label"].argmax(1) == target["label"]).sum())
        self.wanted += int((output["mask"].argmax(1) == target["mask"]).sum())
'''
SIZE = 11
INDEX = np.arange(SIZE)
# The guesses are wrong where a mask is 2, and in every second label.
MASK_RIGHT = float(((INDEX[:, None] + np.arange(4)) % 3 != 2).mean())
LABEL_RIGHT = float((INDEX % 2 == 0).mean())
ACCURACY = {"name": "Accuracy", "task": "multiclass", "num_classes": 3}
SCENES: dict[str, Any] = {
    "modules": ["heads_own"], "model": {"name": "Heads"}, "loss": {"name": "nothing"},
    "loaders": {"name": "Scenes", "batch_size": 4, "train": {}, "val": {}},
    "trainer.max_epochs": 1, "trainer.pictures": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(place: Place) -> Place:
    place.write("heads_own.py", OWN)
    return place


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_metric_measures_the_head_that_it_names(here: Place, ranks: int) -> None:
    metrics = {
        "of_label": ACCURACY | {"output_key": "label"},
        "of_mask": ACCURACY | {"output_key": "mask", "target_key": "mask", "multidim_average": "global"},
        "of_both": {"name": "WholeHeads", "output_key": ["label", "mask"], "target_key": ["label", "mask"]},
    }
    name = f"head-named-{ranks}"
    here.run(here.config(name, **SCENES, metrics=metrics), ranks=ranks)
    found = {key: values[max(values)] for key, values in figures(here.path(name)).items()}
    assert found["val/of_label"] == pytest.approx(LABEL_RIGHT)
    assert found["val/of_mask"] == pytest.approx(MASK_RIGHT)
    assert found["val/of_both_samples"] == SIZE
    assert found["val/of_both_found"] == pytest.approx(LABEL_RIGHT * SIZE)
    assert found["val/of_both_wanted"] == pytest.approx(MASK_RIGHT * SIZE * 4)


def test_keys_under_several_names_of_a_metric_are_shared(here: Place) -> None:
    metrics = {
        "name": ["Accuracy", "Recall"], "task": "multiclass", "num_classes": 3, "output_key": "label",
        "Recall": {"output_key": "mask", "average": "micro"},
    }  # fmt: skip
    here.run(here.config("shared", **SCENES, metrics=metrics))
    found = figures(here.path("shared"))
    assert found["val/Accuracy"][3] == pytest.approx(LABEL_RIGHT)
    assert found["val/Recall"][3] == pytest.approx(MASK_RIGHT)


def test_heads_by_index_and_a_target_that_is_a_list_of_a_flat_dicts_keys(here: Place) -> None:
    changes = SCENES | {"model": {"name": "Heads", "form": "tuple"}, "trainer.target_key": ["mask", "label"]}
    changes |= {"loaders": SCENES["loaders"] | {"form": "flat"}}
    metrics = ACCURACY | {"output_key": 1, "target_key": "label"}
    here.run(here.config("flat", **changes, metrics=metrics))
    assert figures(here.path("flat"))["val/Accuracy"][3] == pytest.approx(LABEL_RIGHT)


def test_what_keys_do_not_decide_is_refused_with_the_keys_that_there_are(here: Place) -> None:
    result = here.run("check", here.config("undecided", **SCENES, metrics=ACCURACY), expect=2)
    text = "metrics.Accuracy: output and target have several keys in common ('mask', 'label'); name one with output_key"
    assert text in result.stderr
    assert "Traceback" not in result.text
    metrics = ACCURACY | {"output_key": "lable"}
    result = here.run("check", here.config("misspelt", **SCENES, metrics=metrics), expect=2)
    assert "metrics.Accuracy: output_key: the output has no 'lable'; possible: 'mask', 'label'" in result.stderr


@pytest.mark.parametrize("command", ["check", "train"])
def test_two_entries_that_may_be_the_target_are_refused_before_the_first_step(here: Place, command: str) -> None:
    changes = SCENES | {"model": {"name": "Heads", "form": "label"}, "metrics": ACCURACY}
    changes |= {"loaders": SCENES["loaders"] | {"form": "flat"}}
    name = f"two-targets-{command}"
    result = here.run(command, here.config(name, **changes), expect=2)
    text = "trainer.target_key: missing: of a batch with the keys 'image', 'label', 'mask', 'label' and 'mask' may be"
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    if command == "train":
        here.run(here.config(name, **changes, **{"trainer.target_key": "label"}))
        assert figures(here.path(name))["val/Accuracy"][3] == pytest.approx(LABEL_RIGHT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_lists_of_samples_reach_a_metric_whole(here: Place, ranks: int) -> None:
    changes = SCENES | {"model": {"name": "Heads", "form": "boxes"}, "metrics": {"name": "Boxes"}}
    loaders = SCENES["loaders"] | {"form": "boxes", "collate_fn": {"name": "listed"}}
    name = f"boxes-{ranks}"
    here.run(here.config(name, **changes | {"loaders": loaders}, **{"trainer.monitor": "Boxes_found"}), ranks=ranks)
    found = {key: values[max(values)] for key, values in figures(here.path(name)).items()}
    assert found["val/Boxes_samples"] == SIZE
    assert found["val/Boxes_found"] == float((INDEX % 2 + 1).sum())
    assert found["val/Boxes_wanted"] == float((INDEX % 3 + 1).sum())


def test_a_prediction_is_of_the_head_that_is_named(here: Place) -> None:
    changes = SCENES | {"metrics": ACCURACY | {"output_key": "label"}, "loaders.predict": {}}
    predictor = {"format": "npy", "activation": "none"}
    here.run(here.config("predicted", **changes))
    result = here.run("predict", here.config("predicted", **changes, predictor=predictor), expect=2)
    assert "predictor: the output has the keys 'mask', 'label', and none of them is the main one" in result.stderr
    here.run("predict", here.config("predicted", **changes, predictor=predictor | {"output_key": "label"}))
    (file,) = here.path("predicted").rglob("*.npy")
    label = (INDEX % 3 + INDEX % 2) % 3
    assert np.array_equal(np.load(file).argmax(1), label)
