"""The metrics of classes and of continuous values: definitions, absent classes, batches, ranks, other libraries."""

import json
import math
import multiprocessing
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics as tm
import torchmetrics.image
import torchmetrics.segmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.components.losses.dice import DiceLoss
from dtrain.components.metrics import Precision
from dtrain.components.metrics import pytorch3dunet as moved
from dtrain.components.metrics.instances import (
    AdaptedRandError,
    AveragePrecision,
    BoundaryAdaptedRandError,
    BoundaryAveragePrecision,
)
from dtrain.components.metrics.overlap import (
    DSC,
    PPV,
    SEN,
    BinaryIoU,
    DiceCoefficient,
    MacroPrecision,
    MeanIoU,
    PixelAccuracy,
)
from dtrain.components.metrics.regression import MSE, PSNR
from dtrain.config.check import notes
from dtrain.config.load import from_mapping
from dtrain.distributed.ranks import Ranks
from dtrain.metrics import Metrics, get_evaluation_metric

CPU = torch.device("cpu")
SIZES = {"classification": (), "2-D": (5, 6), "3-D": (3, 4, 5)}
IGNORED = 255
nan = math.nan


@pytest.fixture(scope="module")
def published() -> types.ModuleType:
    """pytorch-3dunet's own metrics, if the package and what it imports are installed."""
    return pytest.importorskip(
        "pytorch3dunet.unet3d.metrics",
        reason="needs: pip install --no-deps pytorch3dunet; pip install scikit-image h5py tqdm",
        exc_type=ImportError,
    )


@pytest.fixture(scope="module")
def monai() -> types.ModuleType:
    return pytest.importorskip("monai.metrics", reason="needs: pip install monai", exc_type=ImportError)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=list(SIZES))
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SIZES[request.param]


def logits(size: tuple[int, ...] = (5, 6), channels: int = 3, samples: int = 4) -> Tensor:
    return torch.randn(samples, channels, *size) * 2


def labels(size: tuple[int, ...] = (5, 6), channels: int = 3, samples: int = 4) -> Tensor:
    drawn = torch.randint(0, channels, (samples, *size))
    return drawn if size else torch.arange(samples) % channels


def one_hot(label: Tensor, channels: int = 3) -> Tensor:
    return torch.stack([(label == channel).float() for channel in range(channels)], dim=1)


def sure(label: Tensor, channels: int = 3) -> Tensor:
    """Logits that say these classes; of two classes as one channel."""
    return one_hot(label, channels) * 20 - 10 if channels > 1 else label.float().unsqueeze(1) * 20 - 10


def value(metric: tm.Metric, output: Any, target: Any) -> Any:
    """Of one batch."""
    metric.reset()
    metric.update(output, target)
    return metric.compute().tolist()


def in_batches(metric: tm.Metric, output: Tensor, target: Tensor, sizes: tuple[int, ...] = (1, 2, 1)) -> Any:
    metric.reset()
    for part, of_target in zip(output.split(sizes), target.split(sizes), strict=True):
        metric.update(part, of_target)
    return metric.compute().tolist()


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


def sets(found: Tensor, label: Tensor, channel: int) -> tuple[int, int, int]:
    """B, P and T of a class, counted in Python."""
    pairs = list(zip(found.flatten().tolist(), label.flatten().tolist(), strict=True))
    pairs = [pair for pair in pairs if pair[1] != IGNORED]
    both = sum(pair == (channel, channel) for pair in pairs)
    return both, sum(pair[0] == channel for pair in pairs), sum(pair[1] == channel for pair in pairs)


def mean_of(values: list[float]) -> float:
    there = [item for item in values if not math.isnan(item)]
    return sum(there) / len(there) if there else nan


def ratio(one: float, other: float) -> float:
    return one / other if other else nan


# ------------------------------------------------------------------------------------------------- by hand

