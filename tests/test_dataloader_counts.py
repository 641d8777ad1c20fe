"""What figures and gradients weigh by: how many samples a batch has, whatever form it has and whatever was left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_runs import Place, figures, last

pytestmark = pytest.mark.timeout(600)

MODULE = '''
"""Batches of every form, whose samples have the losses 0 to 9; and what leaves some of them out."""
from collections import namedtuple
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset, default_collate

class Ten(Dataset):
    def __init__(self, size=10, broken=()):
        self.size, self.broken = size, broken
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        return None if index in self.broken else torch.tensor([float(index)])

class Graphs:
    def __init__(self, x, graph):
        self.x, self.graph = x, graph
    def to(self, device):
        return Graphs(self.x.to(device), self.graph.to(device))

def listed(samples):                                   # a tensor per sample, of different lengths
    return [[x.repeat(3 + int(x)) for x in samples], torch.stack(samples)]
def time_first(samples):                               # (T, N, 1)
    return [torch.stack(samples).repeat(7, 1, 1), torch.stack(samples)]
def packed(samples):
    return [pack_sequence([x[None].repeat(3, 1) for x in samples]), torch.stack(samples)]
def graphs(samples):                                   # three nodes a graph
    return [Graphs(torch.cat([x.repeat(3) for x in samples]), torch.arange(len(samples)).repeat_interleave(3)),
            torch.stack(samples)]
def shared(samples):                                   # a first entry that all samples share
    return {"grid": torch.zeros(7), "values": torch.stack(samples), "label": torch.stack(samples)}

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
    def forward(self, *args, **named):
        x = named["values"] if named else args if len(args) > 1 else args[0]
        if isinstance(x, (list, tuple)) and not hasattr(x, "batch_sizes"):
            x = torch.stack([item.mean() for item in x])
        elif hasattr(x, "graph"):
            x = x.x
        elif hasattr(x, "batch_sizes"):
            x = pad_packed_sequence(x)[0]
        return x + 0 * self.weight

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
    def forward(self, images, targets=None):           # as torchvision's: a list of images
        assert targets is None
        return torch.stack([image.mean() for image in images]) + 0 * self.weight

def mean_of(output, target):
    return output.mean()

class MeanOf(nn.Module):
    def forward(self, output, target):
        return output.mean()

LEFT_OUT = (1, 3, 4, 5, 6, 7)
Batch = namedtuple("Batch", "x y kept_samples")
class Pair(tuple):
    pass

def kept(samples):
    return [x for x in samples if int(x) not in LEFT_OUT]
def pair(samples):
    x = torch.stack(samples)
    return x + 1, 2 * x
def as_none(samples):
    return pair(kept(samples)) if len(kept(samples)) == len(samples) else as_tuple(samples) if kept(samples) else None
def as_tuple(samples):
    batch = Pair(pair(kept(samples) or samples))
    batch.kept_samples = len(kept(samples))
    return batch
def as_named(samples):
    return Batch(*pair(kept(samples) or samples), len(kept(samples)))
def as_dict(samples):
    x, y = pair(kept(samples) or samples)
    return {"x": x, "y": y, "kept_samples": len(kept(samples))}
def filtered(samples):                                 # says nothing
    there = [x for x in samples if x is not None]
    return pair(there) if there else None
def nothing(samples):
    return None

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, 0.5)
    def forward(self, x):
        return self.linear(x)
'''


@pytest.fixture(scope="module")
def written(place: Place) -> Place:
    place.write("counted.py", MODULE)
    return place


def config(place: Place, name: str, **changes: Any) -> str:
    settings = {
        "modules": ["counted"], "model": {"name": "Reads"}, "loss.name": "MeanOf", "metrics": {"name": "mean_of"},
        "loaders": {"name": "Ten", "batch_size": 4, "shuffle": False, "train": {}, "val": {}},
        "trainer.pictures": False, "trainer.max_epochs": 1, "trainer.mode": "min", **changes,
    }  # fmt: skip
    return place.config(name, **settings)


@pytest.mark.parametrize(
    ("form", "ranks"),
    [("listed", 1), ("time_first", 1), ("packed", 1), ("graphs", 1), ("shared", 1), ("time_first", 2)],
)
def test_the_loss_of_ten_samples_is_their_mean_whatever_form_a_batch_has(form: str, ranks: int, written: Place) -> None:
    name = f"form-{form}-{ranks}"
    written.run(config(written, name, **{"loaders.collate_fn": {"name": form}, "loaders.test": {}}), ranks=ranks)
    found = figures(written.path(name))
    for figure in ("val/loss", "val/mean_of", "test/loss", "test/mean_of"):
        assert list(found[figure].values()) == [pytest.approx(4.5)], figure


def test_a_list_of_two_samples_is_not_spread_over_a_models_arguments(written: Place) -> None:
    changes = {"loaders.collate_fn": {"name": "listed"}, "loaders.batch_size": 2, "model.name": "Detector"}
    written.run(config(written, "detector", **changes))
    assert list(figures(written.path("detector"))["val/loss"].values()) == [pytest.approx(4.5)]


# Of the samples 0 to 9, with 1 and 3 to 7 left out: batches of {0, 2}, of nothing, and of {8, 9}.


def trained(steps: list[list[int]], rate: float = 0.01) -> tuple[float, list[float]]:
    """The weight of y = w x after gradient steps on the samples (i + 1, 2 i), and the loss of each step."""
    weight, losses = 0.5, []
    for samples in steps:
        x, y = np.array(samples) + 1.0, 2.0 * np.array(samples)
        losses.append(loss_of(weight, samples))
        weight -= rate * float((2 * (weight * x - y) * x).mean())
    return weight, losses


WAYS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "none-1": ("as_none", 1, {"loaders.batch_size": 4}),
    "none-2": ("as_none", 2, {"loaders.batch_size": 2, "loaders.num_workers": 1}),
    "tuple-2": ("as_tuple", 2, {"loaders.batch_size": 2}),
    "named-1": ("as_named", 1, {"loaders.batch_size": 4, "loaders.num_workers": 2}),
    "dict-1": ("as_dict", 1, {"loaders.batch_size": 4}),
    "items-1": ("filtered", 1, {"loaders.batch_size": 4, "loaders.broken": [1, 3, 4, 5, 6, 7]}),
    "fsdp-2": ("as_none", 2, {"loaders.batch_size": 2, "trainer.strategy": "fsdp"}),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_a_collate_fn_leaves_out_counts_nowhere(name: str, written: Place) -> None:
    collate_fn, ranks, changes = WAYS[name]
    changes = {"loaders.collate_fn": {"name": collate_fn}, "model.name": "Line", "loss.name": "MSELoss", **changes}
    written.run(config(written, name, **changes, **{"optimizer.lr": 0.01}), ranks=ranks)
    weight, losses = trained([[0, 2], [8, 9]])
    found, run = figures(written.path(name)), written.path(name)
    assert last(run).weights["linear.weight"].item() == pytest.approx(weight, rel=1e-5)
    assert found["train/loss"] == {1: pytest.approx(losses[0]), 3: pytest.approx(losses[1], rel=1e-5)}
    assert found["val/loss"] == {3: pytest.approx(loss_of(weight, [0, 2, 8, 9]), rel=1e-5)}
    assert found["val/left_out_samples"] == {3: 6.0}
    assert found["left_out_samples"] == {1: 2.0, 3: 6.0}
    assert found["skipped_batches"] == ({1: 0.0, 3: 1.0} if ranks == 1 else {1: 1.0, 3: 3.0})
    log = (run / "logs" / "rank-0.log").read_text()
    assert "collate_fn left out 2 of the 4 samples of step 1" in log
    if ranks == 1:
        assert "left out 4 of the 4 samples of step 2, all those of 1 batch(es), which are skipped: the weights" in log


def loss_of(weight: float, samples: list[int]) -> float:
    x, y = np.array(samples) + 1.0, 2.0 * np.array(samples)
    return float(((weight * x - y) ** 2).mean())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_several_batches_is_the_mean_of_what_is_left_of_them(ranks: int, written: Place) -> None:
    """The first step's last batch is empty on every rank: its gradients are still to be exchanged."""
    name = f"accumulated-{ranks}"
    changes = {
        "loaders.collate_fn": {"name": "as_none"},
        "model.name": "Line",
        "loss.name": "MSELoss",
        "optimizer.lr": 0.01,
    }
    changes |= {"loaders.batch_size": 4 // ranks, "trainer.accumulate": 2}
    written.run(config(written, name, **changes), ranks=ranks)
    weight, losses = trained([[0, 2], [8, 9]])
    found = figures(written.path(name))
    assert last(written.path(name)).weights["linear.weight"].item() == pytest.approx(weight, rel=1e-5)
    assert list(found["train/loss"].values()) == pytest.approx(losses, rel=1e-5)


def test_a_set_of_which_nothing_is_left_is_an_error_that_says_so(written: Place) -> None:
    changes = {"loaders.val.collate_fn": {"name": "nothing"}, "model.name": "Line", "loss.name": "MSELoss"}
    path = config(written, "empty", **changes, **{"loaders.collate_fn": {"name": "as_dict"}})
    result = written.run(path, expect=1)
    assert "there is no sample to evaluate: collate_fn left out all of them" in result.text


@pytest.mark.parametrize("command", ["train", "check"])
def test_an_epoch_of_which_nothing_is_left_is_an_error_that_says_so(command: str, written: Place) -> None:
    changes = {"model.name": "Line", "loss.name": "MSELoss", "loaders.collate_fn": {"name": "nothing"}}
    result = written.run(command, config(written, f"nothing-{command}", **changes), expect=1)
    assert "collate_fn left out all samples of the epoch" in result.text


def test_a_prediction_has_a_row_for_each_sample_or_says_why_not(written: Place, tmp_path: Path) -> None:
    changes = {"model.name": "Line", "loss.name": "MSELoss", "loaders.test": {}}
    path = config(written, "rows", **changes, **{"loaders.collate_fn": {"name": "as_dict"}})
    written.run(path)
    result = written.run("predict", path, expect=1)
    assert "collate_fn left out 2 of the samples [0, 1, 2, 3], and a prediction has one row for each" in result.text


def test_a_dataset_that_gives_fewer_samples_than_asked_for_is_an_error() -> None:
    from test_dataloader import Numbers, loader

    class Fewer(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return indices[1:]

    with pytest.raises(ValueError, match="gave 3 samples for 4 indices; a collate_fn may leave samples out"):
        list(loader(dataset=Fewer(8)).epoch(0))


@pytest.mark.parametrize("said", [-1, 5, 2.5])
def test_a_count_that_cannot_be_is_an_error(said: Any) -> None:
    from dtrain.data.batch import kept_samples

    with pytest.raises(ValueError, match=f"kept_samples of a batch is {said}; possible: 0 to 4"):
        kept_samples({"kept_samples": said}, [0, 1, 2, 3], 4)
