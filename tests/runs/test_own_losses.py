"""Models that compute their own loss, without a section `loss`: a detector and a BERT, through the command line."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from whole_runs import Place, close, equal, figures, last

from dtrain.data import rng

pytestmark = pytest.mark.timeout(600)

OWN = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset


class Squares(Dataset):
    """Grey images of different sizes, each with one or two squares: light ones are of class 1, dark ones of class 2."""

    def __init__(self, size, seed=0, bad=-1):
        self.size, self.seed, self.bad = size, seed, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        image = 0.1 * torch.randn(1, 16 + 4 * (index % 2), 20, generator=generator)
        boxes, labels = [], []
        for number in range(1 + index % 2):
            y, x = torch.randint(0, 7, (2,), generator=generator).tolist()
            x += 8 * number
            label = int(torch.randint(1, 3, (1,), generator=generator))
            image[:, y : y + 6, x : x + 6] += 2.0 if label == 1 else -2.0
            boxes.append([x, y, x + 6, y + 6])
            labels.append(label)
        if index == self.bad:
            image[0, 0, 0] = float("inf")
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


class TinyDetector(nn.Module):
    """torchvision's contract: a dict of losses in train mode, a list of predictions in eval mode."""

    def __init__(self, classes=3, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.scores, self.sides = nn.Conv2d(16, classes, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images, targets=None):
        made = []
        for image in images:
            features = self.body(image[None])
            made.append((self.scores(features)[0].flatten(1).T, self.sides(features)[0].flatten(1).T, image))
        if not self.training:
            return [self.found(*each) for each in made]
        losses = [self.losses(*each, target) for each, target in zip(made, targets)]
        return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}

    def centres(self, image):
        y, x = torch.meshgrid(*(torch.arange(0.0, side, 4) + 2 for side in image.shape[1:]), indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], 1)

    def losses(self, scores, sides, image, target):
        centres = self.centres(image)
        boxes = target["boxes"][:, None]
        within = ((centres > boxes[..., :2]) & (centres < boxes[..., 2:])).all(-1)
        owner = within.float().argmax(0)
        classes = torch.where(within.any(0), target["labels"][owner], 0)
        wanted = torch.cat([centres - target["boxes"][owner, :2], target["boxes"][owner, 2:] - centres], 1)
        count = within.any(0).sum().clamp(min=1)
        box = F.l1_loss(sides, wanted, reduction="none").mean(1)
        return {
            "loss_classifier": F.cross_entropy(scores, classes),
            "loss_box_reg": (box * within.any(0)).sum() / count,
        }

    def found(self, scores, sides, image):
        probabilities, labels = scores.softmax(1)[:, 1:].max(1)
        centres = self.centres(image)
        boxes = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1)
        kept = probabilities.topk(2).indices
        return {"boxes": boxes[kept], "labels": labels[kept] + 1, "scores": probabilities[kept]}


class BoxIoU:
    """The mean over all true boxes of the best intersection over union with a prediction."""

    higher_is_better = True

    def __init__(self):
        self.reset()

    def reset(self):
        self.values = []

    def update(self, output, target):
        for found, wanted in zip(output, target, strict=True):
            for box in wanted["boxes"]:
                low, high = torch.maximum(found["boxes"][:, :2], box[:2]), torch.minimum(found["boxes"][:, 2:], box[2:])
                both = (high - low).clamp(min=0).prod(1)
                areas = (found["boxes"][:, 2:] - found["boxes"][:, :2]).clamp(min=0).prod(1)
                self.values.append(float((both / (areas + (box[2:] - box[:2]).prod() - both)).max()))

    def compute(self):
        return sum(self.values) / len(self.values)


class Tokens(Dataset):
    """Rows of 8 token ids; the label is which of three tokens occurs."""

    def __init__(self, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 32, (size, 8), generator=generator)
        self.labels = torch.randint(0, 3, (size,), generator=generator)
        self.ids[torch.arange(size), torch.randint(0, 8, (size,), generator=generator)] = self.labels + 1

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = torch.ones(8, dtype=torch.long)
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": self.labels[index]}