FOUND = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [0, 1, 1]]])
LABEL = torch.tensor([[[0, 1, 1], [1, 2, 0]], [[0, 0, 0], [0, 0, 1]]])
# B, P, T of the set: class 0: 5, 6, 7; class 1: 3, 4, 4; class 2: 1, 2, 1. Of sample 0: 1 2 2, 2 2 3, 1 2 1; of sample
# 1: 4 4 5, 1 2 1, and no class 2.


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (MeanIoU(), (5 / 8 + 3 / 5 + 1 / 2) / 3),
        (MeanIoU(per_class=True), [5 / 8, 3 / 5, 1 / 2]),
        (MeanIoU(include_background=False), (3 / 5 + 1 / 2) / 2),
        (MeanIoU(skip_background=True, per_class=True), [nan, 3 / 5, 1 / 2]),
        (MeanIoU(aggregation="sample"), ((1 / 3 + 2 / 3 + 1 / 2) / 3 + (4 / 5 + 1 / 2) / 2) / 2),
        (MeanIoU(aggregation="sample", per_class=True), [(1 / 3 + 4 / 5) / 2, (2 / 3 + 1 / 2) / 2, 1 / 2]),
        (DiceCoefficient(soft=False), (10 / 13 + 6 / 8 + 2 / 3) / 3),
        (DiceCoefficient(soft=False, aggregation="sample"), ((2 / 4 + 4 / 5 + 2 / 3) / 3 + (8 / 9 + 2 / 3) / 2) / 2),
        (DiceCoefficient(per_class=True), [10 / 13, 6 / 8, 2 / 3]),
        (MacroPrecision(), (5 / 6 + 3 / 4 + 1 / 2) / 3),
        (MacroPrecision(include_background=False, per_class=True), [nan, 3 / 4, 1 / 2]),
        (PixelAccuracy(), 9 / 12),
        (DSC(smooth=0), (6 / 8 + 2 / 3) / 2),
        (DSC(), ((6 + 1e-5) / (8 + 1e-5) + (2 + 1e-5) / (3 + 1e-5)) / 2),
        (SEN(), (4 / 5 + 2 / 2) / 2),
        (SEN(smooth=0, per_class=True), [nan, 3 / 4, 1]),
        (PPV(), (4 / 5 + 2 / 3) / 2),
    ],
)
def test_by_hand(metric: tm.Metric, expected: Any) -> None:
    close(value(metric, sure(FOUND), LABEL), expected, 1e-4 if isinstance(metric, DiceCoefficient) else 1e-6)
    close(in_batches(metric, sure(FOUND), LABEL, (1, 1)), expected, 1e-4)


def test_one_channel_is_the_foreground_unless_two_classes_are_asked_for() -> None:
    found, label = FOUND.clamp(max=1), LABEL.clamp(max=1)  # foreground: B 5, P 6, T 5; background: B 5, P 6, T 7
    of_one, of_two = sure(found, 1), sure(found, 2)
    for metric in (MeanIoU(), MeanIoU(1), MeanIoU(include_background=False), MeanIoU(2, False), BinaryIoU()):
        close(value(metric, of_one, label), sets(found, label, 1)[0] / 7)
    assert sets(found, label, 1) == (4, 6, 5) and sets(found, label, 0) == (5, 6, 7)
    close(value(MeanIoU(2, per_class=True), of_one, label), [5 / 8, 4 / 7])
    close(value(MeanIoU(per_class=True), of_two, label), [5 / 8, 4 / 7])
    close(value(BinaryIoU(), of_two, label), 4 / 7)
    close(value(PixelAccuracy(), of_one, label), 9 / 12)
    close(value(DSC(smooth=0), of_one, label), 8 / 11)
    close(value(DiceCoefficient(soft=False, num_classes=2, per_class=True), of_one, label), [10 / 13, 8 / 11])


def test_the_foreground_of_two_channels_is_compared_with_the_threshold() -> None:
    output, label = logits(channels=2), labels(channels=2)
    found = output.softmax(1)[:, 1] > 0.3
    both, of_found, there = sets(found.long(), label, 1)
    close(value(BinaryIoU(0.3), output, label), both / (of_found + there - both))
    close(value(BinaryIoU(0.3), output, one_hot(label, 2)), both / (of_found + there - both))
    close(value(BinaryIoU(0.3, activation="none"), output.softmax(1), label), both / (of_found + there - both))


def test_independent_channels_are_counted_each_above_the_threshold() -> None:
    output, target = logits(channels=3), (torch.rand(4, 3, 5, 6) > 0.6).float()
    found = output.sigmoid() > 0.4
    expected = []
    for channel in range(3):
        a, b = found[:, channel], target[:, channel] > 0
        expected.append(float((a & b).sum() / (a | b).sum()))
    close(value(MeanIoU(activation="sigmoid", threshold=0.4, per_class=True), output, target), expected)
    part = target.where(torch.rand(target.shape) > 0.2, -1)
    a, b = found[:, 1] & (part[:, 1] >= 0), part[:, 1] > 0
    metric = MeanIoU(activation="sigmoid", threshold=0.4, per_class=True, ignore_index=-1)
    close(value(metric, output, part)[1], float((a & b).sum() / (a | b).sum()))


# ------------------------------------------------------------------------------------------------- definitions


def naive(found: Tensor, label: Tensor, score: Callable[[int, int, int], float], sample: bool, first: int) -> float:
    if sample:
        return mean_of([naive(a, b, score, False, first) for a, b in zip(found, label, strict=True)])
    return mean_of([score(*sets(found, label, channel)) for channel in range(first, 3)])


