"""The metrics of instances: by hand, by scikit-image and pytorch-3dunet, backgrounds, thresholds, channels."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.components.metrics.instances import (
    AdaptedRandError,
    AveragePrecision,
    BoundaryAdaptedRandError,
    BoundaryAveragePrecision,
    adapted_rand_error,
    average_precision,
    components,
)

nan = math.nan
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def published() -> types.ModuleType:
    """pytorch-3dunet's own metrics, if the package and what it imports are installed."""
    return pytest.importorskip(
        "pytorch3dunet.unet3d.metrics",
        reason="needs: pip install --no-deps pytorch3dunet; pip install scikit-image h5py tqdm",
        exc_type=ImportError,
    )


def value(metric: tm.Metric, output: Tensor, target: Tensor) -> float:
    """Of one batch."""
    metric.reset()
    metric.update(output, target)
    return float(metric.compute())


def close(found: float, expected: float, tolerance: float = 1e-6) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


def rows(*lines: str) -> Tensor:
    """One sample (1, H, W) of digits; '.' is 0."""
    return torch.tensor([[[0 if sign == "." else int(sign) for sign in line] for line in lines]])


def sure(mask: Tensor) -> Tensor:
    """Logits (N, 1, *) of a mask."""
    return (mask > 0).float().unsqueeze(1) * 20 - 10


