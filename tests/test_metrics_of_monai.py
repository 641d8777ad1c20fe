"""monai.metrics get what they document, made of logits and labels: the figures of MONAI's own steps, on any ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from whole_runs import Place, figures

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.distributed.ranks import Ranks
from dtrain.metrics import Metrics

monai = pytest.importorskip("monai.metrics", reason="needs: pip install monai", exc_type=ImportError)
CPU = torch.device("cpu")


def measured(metric: Any, output: Tensor, target: Tensor, **settings: Any) -> dict[str, float]:
    """The figures of a metric over batches of 4."""
    metrics = Metrics({"it": lambda: metric}, Ranks(0, 0, 1, CPU), CPU, {"it": settings})
    for number, first in enumerate(range(0, len(output), 4)):
        metrics.update(output[first : first + 4], target[first : first + 4], number, len(output[first : first + 4]))
    return metrics.compute()


def drawn(classes: int = 3, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(samples, classes, 6, 5, generator=generator)
    return output, torch.randint(max(classes, 2), (samples, 6, 5), generator=generator)


def dice_of(found: np.ndarray, truth: np.ndarray, classes: int, counts: np.ndarray | None = None) -> float:
    """The mean over classes, then samples, of 2 |A and B| / (|A| + |B|), without classes that a truth lacks."""
    scores = []
    for sample in range(len(found)):
        use = np.ones_like(truth[sample], dtype=bool) if counts is None else counts[sample]
        pairs = [((found[sample] == index)[use], (truth[sample] == index)[use]) for index in range(classes)]
        scores.append(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs if b.any()]))
    return float(np.mean(scores))


@pytest.mark.parametrize("with_channel", [True, False])
def test_dice_of_logits_and_labels_is_that_of_classes(with_channel: bool) -> None:
    output, label = drawn()
    expected = dice_of(output.argmax(1).numpy(), label.numpy(), 3)
    found = measured(monai.DiceMetric(), output, label[:, None] if with_channel else label)
    assert found["it"] == pytest.approx(expected, abs=1e-6)
    one_hot = torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    assert measured(monai.DiceMetric(), output, one_hot)["it"] == pytest.approx(expected, abs=1e-6)


def test_one_channel_is_a_mask_above_one_half() -> None:
    output, label = drawn(classes=1)
    found, truth = (output[:, 0] > 0).numpy(), label.numpy().astype(bool)
    expected = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(found, truth, strict=True)])
    assert measured(monai.DiceMetric(), output, label)["it"] == pytest.approx(expected, abs=1e-6)
    probabilities = output.sigmoid()
    assert measured(monai.DiceMetric(), probabilities, label, activation="none")["it"] == pytest.approx(expected)


def test_independent_channels_must_be_named_so() -> None:
    output, _ = drawn()
    target = (torch.rand(6, 3, 6, 5, generator=torch.Generator().manual_seed(1)) > 0.5).long()
    found, truth = (output > 0).numpy(), target.numpy().astype(bool)
    both = (found & truth).sum((2, 3))
    expected = float((2 * both / (found.sum((2, 3)) + truth.sum((2, 3)))).mean(1).mean())
    assert measured(monai.DiceMetric(), output, target, activation="sigmoid")["it"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"several classes, or of none; if its channels .* add activation: sigmoid"):
        measured(monai.DiceMetric(), output, target)


@pytest.mark.parametrize("ignore_index", [255, 0])
def test_voxels_that_are_ignored_do_not_count(ignore_index: int) -> None:
    output, label = drawn()
    label[:, 2:4] = ignore_index
    counts = (label != ignore_index).numpy()
    found = measured(monai.DiceMetric(ignore_index=ignore_index), output, label)
    assert found["it"] == pytest.approx(dice_of(output.argmax(1).numpy(), label.numpy(), 3, counts), abs=1e-6)


def test_a_label_that_is_no_class_is_refused() -> None:
    output, label = drawn()
    with pytest.raises(ValueError, match="the target has the label 255; expected 0 to 2"):
        measured(monai.DiceMetric(), output, torch.where(label == 1, 255, label))
    with pytest.raises(ValueError, match="the target has the label 255; expected 0 to 1"):
        measured(monai.DiceMetric(), output[:, :1], torch.where(label == 1, 255, 0))
    with pytest.raises(ValueError, match=r"the output has the shape \(4, 3, 6, 5\), the target \(4, 3, 5\)"):
        measured(monai.DiceMetric(), output, label[:, :3])


MASKS = {
    "DiceMetric": {"reduction": "mean_batch", "get_not_nans": True},
    "MeanIoU": {"include_background": False},
    "GeneralizedDiceScore": {},
    "ConfusionMatrixMetric": {"metric_name": ["sensitivity", "precision"]},
    "FBetaScore": {},
    "HausdorffDistanceMetric": {"percentile": 95},
    "SurfaceDistanceMetric": {},
    "SurfaceDiceMetric": {"class_thresholds": [1.0, 1.0, 1.0], "include_background": True},
    "AbsoluteVolumeDifferenceMetric": {},
}


@pytest.mark.parametrize("name", MASKS)
def test_every_metric_of_masks_gives_what_monais_own_steps_give(name: str) -> None:
    output, label = drawn()
    guess, truth = (torch.nn.functional.one_hot(item, 3).movedim(-1, 1).float() for item in (output.argmax(1), label))
    theirs = getattr(monai, name)(**MASKS[name] | ({"get_not_nans": False} if "get_not_nans" in MASKS[name] else {}))
    theirs(guess, truth)
    expected = theirs.aggregate()
    expected = torch.stack([torch.as_tensor(item) for item in expected]) if isinstance(expected, list) else expected
    found = measured(getattr(monai, name)(**MASKS[name]), output, label)
    values = expected.flatten().tolist()
    keys = MASKS[name].get("metric_name", range(len(values)))
    assert [found[f"it_{key}"] if len(values) > 1 else found["it"] for key in keys] == pytest.approx(values, abs=1e-6)


def test_scores_are_probabilities_and_images_are_taken_as_they_are() -> None:
    generator = torch.Generator().manual_seed(5)
    output, label = torch.randn(10, 3, generator=generator), torch.arange(10) % 3
    areas = []
    for index in range(3):
        chance, truth = output.softmax(1)[:, index], label == index
        pairs = [(float(p), float(n)) for p in chance[truth] for n in chance[~truth]]
        areas.append(np.mean([p > n for p, n in pairs]))
    assert measured(monai.ROCAUCMetric(), output, label)["it"] == pytest.approx(float(np.mean(areas)))
    single, truth = torch.randn(10, generator=generator), torch.arange(10) % 2
    pairs = [(float(p), float(n)) for p in single[truth == 1] for n in single[truth == 0]]
    assert measured(monai.ROCAUCMetric(), single, truth)["it"] == pytest.approx(np.mean([p > n for p, n in pairs]))
    image, other = torch.rand(6, 1, 8, 8, generator=generator), torch.rand(6, 8, 8, generator=generator)
    expected = float((image[:, 0] - other).abs().mean())
    assert measured(monai.MAEMetric(), image, other)["it"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="the output has the shape"):
        measured(monai.MAEMetric(), torch.cat([image, image], 1), other)


def test_what_dtrain_cannot_feed_is_refused() -> None:
    output, label = drawn()
    for metric in (monai.VarianceMetric(), monai.compute_dice):
        with pytest.raises(ConfigError, match=r"metrics.it: dtrain does not know what \w+ of monai.metrics wants"):
            measured(metric, output, label)


def test_the_activation_is_a_key_of_monais_metrics_alone() -> None:
    sections = {
        "model": {"name": "Linear", "in_features": 4, "out_features": 3},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "loaders": {"name": "TensorDataset", "train": {}, "val": {}},
        "trainer": {"max_epochs": 1, "mode": "max"},
    }
    check(from_mapping(sections | {"metrics": {"name": "DiceMetric", "activation": "sigmoid"}}))
    with pytest.raises(ConfigError, match="expected one of 'softmax', 'sigmoid', 'none'"):
        check(from_mapping(sections | {"metrics": {"name": "DiceMetric", "activation": "tanh"}}))
    with pytest.raises(ConfigError, match="unexpected argument 'activation'"):
        check(from_mapping(sections | {"metrics": {"name": "MeanSquaredError", "activation": "sigmoid"}}))


OWN = '''
import torch
from monai.metrics import DiceMetric
from torch import nn


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        grid = torch.arange(16).reshape(4, 4)
        return torch.tensor([float(index)]), (grid + index) % 3


class Own:
    """Somebody's own steps around MONAI's metric."""

    def __init__(self):
        self.dice = {"it": DiceMetric()}

    def reset(self):
        self.dice["it"].reset()

    def update(self, output, target):
        self.dice["it"](nn.functional.one_hot(output.argmax(1), 3).movedim(-1, 1), target[:, None])

    def compute(self):
        return self.dice["it"].aggregate()


class Guesses(nn.Module):
    """Logits whose largest one is right but in the first row of each second image; all of them are above 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, index):
        grid = torch.arange(16).reshape(4, 4)
        label = (grid + index.long()[:, :, None]) % 3
        label[:, 0] = (label[:, 0] + index.long() % 2) % 3
        return (1 + nn.functional.one_hot(label, 3).movedim(-1, 1)) * self.scale
'''


@pytest.mark.parametrize("ranks", [1, 2])
def test_dice_in_a_training(place: Place, ranks: int) -> None:
    place.write("monai_own.py", OWN)
    index, grid = np.arange(11)[:, None, None], np.arange(16).reshape(4, 4)
    truth = (grid + index) % 3
    guess = truth.copy()
    guess[:, 0] = (guess[:, 0] + np.arange(11)[:, None] % 2) % 3
    config = place.config(
        f"monai-{ranks}", modules=["monai_own"], model={"name": "Guesses"}, metrics={"name": ["DiceMetric", "Own"]},
        loaders={"name": "Scenes", "batch_size": 4, "train": {}, "val": {}},
        **{"optimizer.lr": 0.0, "trainer.mode": "max", "trainer.max_epochs": 1, "trainer.pictures": False},
    )  # fmt: skip
    place.run(config, ranks=ranks)
    found = figures(place.path(f"monai-{ranks}"))
    (value,) = set(found["val/DiceMetric"].values())
    assert value == pytest.approx(dice_of(guess, truth, 3), abs=1e-6)
    assert found["val/Own"] == pytest.approx(found["val/DiceMetric"])
    assert not math.isclose(value, 0.5, abs_tol=0.1)