DEFINITIONS: dict[str, tuple[Callable[..., tm.Metric], Callable[[int, int, int], float]]] = {
    "MeanIoU": (MeanIoU, lambda both, found, there: ratio(both, found + there - both)),
    "Dice": (lambda **keys: DiceCoefficient(False, **keys), lambda both, found, there: ratio(2 * both, found + there)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("aggregation", ["global", "sample"])
@pytest.mark.parametrize("background", [True, False])
def test_overlaps_follow_their_definition(size, name, aggregation, background):
    make, score = DEFINITIONS[name]
    output, label = logits(size), labels(size)
    label = label.where(torch.rand(label.shape) > 0.2, IGNORED)
    metric = make(aggregation=aggregation, include_background=background, ignore_index=IGNORED)
    expected = naive(output.argmax(1), label, score, aggregation == "sample", 0 if background else 1)
    close(value(metric, output, label), expected)
    close(in_batches(metric, output, label), expected)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_labels_in_any_batches_follow_the_definition(data: st.DataObject) -> None:
    samples, voxels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    drawn = st.lists(st.integers(0, 2), min_size=samples * voxels, max_size=samples * voxels)
    found, label = (torch.tensor(data.draw(drawn)).view(samples, voxels) for _ in range(2))
    cut = data.draw(st.integers(0, samples - 1))
    sizes = (cut, samples - cut) if cut else (samples,)
    for aggregation in ("global", "sample"):
        for make, score in DEFINITIONS.values():
            metric = make(aggregation=aggregation)
            expected = naive(found, label, score, aggregation == "sample", 0)
            close(in_batches(metric, sure(found), label, sizes), expected)


def test_soft_dice_is_one_minus_the_loss_and_of_the_probabilities(size):
    output, label = logits(size, samples=6), labels(size, samples=6)
    expected = 1 - float(DiceLoss(normalization="softmax")(output, label))
    close(value(DiceCoefficient(), output, label), expected, 1e-5)
    close(in_batches(DiceCoefficient(), output, label, (1, 3, 2)), expected, 1e-5)
    close(value(DiceCoefficient(activation="none"), output.softmax(1), label), expected, 1e-5)
    part = label.where(torch.arange(label.numel()).view(label.shape) % 5 > 0, IGNORED)
    expected = 1 - float(DiceLoss(normalization="softmax", ignore_index=IGNORED)(output, part))
    close(value(DiceCoefficient(ignore_index=IGNORED), output, part), expected, 1e-5)
    one, target = output[:, :1], (label > 0).float()
    close(value(DiceCoefficient(), one, target), 1 - float(DiceLoss()(one, target)), 1e-5)


def test_targets_of_every_shape_give_the_same(size):
    output, label = logits(size), labels(size)
    for metric in (MeanIoU(), DiceCoefficient(), DiceCoefficient(False), MacroPrecision(), PixelAccuracy(), DSC()):
        expected = value(metric, output, label)
        for target in (label.unsqueeze(1), label.to(torch.uint8), one_hot(label), one_hot(label).long(), (label, 3)):
            close(value(metric, output, target), expected)
        close(value(metric, [output, output * 0], label), expected)


def test_ignored_voxels_of_every_shape_give_the_same(size):
    output, label = logits(size), labels(size)
    void = torch.arange(label.numel()).view(label.shape) % 3 == 0
    channels = one_hot(label).where(~void.unsqueeze(1), IGNORED)
    for make in (MeanIoU, MacroPrecision, PixelAccuracy, DSC):
        metric = make(ignore_index=IGNORED)
        expected = value(metric, output, label.where(~void, IGNORED))
        assert expected != pytest.approx(value(make(), output, label))
        close(value(metric, output, channels), expected)
        close(value(metric, output, channels.long()), expected)
    binary = (label > 0).long()
    found = (output[:, 0] > 0)[~void].long()
    both, of_found, there = sets(found, binary[~void], 1)
    metric = BinaryIoU(ignore_index=IGNORED)
    close(value(metric, output[:, :1], binary.where(~void, IGNORED)), both / (of_found + there - both))


def test_a_class_may_be_the_one_that_is_ignored() -> None:
    close(value(PixelAccuracy(ignore_index=0), sure(FOUND), LABEL), 4 / 5)
    close(value(MeanIoU(ignore_index=0, per_class=True), sure(FOUND), LABEL), [0, 3 / 4, 1])
    close(value(MeanIoU(ignore_index=0, per_class=True), sure(FOUND), one_hot(LABEL)), [0, 3 / 4, 1])


def test_pixel_accuracy_looks_along_its_dimension() -> None:
    output, label = logits((7,), channels=4), labels((7,), channels=4)
    expected = float((output.argmax(1) == label).float().mean())
    close(value(PixelAccuracy(), output, label), expected)
    close(value(PixelAccuracy(dim=-1), output.movedim(1, -1), label), expected)
    close(value(PixelAccuracy(dim=2), output.movedim(1, 2), one_hot(label, 4).movedim(1, 2)), expected)


# ------------------------------------------------------------------------------------------------- absent classes


def test_a_class_that_is_nowhere_is_left_out() -> None:
    found, label = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 0, 0]])
    output = sure(found, 4)
    close(value(MeanIoU(per_class=True), output, label), [2 / 3, 1 / 2, nan, nan])
    close(value(MeanIoU(), output, label), (2 / 3 + 1 / 2) / 2)
    close(value(DiceCoefficient(False, per_class=True), output, label), [4 / 5, 2 / 3, nan, nan])
    close(value(DiceCoefficient(per_class=True), output, label), [4 / 5, 2 / 3, nan, nan], 1e-4)
    close(value(MacroPrecision(), output, label), (2 / 2 + 1 / 2) / 2)


