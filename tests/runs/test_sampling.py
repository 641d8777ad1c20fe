"""Trainings with samplers: the same losses on any number of ranks, and the same weights after a stop in the middle."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_runs import Place, close, figures, same_training

pytestmark = pytest.mark.timeout(600)

MODULE = '''
"""A user's own: a sampler that draws from NumPy's generator, a sampler without a length, a dataset with epochs."""
import numpy as np
import torch
from toy import Points

class Some:                                            # its own generator, too, and the dataset by its name
    def __init__(self, dataset, share=0.5):
        self.size, self.share, self.rng = len(dataset), share, np.random.default_rng()
    def __iter__(self):
        yield from np.random.permutation(self.size)[: int(self.share * self.size)]
        yield from self.rng.integers(0, self.size, 5)

class Pairs:                                           # a batch sampler that gives more batches in each epoch
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __iter__(self):
        return iter([[2 * number, 2 * number + 1, number] for number in torch.randperm(9 + self.epoch).tolist()])

def lengths_of(dataset):
    return [1 + index % 9 for index in range(len(dataset))]

def kept(samples):                                     # leaves some out, and says how many it kept
    x, y = (torch.stack(each) for each in zip(*samples))
    there = x[:, 0] > -0.8
    return {"x": x[there], "y": y[there], "kept_samples": int(there.sum())} if there.any() else None

class Broken:
    def __iter__(self):
        yield nothing

class Curriculum(Points):                              # samples get noisier from epoch to epoch
    epoch = None
    def set_epoch(self, epoch):
        self.noise, self.random, self.epoch = 0.1 * epoch, True, epoch
    def __getitem__(self, index):
        assert self.epoch is not None
        return super().__getitem__(index)
'''
BUCKETS = {"name": "LengthBuckets", "by": {"name": "lengths_of"}, "batch_size": 3}
KINDS: dict[str, dict[str, Any]] = {
    "balanced": {"loaders.train.sampler": {"name": "Balanced", "by": "y"}, "loaders.num_workers": 2},
    "endless": {"loaders.train.sampler": {"name": "Some", "share": 0.7}, "trainer.steps_per_epoch": 4},
    "buckets": {"loaders.train.batch_sampler": BUCKETS, "loaders.train.collate_fn": {"name": "kept"}},
    "pairs": {"loaders.train.batch_sampler": {"name": "Pairs"}, "loaders.name": "Curriculum", "loaders.num_workers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def sampled(place: Place) -> Place:
    place.write("sampling.py", MODULE)
    return place


def config(place: Place, name: str, kind: str, ranks: int = 1) -> str:
    of_batches = kind in ("buckets", "pairs")  # which are one rank's: as many per step on any number of ranks
    return place.config(
        name,
        **{
            "modules": ["toy", "sampling"], "loaders.batch_size": 4 // ranks, "model.norm": False,
            "trainer.accumulate": 4 // ranks if of_batches else 1, "trainer.pictures": False,
            "loaders.train.noise": 0.1, "loaders.val.noise": 0.0, **KINDS[kind],
        },
    )  # fmt: skip


def undisturbed(place: Place, kind: str) -> Path:
    place.once(f"sampled-{kind}", lambda: place.run(config(place, f"sampled-{kind}", kind)).rc)
    return place.path(f"sampled-{kind}")


@pytest.mark.parametrize(("kind", "ranks"), [("balanced", 2), ("balanced", 4), ("buckets", 2), ("endless", 2)])
def test_the_losses_are_those_of_one_rank(kind: str, ranks: int, sampled: Place) -> None:
    name = f"sampled-{kind}-{ranks}"
    sampled.run(config(sampled, name, kind, ranks), ranks=ranks)
    one = figures(undisturbed(sampled, kind))
    close(one, figures(sampled.path(name)))
    assert len(one["train/loss"]) == {"balanced": 16, "buckets": 6, "endless": 8}[kind]
    assert (max(one.get("left_out_samples", {0: 0}).values()) > 0) == (kind == "buckets")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_training_that_was_stopped_in_an_epoch_has_the_same_weights(kind: str, sampled: Place) -> None:
    name, micro = f"stopped-{kind}", 4 if kind in ("buckets", "pairs") else 1
    file = config(sampled, name, kind)
    sampled.run(file, do=f"train {micro + 1} rank 0 TERM", expect=75)
    sampled.run(file)
    same_training(sampled.path(name), undisturbed(sampled, kind))
    assert figures(sampled.path(name)) == figures(undisturbed(sampled, kind))


def test_two_ranks_resume_in_an_epoch_of_batches(sampled: Place) -> None:
    files = [config(sampled, f"pairs-of-two-{number}", "pairs", 2) for number in (1, 2)]
    sampled.run(files[0], ranks=2)
    sampled.run(files[1], ranks=2, do="train 3 rank 1 TERM", expect=75)
    sampled.run(files[1], ranks=2)
    same_training(sampled.path("pairs-of-two-1"), sampled.path("pairs-of-two-2"))
    close(figures(sampled.path("pairs-of-two-1")), figures(undisturbed(sampled, "pairs")))


def test_the_samples_that_a_balanced_training_reads_are_of_all_classes_alike(sampled: Place, tmp_path: Path) -> None:
    sampled.run(
        config(sampled, "balanced-seen", "balanced"), "loaders.num_workers=0", "loaders.val=null",
        "metrics=null", "trainer.max_epochs=3", env={"TOY_SEEN": str(tmp_path)},
    )  # fmt: skip
    seen = [int(line) for file in tmp_path.iterdir() for line in file.read_text().split()]
    from toy import Points

    classes = Counter(Points(29).y.numpy()[np.array(seen)].tolist())
    assert sum(classes.values()) == 3 * 29 and max(classes.values()) - min(classes.values()) <= 3


def test_config_and_check_say_which_sampler(sampled: Place) -> None:
    file = config(sampled, "said", "balanced")
    assert "# loaders.train.sampler: dtrain.components.samplers.balanced.Balanced" in sampled.run("config", file).stdout
    text = sampled.run("check", file).text
    assert "sampled by Balanced by y (3 classes of " in text and "29 samples an epoch" in text
    text = sampled.run("check", config(sampled, "said-buckets", "buckets")).text
    assert "sampled by LengthBuckets (2 buckets of lengths 1 to 9" in text and "10 batches of 29 samples" in text


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("config", ["loaders.shuffle=true"], "loaders.shuffle: cannot be combined with 'sampler'"),
        ("config", ["loaders.val.sampler={name: Balanced}"], "loaders.val.sampler: is for loaders.train alone"),
        ("check", ["loaders.train.sampler.by=z"], "Points has no attribute or method 'z'"),
        ("config", ["loaders.train.sampler={name: Weigthed}"], "there is no 'Weigthed'; did you mean 'Weighted'?"),
        ("config", ["loaders.train.sampler={name: SubsetRandomSampler}"], "missing required argument 'indices'"),
        ("check", ["loaders.train.sampler={name: SubsetRandomSampler, indices: [29]}"], "gave the index 29"),
        ("config", ["loaders.train.sampler={name: DistributedSampler}"], "DistributedSampler is not needed"),
        ("check", ["loaders.train.sampler={name: Broken}"], "NameError: name 'nothing' is not defined"),
        ("config", ["loaders.train.batch_sampler={name: LengthBuckets, batch_size: 3}", "loaders.train.batch_size=3",
                    "loaders.train.sampler=null"], "loaders.train.batch_size: cannot be combined with 'batch_sampler'"),
        ("config", ["loaders.train.batch_sampler={name: LengthBuckets, batch_size: 3}"], "combined with 'sampler'"),
        ("config", ["trainer.steps_per_epoch=0"], "trainer.steps_per_epoch: must be at least 1, found 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_a_line(command: str, arguments: list[str], text: str, sampled: Place) -> None:
    result = sampled.run(command, config(sampled, "wrong-sampler", "balanced"), *arguments, expect=2)
    assert text in result.stderr and "Traceback" not in result.text


def test_other_samplers_do_not_continue_a_training(sampled: Place) -> None:
    sampled.run(config(sampled, "sampled-again", "balanced"), "trainer.max_epochs=1")
    arguments = ["loaders.train.sampler.num_samples=8", "trainer.steps_per_epoch=3"]
    result = sampled.run(config(sampled, "sampled-again", "balanced"), *arguments, expect=2)
    assert "loaders.train.sampler.num_samples: null -> 8" in result.stderr
    assert "trainer.steps_per_epoch: null -> 3" in result.stderr and "other settings" in result.stderr