def cells(samples: int = 2, size: tuple[int, ...] = (12, 13, 14), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels of a Voronoi partition without background, and noisy logits of the boundaries between its cells."""
    rng = np.random.default_rng(seed)
    labels, logits = [], []
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    for _ in range(samples):
        seeds = rng.uniform(0, 1, (6, len(size))) * size
        label = ((grid[..., None, :] - seeds) ** 2).sum(-1).argmin(-1) + 1
        edge = np.zeros(size, bool)
        for axis in range(len(size)):
            edge |= (np.diff(label, axis=axis, append=label.take([-1], axis=axis)) != 0) | (
                np.diff(label, axis=axis, prepend=label.take([0], axis=axis)) != 0
            )
        labels.append(label)
        logits.append(np.where(edge, 2.0, -2.0) + rng.normal(0, 1, size))
    return torch.tensor(np.stack(labels)), torch.tensor(np.stack(logits), dtype=torch.float32).unsqueeze(1)


# ------------------------------------------------------------------------------------------------- adapted Rand error


def naive_rand(truth: list[int], found: list[int], background: int | None) -> float:
    """By counting pairs of voxels: 1 - 2 (pairs together in both) / (pairs in the one + pairs in the other)."""
    voxels = [(a, b) for a, b in zip(truth, found, strict=True) if a != background]
    pairs = [(x, y) for i, x in enumerate(voxels) for j, y in enumerate(voxels) if i != j]
    one, other = sum(x[0] == y[0] for x, y in pairs), sum(x[1] == y[1] for x, y in pairs)
    return 1 - 2 * sum(x == y for x, y in pairs) / (one + other) if one + other else nan


@settings(deadline=None, max_examples=60)
@given(LABELS, st.data())
def test_the_rand_error_counts_pairs_of_voxels(truth: list[int], data: st.DataObject) -> None:
    found = data.draw(st.lists(st.integers(0, 4), min_size=len(truth), max_size=len(truth)))
    for background in (0, 3, None):
        close(adapted_rand_error(np.array(truth), np.array(found), background), naive_rand(truth, found, background))


def test_the_rand_error_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="needs: pip install scikit-image")
    rng = np.random.default_rng(0)
    for size in ((30,), (8, 9), (4, 5, 6)):
        truth, found = rng.integers(0, 5, size), rng.integers(0, 4, size) * 7
        close(adapted_rand_error(truth, found), metrics.adapted_rand_error(truth, found)[0])
        close(adapted_rand_error(truth, found, None), metrics.adapted_rand_error(truth, found, ignore_labels=())[0])


def test_the_rand_error_of_outputs_by_hand() -> None:
    truth = rows("11.22", "11.22", "11.22")
    close(value(AdaptedRandError(), sure(truth), truth), 0)
    merged = rows("11111", "11.11", "11.11")  # one component: 12 * 11 pairs together against 2 * 6 * 5
    close(value(AdaptedRandError(), sure(merged), truth), 1 - 2 * 60 / (60 + 132))
    nothing = torch.zeros_like(truth)
    close(value(AdaptedRandError(), sure(nothing), truth), 1 - 2 * 60 / (60 + 132))
    close(value(AdaptedRandError(), sure(merged), nothing), nan)
    both = value(AdaptedRandError(), sure(torch.cat((merged, merged, truth))), torch.cat((truth, nothing, truth)))
    close(both, (1 - 2 * 60 / (60 + 132)) / 2)


def test_an_output_may_hold_labels() -> None:
    truth, found = rows("1122", "1122"), rows("7755", "7755")
    metric = AdaptedRandError(threshold=None)
    for output in (found, found.unsqueeze(1), found.unsqueeze(1).float()):
        close(value(metric, output, truth), 0)
        close(value(AveragePrecision(threshold=None), output, truth), 1)
    volume = found.unsqueeze(1).expand(1, 3, 2, 4)
    close(value(metric, volume, truth.unsqueeze(1).expand(1, 3, 2, 4)), 0)


# ------------------------------------------------------------------------------------------------- average precision


def naive_precision(truth: list[int], found: list[int], background: int | None) -> float:
    of_truth, of_found = set(truth) - {background}, set(found) - {0}
    if not of_truth and not of_found:
        return nan
    places = range(len(truth))
    scores = []
    for percent in range(50, 100, 5):
        matched = 0
        for a in of_truth:
            for b in of_found:
                both = sum(truth[i] == a and found[i] == b for i in places)
                matched += 100 * both > percent * sum(truth[i] == a or found[i] == b for i in places)
        scores.append(matched / (len(of_truth) + len(of_found) - matched))
    return sum(scores) / 10


@settings(deadline=None, max_examples=60)
@given(LABELS, st.data())
def test_average_precision_follows_its_definition(truth: list[int], data: st.DataObject) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    found = [label if same else (label + 1) % 5 for label, same in zip(truth, right, strict=True)]
    for background in (0, 3, None):
        close(
            average_precision(np.array(truth), np.array(found), background), naive_precision(truth, found, background)
        )


def test_average_precision_by_hand() -> None:
    truth = rows("1111.2222", "1111.2222", "1111.2222")  # two of 12 voxels
    close(value(AveragePrecision(), sure(truth), truth), 1)
    less = rows("1111.222.", "1111.222.", "1111.222.")  # IoU 9/12: above .5 to .70, since .75 is not above .75
    close(value(AveragePrecision(), sure(less), truth), (5 * 1 + 5 * 1 / 3) / 10)
    close(value(AveragePrecision(iou_thresholds=[0.5]), sure(less), truth), 1)
    close(value(AveragePrecision(iou_thresholds=[0.75]), sure(less), truth), 1 / 3)
    one = rows("1111.....", "1111.....", "1111.....")
    close(value(AveragePrecision(), sure(one), truth), 1 / 2)
    more = rows("1111.2222", "1111.2222", "1111.2222", "........3")
    padded = rows("1111.2222", "1111.2222", "1111.2222", ".........")
    close(value(AveragePrecision(), sure(more)[..., :3, :], truth), 1)
    spots = rows("1111.2222", "1111.2222", "1111.2222", ".........", "3........")
    close(value(AveragePrecision(), sure(spots), torch.cat((padded, padded[:, 3:]), 1)), 2 / 3)
    close(value(AveragePrecision(min_instance_size=2), sure(spots), torch.cat((padded, padded[:, 3:]), 1)), 1)


def test_none_found_is_zero_and_nothing_at_all_is_left_out() -> None:
    truth, nothing = rows("11.2", "11.2"), rows("....", "....")
    close(value(AveragePrecision(), sure(nothing), truth), 0)
    close(value(AveragePrecision(), sure(truth), nothing), 0)
    close(value(AveragePrecision(), sure(nothing), nothing), nan)
    close(value(AveragePrecision(), sure(torch.cat((truth, nothing))), torch.cat((truth, nothing))), 1)
    close(value(AveragePrecision(), sure(torch.cat((truth, truth))), torch.cat((truth, nothing))), 1 / 2)


def test_no_label_is_dropped_that_is_not_said_to_be_background(published: types.ModuleType) -> None:
    truth = rows("1112", "1112")
    metric = AveragePrecision(threshold=None)
    close(value(metric, truth, truth), 1)
    close(value(AveragePrecision(threshold=None, background=1), rows("...2", "...2"), truth), 1)
    close(value(metric, rows("...2", "...2"), truth), 1 / 2)
    close(value(AveragePrecision(threshold=None, background=None), rows("1112", "1112"), rows("...2", "...2")), 1)
    relabelled = truth * 3 % 5
    close(value(metric, relabelled, truth), 1)
    assert published.AveragePrecision()(relabelled.numpy(), truth.numpy()) < 1, "the original's fault"


# ------------------------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("size", [(20, 21), (12, 13, 14)])
def test_boundaries_are_what_lies_between_instances(size: tuple[int, ...]) -> None:
    measure = pytest.importorskip("skimage.measure", reason="needs: pip install scikit-image")
    label, logits = cells(size=size)
    insides = (logits[:, 0].sigmoid() <= 0.6).numpy()
    found = [measure.label(mask, connectivity=1) for mask in insides]
    rand = np.mean([adapted_rand_error(a, b) for a, b in zip(label.numpy(), found, strict=True)])
    precision = np.mean([average_precision(a, b) for a, b in zip(label.numpy(), found, strict=True)])
    close(value(BoundaryAdaptedRandError(0.6), logits, label), rand)
    close(value(BoundaryAveragePrecision(0.6), logits, label), precision)
    close(value(BoundaryAveragePrecision(0.4, invert_pmaps=False), -logits, label), precision)
    close(value(AveragePrecision(0.4), -logits, label), precision)
    close(value(AdaptedRandError(0.4), -logits, label), rand)
    close(value(AdaptedRandError(0.4, activation="none"), 1 - logits.sigmoid(), label), rand)


def test_pytorch_3dunet_takes_the_best_threshold_and_so_does_this_where_asked(published: types.ModuleType) -> None:
    label, logits = cells(3)
    p, tried = logits.sigmoid(), [0.3, 0.4, 0.5, 0.6]
    theirs = float(published.BoundaryAdaptedRandError()(p, label.unsqueeze(1)))
    best = value(BoundaryAdaptedRandError(thresholds=tried), logits, label)
    close(best, theirs)
    each = [value(BoundaryAdaptedRandError(threshold), logits, label) for threshold in tried]
    assert best <= min(each) < max(each), "the best of each sample is optimistic"
    close(value(BoundaryAdaptedRandError(), logits, label), each[2])
    with_background = label.where(label > 1, 0)
    theirs = float(published.BoundaryAveragePrecision()(p, with_background))
    metric = BoundaryAveragePrecision(thresholds=tried)
    close(value(metric, logits, with_background), theirs)
    assert value(metric, logits, with_background) >= value(BoundaryAveragePrecision(), logits, with_background)


# ------------------------------------------------------------------------------------------------- channels and batches


def test_the_channel_of_output_and_target_that_is_meant() -> None:
    label, logits = cells()
    several = torch.cat((torch.zeros_like(logits), logits), 1)
    expected = value(BoundaryAdaptedRandError(), logits, label)
    metric = BoundaryAdaptedRandError(input_channel=1, activation="sigmoid")
    close(value(metric, several, label), expected)
    close(value(BoundaryAdaptedRandError(input_channel=1), several, label), expected)  # the softmax of 0 and x
    other = torch.zeros_like(label)
    for target in (label.unsqueeze(1), torch.stack((other, label), 1), torch.stack((other, label), 1).float()):
        close(value(metric, several, target), expected)
    metric = BoundaryAdaptedRandError(input_channel=-1, use_last_target=False)
    close(value(metric, several, torch.stack((label, other), 1)), expected)


def test_batches_change_nothing() -> None:
    label, logits = cells(5, (20, 21))
    for metric in (BoundaryAdaptedRandError(), BoundaryAveragePrecision()):
        expected = value(metric, logits, label)
        metric.reset()
        for part, target in zip(logits.split((1, 3, 1)), label.split((1, 3, 1)), strict=True):
            metric.update(part, target)
        close(float(metric.compute()), expected)
        close(expected, np.mean([value(metric, a[None], b[None]) for a, b in zip(logits, label, strict=True)]))


def test_ignored_voxels_count_in_neither() -> None:
    truth, found = rows("11.22999", "11.22999"), rows("11.22222", "11.22222")
    close(value(AveragePrecision(ignore_index=9), sure(found), truth), 1)
    close(value(AdaptedRandError(ignore_index=9), sure(found), truth), 0)
    assert value(AveragePrecision(), sure(found), truth) < 1
    assert value(AdaptedRandError(), sure(found), truth) > 0
    close(value(AveragePrecision(ignore_index=9), sure(rows("11.22.33", "11.22.33")), truth), 1)


def test_components_hang_together_by_faces() -> None:
    assert components(np.array([[1, 0], [0, 1]], bool)).max() == 2
    assert components(np.ones((2, 2, 2), bool)).max() == 1
    diagonal = np.zeros((2, 2, 2), bool)
    diagonal[0, 0, 0] = diagonal[1, 1, 1] = True
    assert components(diagonal).max() == 2


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("output", "target", "text"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, 4, 4),
            "the output has 3 channels; say which one is meant with input_c",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2, 4, 5),
            r"a target of shape \(2, 4, 5\); expected instances of shape \(2, 4",
        ),
        (torch.zeros(2, 3), torch.zeros(2), r"shape \(2, 3\), which has no instances; .* use torchmetrics.AveragePrec"),
    ],
)
def test_a_mistake_in_the_data_is_told(output: Tensor, target: Tensor, text: str) -> None:
    for metric in (AveragePrecision(), BoundaryAdaptedRandError()):
        with pytest.raises(ValueError, match=text):
            metric.update(output, target)


@pytest.mark.parametrize(
    ("make", "keys", "text"),
    [
        (
            AveragePrecision,
            {"iou_thresholds": [0.4]},
            r"iou_thresholds are \[0.4\]; expected numbers from 0.5 to below 1",
        ),
        (AveragePrecision, {"threshold": 2.0}, "a threshold is 2.0; expected a probability"),
        (BoundaryAveragePrecision, {"thresholds": []}, "thresholds is empty"),
        (BoundaryAveragePrecision, {"iou_thresholds": [1.0]}, "iou_thresholds are"),
        (BoundaryAdaptedRandError, {"thresholds": [0.5, 0.0]}, "a threshold is 0.0"),
        (AdaptedRandError, {"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_a_mistake_in_the_arguments_is_told(make: Callable[..., tm.Metric], keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(**keys)


def test_a_channel_that_the_output_does_not_have_is_told() -> None:
    with pytest.raises(ValueError, match=r"input_channel is 1, but the output has 1 channel\(s\)"):
        AveragePrecision(input_channel=1).update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))


def test_without_scipy_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match="metrics of instances need scipy: pip install scipy"):
        AveragePrecision().update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