def test_who_is_left_out_where_target_and_prediction_differ() -> None:
    output, label = sure(torch.tensor([[1, 1, 0, 0]])), torch.tensor([[1, 2, 0, 0]])  # 2 is never predicted
    close(value(MeanIoU(per_class=True), output, label), [1, 1 / 2, 0])
    close(value(MacroPrecision(per_class=True), output, label), [1, 1 / 2, 0])
    close(value(PPV(smooth=0, per_class=True), output, label), [nan, 1 / 2, nan])
    close(value(SEN(smooth=0, per_class=True), output, label), [nan, 1, 0])
    close(value(DSC(smooth=0, per_class=True), output, label), [nan, 2 / 3, 0])
    output, label = sure(torch.tensor([[1, 2, 0, 0]])), torch.tensor([[1, 1, 0, 0]])  # 2 is only predicted
    close(value(MeanIoU(per_class=True), output, label), [1, 1 / 2, 0])
    close(value(DSC(smooth=0, per_class=True), output, label), [nan, 2 / 3, nan])
    close(value(SEN(smooth=0, per_class=True), output, label), [nan, 1 / 2, nan])
    close(value(PPV(smooth=0, per_class=True), output, label), [nan, 1, 0])


def test_where_there_is_nothing_to_measure_there_is_no_number() -> None:
    output, nothing = sure(torch.zeros(2, 6).long()), torch.zeros(2, 6).long()
    for metric in (MeanIoU(skip_background=True), DSC(), SEN(), PPV()):
        assert math.isnan(value(metric, output, nothing))
    for metric in (BinaryIoU(), DiceCoefficient(), DiceCoefficient(False)):
        assert math.isnan(value(metric, sure(nothing, 1), nothing))
    assert math.isnan(value(PixelAccuracy(ignore_index=0), output, nothing))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_before_any_batch_there_is_no_number() -> None:
    for makers in KINDS.values():
        for make in makers.values():
            assert math.isnan(make().compute())


def test_a_sample_without_anything_to_measure_is_left_out() -> None:
    found, label = torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[1, 0, 0], [0, 0, 0]])
    metric = MeanIoU(skip_background=True, aggregation="sample")
    close(value(metric, sure(found), label), 1 / 2)
    close(in_batches(metric, sure(found), label, (1, 1)), 1 / 2)


# ------------------------------------------------------------------------------------------------- other libraries


def test_torchmetrics_gives_the_same(size):
    output, label = logits(size, samples=9), labels(size, samples=9)
    keys = {"task": "multiclass", "num_classes": 3}
    close(value(MeanIoU(), output, label), value(tm.JaccardIndex(**keys), output, label))
    close(value(MacroPrecision(), output, label), value(tm.Precision(average="macro", **keys), output, label))
    with_another = torch.cat((output, output[:, :1] - 1), 1)
    theirs = tm.Precision("multiclass", num_classes=4, average="macro")
    close(value(MacroPrecision(4), with_another, label), value(theirs, with_another, label))
    close(value(PixelAccuracy(), output, label), value(tm.Accuracy(average="micro", **keys), output, label))
    close(
        value(SEN(smooth=0, per_class=True), output, label)[1:],
        value(tm.Recall(average=None, **keys), output, label)[1:],
    )
    found = output.argmax(1)
    theirs = tm.segmentation.DiceScore(3, average="macro", input_format="index", aggregation_level="global")
    if size:
        close(value(DiceCoefficient(False), output, label), value(theirs, found, label))
        theirs = tm.segmentation.MeanIoU(3, input_format="index", include_background=False)
        close(
            value(MeanIoU(include_background=False, aggregation="sample"), output, label), value(theirs, found, label)
        )