class Holder:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class Scored(nn.Module):
    """Returns an object with `loss` and `logits` of a pair."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return Holder(F.cross_entropy(logits, labels), logits)
'''

SQUARES = {"name": "Squares", "collate_fn": "detection_collate", "train": {"size": 10}, "val": {"size": 6, "seed": 1}}
DETECTOR: dict[str, Any] = {
    "modules": ["own_loss", "toy"], "model.name": "TinyDetector", "loss": None, "metrics": {"name": "BoxIoU"},
    "trainer.accumulate": 2,
}  # fmt: skip


def detector(loaders: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {**DETECTOR, "loaders": {**SQUARES, "batch_size": 2, "shuffle": False, **(loaders or {})}, **changes}


BERT = {
    "name": "transformers.BertForSequenceClassification",
    "config": {
        "name": "transformers.BertConfig", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8, "num_labels": 3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def here(place: Place) -> Place:
    place.write("own_loss.py", OWN)
    return place


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_loss.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(importlib.sys.modules, "own_loss", raising=False)
    return importlib.import_module("own_loss")


def as_lists(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in samples], [target for _, target in samples]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_detector_is_trained_as_by_a_plain_loop(here: Place, own: Any, ranks: int) -> None:
    """10 samples, 4 a step, so that each epoch's last step has 2: means over samples, of losses by name."""
    rng.seed_all(0)  # as a training does
    model = own.TinyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, losses = own.Squares(10), []
    for low, high in [(0, 4), (4, 8), (8, 10)] * 2:
        terms = model(*as_lists([data[index] for index in range(low, high)]))
        losses.append({name: float(value.detach()) for name, value in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    model.eval()
    images, targets = as_lists([own.Squares(6, seed=1)[index] for index in range(6)])
    metric = own.BoxIoU()
    with torch.no_grad():
        metric.update(model(images), targets)

    name = f"own-detector-{ranks}"
    text = here.run(here.config(name, **detector({"batch_size": 2 // ranks})), ranks=ranks).text
    assert "without a section loss the model computes it, called as TinyDetector(images, targets)" in text
    found = figures(here.path(name))
    assert "val/loss" not in found
    for step, terms in enumerate(losses, 1):
        assert found["train/loss"][step] == pytest.approx(sum(terms.values()), rel=1e-5)
        for term, value in terms.items():
            assert found[f"train/{term}"][step] == pytest.approx(value, rel=1e-5)
    assert found["val/BoxIoU"][6] == pytest.approx(metric.compute(), rel=1e-4)
    for key, value in last(here.path(name)).weights.items():
        assert torch.allclose(value, model.state_dict()[key], atol=1e-6), key


def test_a_detector_resumes_bit_for_bit(here: Place) -> None:
    changes = detector({"batch_size": 1, "shuffle": True}, optimizer={"name": "Adam", "lr": 0.01})
    changes |= {"model.dropout": 0.3, "trainer.ema_decay": 0.8}
    for name, stops in (("own-stopped", [4, 6]), ("own-through", [6])):
        for steps in stops:
            here.run(here.config(name, **changes, **{"trainer.max_steps": steps}), ranks=2)
    stopped, through = (last(here.path(name)) for name in ("own-stopped", "own-through"))
    assert equal((stopped.weights, stopped.ema), (through.weights, through.ema))
    assert all(equal(stopped.state[key], through.state[key]) for key in ("optimizer", "rng", "sums"))
    found = figures(here.path("own-stopped"))
    assert set(found["train/loss_box_reg"]) == set(range(1, 7)) and found["val/BoxIoU"]


def test_a_bert_is_trained_tested_and_predicts(here: Place, own: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    rng.seed_all(0)  # as a training does
    config = {key: value for key, value in BERT["config"].items() if key != "name"}  # type: ignore[attr-defined]
    model = BertForSequenceClassification(BertConfig(**config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, losses = own.Tokens(20), []
    for low in (0, 8, 16):
        logits = model(data.ids[low : low + 8], attention_mask=torch.ones(len(data.ids[low : low + 8]), 8)).logits
        loss = F.cross_entropy(logits, data.labels[low : low + 8])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = own.Tokens(11, seed=1)
    with torch.no_grad():
        logits = model.eval()(unseen.ids, attention_mask=torch.ones(11, 8)).logits

    loaders = {"name": "Tokens", "batch_size": 8, "shuffle": False, "train": {"size": 20}}
    loaders |= {"val": {"size": 11, "seed": 1}, "test": {"size": 11, "seed": 1}}
    changes = {"modules": ["own_loss"], "model": BERT, "loss": None, "loaders": loaders, "trainer.max_epochs": 1}
    changes |= {"metrics": {"name": "Accuracy", "task": "multiclass", "num_classes": 3}}
    file = here.config("own-bert", **changes, predictor={"format": "npy", "activation": "none"})
    text = here.run(file).text
    assert "called as BertForSequenceClassification(input_ids=..., attention_mask=..., labels=...)" in text
    found = figures(here.path("own-bert"))
    assert [found["train/loss"][step] for step in (1, 2, 3)] == pytest.approx(losses, rel=1e-5)
    right = float((logits.argmax(1) == unseen.labels).float().mean())
    for phase in ("val", "test"):
        assert found[f"{phase}/loss"][3] == pytest.approx(float(F.cross_entropy(logits, unseen.labels)), rel=1e-5)
        assert found[f"{phase}/Accuracy"][3] == pytest.approx(right)
    here.run("predict", file)
    assert np.load(here.path("own-bert") / "predictions" / "predictions.npy") == pytest.approx(logits.numpy(), abs=1e-5)


def test_a_sharded_model_gives_the_same_losses_or_is_refused(here: Place) -> None:
    options = {"trainer.accumulate": 1, "trainer.max_epochs": 1}
    sharded = options | {"trainer.strategy": "fsdp", "trainer.fsdp": {"min_parameters": 10}}
    here.run(here.config("own-whole", **detector({"batch_size": 4}, **options)))
    here.run(here.config("own-sharded", **detector(**sharded)), ranks=2)
    close(figures(here.path("own-whole")), figures(here.path("own-sharded")))
    points = {"name": "Points", "batch_size": 4, "train": {"size": 8}}
    changes = DETECTOR | sharded | {"model": {"name": "Scored"}, "loaders": points}
    text = here.run(here.config("own-opaque", **changes), ranks=2, expect=2).text
    assert "model: Scored returns a Holder, in which the tensors of a sharded model are not found" in text


def test_a_test_needs_no_loss_where_there_are_metrics(here: Place) -> None:
    """A model that takes no target is called with the input alone, as while it was trained."""
    changes = {"loaders.test": {"size": 11, "seed": 1}, "trainer.max_epochs": 1}
    here.run(here.config("own-tested", **changes))
    (figure,) = figures(here.path("own-tested"))["val/Right"].values()
    text = here.run("test", here.config("own-tested", **changes, loss=None)).text
    assert f"Right {figure:.4f}" in text.partition(" test ")[2] and "loss" not in text.partition(" test ")[2]


def test_what_has_no_loss_is_refused_in_a_line(here: Place) -> None:
    text = here.run(here.config("own-none", loss=None), expect=2).stderr
    assert (
        "loss: missing, and the model cannot compute it: MLP.forward(x) does not take a list of 2, a whole batch"
        in text
    )
    assert "add a section such as loss: {name: CrossEntropyLoss}" in text and "Traceback" not in text
    text = here.run("check", here.config("own-unmeasured", **detector(metrics=None)), expect=2).stderr
    assert "trainer.monitor: the model computes no loss in eval mode" in text and "add metrics and monitor one" in text
    changes = detector({"predict": {"size": 1}}, **{"trainer.max_steps": 1})
    here.run(here.config("own-boxes", **changes))
    text = here.run("predict", here.config("own-boxes", **changes), expect=2).stderr
    assert "predictor: the model returned a list of 1, and what is written is one tensor per batch" in text
    assert text.rstrip().endswith("; a script can write them: dtrain.load_model")


def test_a_failed_step_is_replayed(here: Place) -> None:
    file = here.config("own-bad", **detector({"batch_size": 4, "bad": 3}))
    here.run(file, expect=1)
    text = here.run("replay", str(here.path("own-bad"))).text
    assert "rank 0, batch 1: loss nan, samples 0, 1, 2, 3" in text
    assert "first bad output: body.0 (Conv2d)" in text and "loss term classifier: nan" in text