def test_torchmetrics_gives_the_same_of_two_classes(size):
    output, label = logits(size, channels=1) * 4, labels(size, channels=2)
    flat = output[:, 0].sigmoid()
    close(value(BinaryIoU(), output, label), value(tm.JaccardIndex("binary"), flat, label))
    close(value(DSC(smooth=0), output, label), value(tm.F1Score("binary"), flat, label))
    close(value(MacroPrecision(), output, label), value(tm.Precision("binary"), flat, label))


def test_monai_gives_the_same(monai):
    output, label = logits((6, 7)), labels((6, 7))
    found, there = one_hot(output.argmax(1)), one_hot(label)
    for include in (True, False):
        iou = monai.MeanIoU(include_background=include, reduction="mean_batch")
        dice = monai.DiceMetric(include_background=include, reduction="mean_batch")
        iou(found, there), dice(found, there)
        keys = {"include_background": include, "aggregation": "sample", "per_class": True}
        first = 0 if include else 1
        close(value(MeanIoU(**keys), output, label)[first:], iou.aggregate().tolist())
        close(value(DiceCoefficient(False, **keys), output, label)[first:], dice.aggregate().tolist())


def test_a_class_that_the_target_lacks_is_judged_as_asked() -> None:
    """By hand. Sample 0: class 1 right, class 2 only predicted; sample 1: background alone. Class 3 is nowhere."""
    output, label = sure(torch.tensor([[1, 1, 0, 2], [0, 0, 0, 0]]), 4), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    iou = {
        "zero": ((1 / 2 + 1 + 0) / 3 + 1) / 2,
        "skip": ((1 / 2 + 1) / 2 + 1) / 2,
        "one": ((1 / 2 + 1 + 0 + 1) / 4 + 1) / 2,
    }
    dice = {
        "zero": ((2 / 3 + 1 + 0) / 3 + 1) / 2,
        "skip": ((2 / 3 + 1) / 2 + 1) / 2,
        "one": ((2 / 3 + 1 + 0 + 1) / 4 + 1) / 2,
    }
    for absent in iou:
        keys = {"aggregation": "sample", "absent": absent}
        close(value(MeanIoU(**keys), output, label), iou[absent])
        close(in_batches(MeanIoU(**keys), output, label, (1, 1)), iou[absent])
        close(value(DiceCoefficient(False, **keys), output, label), dice[absent])
    close(value(MeanIoU(aggregation="sample"), output, label), iou["zero"])
    of_set = {"zero": [5 / 6, 1, 0, nan], "skip": [5 / 6, 1, nan, nan], "one": [5 / 6, 1, 0, 1]}
    for absent, expected in of_set.items():
        close(value(MeanIoU(per_class=True, absent=absent), output, label), expected)
    soft = {"zero": [10 / 11, 1, 0, 0], "skip": [10 / 11, 1, nan, nan], "one": [10 / 11, 1, 0, 0]}
    for absent, expected in soft.items():
        close(value(DiceCoefficient(per_class=True, absent=absent), output, label), expected, 1e-3)
    close(value(DiceCoefficient(per_class=True), output, label), soft["skip"], 1e-3)


@pytest.mark.parametrize("empty", [True, False], ids=["skip", "one"])
def test_monai_gives_the_same_where_classes_are_absent(monai, empty):
    for seed in range(6):
        torch.manual_seed(seed)
        output, label = logits((2, 3), channels=5), labels((2, 3), channels=5).clamp(max=3)
        label[0] = 0
        found, there = one_hot(output.argmax(1), 5), one_hot(label, 5)
        keys = {"aggregation": "sample", "absent": "skip" if empty else "one"}
        for include in (True, False):
            iou = monai.MeanIoU(include_background=include, ignore_empty=empty)
            dice = monai.DiceMetric(include_background=include, ignore_empty=empty)
            iou(found, there), dice(found, there)
            close(value(MeanIoU(include_background=include, **keys), output, label), float(iou.aggregate()))
            hard = DiceCoefficient(False, include_background=include, **keys)
            close(value(hard, output, label), float(dice.aggregate()))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("form", ["labels", "channels"])
@pytest.mark.parametrize("skip_background", [True, False])
def test_a_mean_iou_that_is_moved_over_is_the_packages(published, activation, form, skip_background):
    for seed in range(4):
        torch.manual_seed(seed)
        output, label = logits((2, 3, 4), channels=4, samples=3), labels((2, 3, 4), channels=4, samples=3)
        label[0].clamp_(max=1)
        output[1, 3] = -20  # a class that is in neither
        label[1].clamp_(max=2)
        target = label if form == "labels" else one_hot(label, 4)
        p = output.sigmoid() if activation == "sigmoid" else output.softmax(1)
        theirs = float(published.MeanIoU(skip_background=skip_background)(p, target))
        metric = moved.MeanIoU(skip_background=skip_background, activation=activation)
        close(value(metric, output, target), theirs)
        close(in_batches(metric, output, target, (2, 1)), theirs)
    one = logits((2, 3, 4), channels=1)
    target = (torch.rand(one.shape) > 0.5).float()
    close(value(moved.MeanIoU(), one, target), float(published.MeanIoU()(one.sigmoid(), target)))
    dice = float(published.DiceCoefficient()(p, one_hot(label.clamp(max=2), 4)))
    metric = DiceCoefficient(activation=activation, absent="zero")
    close(value(metric, output, one_hot(label.clamp(max=2), 4)), dice, 1e-5)


def test_pytorch_3dunet_gives_the_same_where_it_is_right(published):
    output, label = logits((4, 5, 6)), labels((4, 5, 6))
    p = output.softmax(1)
    theirs = float(published.MeanIoU()(p, label))
    close(value(MeanIoU(skip_background=True, aggregation="sample"), output, label), theirs)
    theirs = float(published.DiceCoefficient()(p, one_hot(label)))
    close(value(DiceCoefficient(), output, label), theirs, 1e-5)
    channels = (torch.rand(output.shape) > 0.5).float()
    theirs = float(published.MeanIoU()(output.sigmoid(), channels))
    close(value(MeanIoU(aggregation="sample", activation="sigmoid"), output, channels), theirs)
    small, image = torch.rand(1, 1, 4, 5, 6), torch.rand(1, 1, 4, 5, 6)
    close(value(PSNR(1.0), small, image), float(published.PSNR()(small, image)), 1e-5)
    close(value(MSE(), small, image), float(published.MSE()(small, image)), 1e-5)


# ------------------------------------------------------------------------------------------------- continuous values


def test_squared_errors_are_those_of_torchmetrics_over_all_batches(size):
    output, target = torch.randn(4, 2, *size), torch.randn(4, 2, *size)
    close(in_batches(MSE(), output, target), value(tm.MeanSquaredError(), output, target))
    theirs = tm.image.PeakSignalNoiseRatio(data_range=5.0)
    close(in_batches(PSNR(5.0, "global"), output, target), value(theirs, output, target), 1e-5)
    each = [value(theirs, a[None], b[None]) for a, b in zip(output, target, strict=True)]
    close(in_batches(PSNR(5.0), output, target), sum(each) / 4, 1e-5)


def test_the_range_is_that_of_all_targets_where_none_is_given() -> None:
    output, target = torch.randn(4, 1, 5, 6), torch.randn(4, 1, 5, 6) * 7
    span = float(target.max() - target.min())
    for aggregation in ("sample", "global"):
        expected = in_batches(PSNR(span, aggregation), output, target)
        close(in_batches(PSNR(aggregation=aggregation), output, target), expected)
        close(in_batches(PSNR(aggregation=aggregation), output, target[:, 0]), expected)


def test_what_psnr_makes_of_perfection_and_of_constants() -> None:
    image = torch.rand(2, 1, 4, 4)
    assert value(PSNR(1.0), image, image) == math.inf
    assert math.isnan(value(PSNR(), image, torch.ones_like(image)))
    close(value(PSNR(255, activation="auto"), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)), 20 * math.log10(510))
    with pytest.raises(ValueError, match="data_range is 0; expected a number greater than 0, or null"):
        PSNR(0)


def test_sums_over_a_large_set_stay_exact() -> None:
    metric = MSE()
    for _ in range(300):
        metric.update(torch.full((8, 1, 64), 0.1), torch.zeros(8, 1, 64))
    close(float(metric.compute()), float(torch.tensor(0.1).double() ** 2), 1e-7)
    counted = PixelAccuracy()
    counted.update(sure(torch.zeros(1, 3, dtype=torch.long)), torch.tensor([[0, 0, 1]]))
    counted.totals = counted.totals + torch.tensor([[2**40, 2**40, 2**40], [0, 0, 0], [0, 0, 0]])
    counted.update(sure(torch.zeros(1, 3, dtype=torch.long)), torch.tensor([[0, 0, 1]]))
    assert counted.totals.tolist()[0][2] == 2**40 + 4


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("metric", "output", "target", "text"),
    [
        (MeanIoU(), torch.zeros(2, 3, 4), torch.full((2, 4), 7), "has the label 7; expected 0 to 2$"),
        (
            MeanIoU(ignore_index=9),
            torch.zeros(2, 3, 4),
            torch.full((2, 4), -1),
            "label -1; expected 0 to 2, or 9, which",
        ),
        (DiceCoefficient(), torch.zeros(2, 3, 4), torch.full((2, 4), 3), "has the label 3; expected 0 to 2"),
        (BinaryIoU(), torch.zeros(2, 1, 4), torch.full((2, 4), 2), "has the label 2; expected 0 to 1"),
        (MeanIoU(4), torch.zeros(2, 3, 4), torch.zeros(2, 4), r"num_classes is 4, but the output has 3 channel\(s\)"),
        (DiceCoefficient(num_classes=2), torch.zeros(2, 3, 4), torch.zeros(2, 4), "num_classes is 2"),
        (MeanIoU(), torch.zeros(2, 3, 4), torch.zeros(2, 5), r"found a target of shape \(2, 5\)"),
        (MeanIoU(), torch.zeros(2, 3, 2), torch.full((2, 3, 2), 2), "must be one-hot"),
        (MeanIoU(activation="softmax"), torch.zeros(2, 1, 4), torch.zeros(2, 4), "softmax of one channel is always 1"),
        (BinaryIoU(), torch.zeros(2, 3, 4), torch.zeros(2, 4), "found an output of 3 channels; expected 1 or 2"),
        (PixelAccuracy(), torch.zeros(5), torch.zeros(5), r"found an output of shape \(5,\); expected \(N, C, \*\)"),
        (MSE(), torch.zeros(2, 3, 4), torch.zeros(2, 4), r"a target of shape \(2, 4\) for an output of \(2, 3, 4\)"),
    ],
)
def test_a_mistake_in_the_data_is_told(metric: tm.Metric, output: Tensor, target: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metric.update(output, target)


@pytest.mark.parametrize(
    ("make", "keys", "text"),
    [
        (MeanIoU, {"aggregation": "batch"}, "aggregation is 'batch'; possible: global, sample"),
        (MeanIoU, {"absent": "half"}, "absent is 'half'; possible: zero, skip, one"),
        (MeanIoU, {"activation": "relu"}, "activation is 'relu'; possible: auto, softmax, sigmoid, none"),
        (MeanIoU, {"include_background": True, "skip_background": True}, "are both True; give one of them"),
        (BinaryIoU, {"threshold": 1.5}, "a threshold is 1.5; expected a probability between 0 and 1"),
        (BinaryIoU, {"activation": "tanh"}, "activation is 'tanh'"),
        (PSNR, {"aggregation": "batch"}, "aggregation is 'batch'"),
        (MSE, {"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_a_mistake_in_the_arguments_is_told(make: Callable[..., tm.Metric], keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(**keys)


# ------------------------------------------------------------------------------------------------- engine and ranks

OVERLAPS: dict[str, Callable[[], tm.Metric]] = {
    "MeanIoU": MeanIoU,
    "MeanIoU-sample": lambda: MeanIoU(aggregation="sample", skip_background=True),
    "MeanIoU-classes": lambda: MeanIoU(4, aggregation="sample", per_class=True),
    "Dice": DiceCoefficient,
    "Dice-sample": lambda: DiceCoefficient(aggregation="sample"),
    "Dice-hard": lambda: DiceCoefficient(False, per_class=True),
    "MacroPrecision": MacroPrecision,
    "PixelAccuracy": PixelAccuracy,
    "DSC": DSC,
    "SEN": SEN,
    "PPV": PPV,
}
BINARY: dict[str, Callable[[], tm.Metric]] = {
    "BinaryIoU": BinaryIoU,
    "AdaptedRandError": AdaptedRandError,
    "AveragePrecision": AveragePrecision,
    "BoundaryAdaptedRandError": BoundaryAdaptedRandError,
    "BoundaryAveragePrecision": lambda: BoundaryAveragePrecision(thresholds=[0.4, 0.5]),
}
NUMBERS: dict[str, Callable[[], tm.Metric]] = {
    "MSE": MSE,
    "PSNR": PSNR,
    "PSNR-global": lambda: PSNR(3.0, aggregation="global"),
}
KINDS = {"classes": OVERLAPS, "binary": BINARY, "numbers": NUMBERS}
SAMPLES = {"many": 11, "few": 5, "one batch": 3}  # the second rank has none of the last
BATCH, WORLD = 3, 2


def batch_of(kind: str, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    output = torch.randn(samples, 4 if kind == "classes" else 1, 6, 7, generator=generator) * 2
    if kind == "numbers":
        return output, torch.randn(output.shape, generator=generator)
    return output, torch.randint(0, 4 if kind == "classes" else 2, (samples, 6, 7), generator=generator)


def figures_of(ranks: Ranks) -> dict[str, dict[str, float]]:
    """What this rank is told about every case, each computed twice, as in two validations."""
    result = {}
    for kind, makers in KINDS.items():
        metrics = Metrics(makers, ranks, CPU)
        for name, samples in SAMPLES.items():
            output, target = batch_of(kind, samples)
            for _ in range(2):
                metrics.reset()
                batches = list(enumerate(zip(output.split(BATCH), target.split(BATCH), strict=True)))
                for number, (part, of_target) in batches[ranks.rank :: ranks.world_size]:
                    metrics.update(part, of_target, number)
                result[f"{kind}, {name}"] = metrics.compute()
    return result


def rank_main(rank: int, folder: Path) -> None:
    """One gloo rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = figures_of(Ranks(rank, rank, WORLD, CPU))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_figures_of_two_ranks_are_those_of_one_process_and_of_one_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dtrain.components.metrics", "dtrain.metrics", "dtrain.distributed.process_group"])
    processes = [context.Process(target=rank_main, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    end = time.monotonic() + 240
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    still = [process for process in processes if process.is_alive()]
    for process in still:
        process.kill()
    assert not still and [process.exitcode for process in processes] == [0] * WORLD
    alone = figures_of(Ranks(0, 0, 1, CPU))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert json.dumps(first) == json.dumps(second)
    for kind, makers in KINDS.items():
        for case, samples in SAMPLES.items():
            figures = alone[f"{kind}, {case}"]
            assert first[f"{kind}, {case}"] == pytest.approx(figures, rel=1e-9, abs=1e-12, nan_ok=True)
            for name, make in makers.items():
                whole = value(make(), *batch_of(kind, samples))
                expected = mean_of(whole) if isinstance(whole, list) else whole
                assert math.isfinite(expected)
                assert figures[name] == pytest.approx(expected, rel=1e-6)


def from_config(metrics: Any) -> Any:
    return from_mapping(
        {
            "model": {"name": "Identity"},
            "loss": {"name": "MSELoss"},
            "optimizer": {"name": "SGD", "lr": 0.1},
            "loaders": {"name": "TensorDataset", "train": {}},
            "trainer": {"max_epochs": 1},
            "metrics": metrics,
        }
    )


def test_the_names_lead_to_these_and_the_others_of_the_same_name_are_mentioned() -> None:
    config = from_config({"name": ["MeanIoU", "AveragePrecision", "PSNR"], "data_range": 1.0})
    found = get_evaluation_metric(config, Ranks(0, 0, 1, CPU), CPU)
    made = found.prepare()
    assert [type(made[name].metric) for name in found.names] == [MeanIoU, AveragePrecision, PSNR]
    assert [found.higher_is_better(name) for name in found.names] == [True, True, True]
    lines = notes(config)
    assert "MeanIoU is dtrain.components.metrics.overlap.MeanIoU; also found: torchmetrics.segmentation" in lines[0]
    assert "AveragePrecision is dtrain.components.metrics.instances.AveragePrecision; also found: torchm" in lines[1]
    assert not any("PSNR" in line for line in lines)


def test_precision_is_torchmetrics_with_its_arguments_and_not_found_twice() -> None:
    keys = {"task": "multiclass", "num_classes": 3}
    config = from_config({"name": ["Accuracy", "Precision", "MeanIoU"], **keys, "Precision": {"average": "macro"}})
    assert not any("Precision" in line for line in notes(config))
    found = get_evaluation_metric(config, Ranks(0, 0, 1, CPU), CPU)
    output, label = logits(), labels()
    found.update(output, label, 0)
    assert Precision is tm.Precision
    figures = found.compute()
    close(figures["Precision"], value(MacroPrecision(), output, label))
    close(figures["MeanIoU"], value(MeanIoU(), output, label))


def test_the_elements_of_a_vector_are_the_classes() -> None:
    config = from_config({"name": "MeanIoU", "skip_background": True, "per_class": True})
    found = get_evaluation_metric(config, Ranks(0, 0, 1, CPU), CPU)
    found.update(sure(FOUND), LABEL, 0)
    expected = {"MeanIoU": 0.55, "MeanIoU_0": nan, "MeanIoU_1": 0.6, "MeanIoU_2": 0.5}
    assert found.compute() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", [name for makers in KINDS.values() for name in makers])
def test_which_way_is_better(name: str) -> None:
    make = next(makers[name] for makers in KINDS.values() if name in makers)
    assert make().higher_is_better is (name not in ("MSE", "AdaptedRandError", "BoundaryAdaptedRandError"))
