"""Metrics that share one confusion matrix of a batch have torchmetrics' own states and figures, integer by integer."""

from typing import Any

import pytest
import torch
import torchmetrics.classification as tmc
from torch import Tensor

from dtrain.components.metrics import DiceCoefficient, MeanIoU
from dtrain.components.metrics.reading import ClassReader
from dtrain.data.confusion import family_of
from dtrain.distributed.ranks import Ranks
from dtrain.metrics import Metrics

CPU = torch.device("cpu")
NAMES = (
    "Accuracy", "Precision", "Recall", "F1Score", "FBetaScore", "Specificity", "HammingDistance", "StatScores",
    "NegativePredictiveValue", "JaccardIndex", "CohenKappa", "MatthewsCorrCoef", "ConfusionMatrix",
)  # fmt: skip


def made(kind: str, **keys: Any) -> dict[str, Any]:
    """Each of torchmetrics' metrics of classes, each way of averaging at least once."""
    if kind == "Binary":
        more: dict[str, Any] = {"FBetaScore": {"beta": 2.0}}
        return {name: getattr(tmc, kind + name)(**keys, **more.get(name, {})) for name in NAMES}
    more = {"FBetaScore": {"beta": 2.0}, "Accuracy": {"average": "micro"}, "F1Score": {"average": "none"}}
    more |= {"Recall": {"average": "weighted"}, "Precision": {"average": "macro"}, "StatScores": {"average": "micro"}}
    return {name: getattr(tmc, kind + name)(num_classes=4, **keys, **more.get(name, {})) for name in NAMES}


def metrics_of(those: dict[str, Any]) -> Metrics:
    return Metrics({name: lambda metric=metric: metric for name, metric in those.items()}, Ranks(0, 0, 1, CPU), CPU)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, metric in theirs.items():
        assert ours[name]._update_count == metric._update_count
        for state in metric._reductions:
            found, expected = getattr(ours[name], state), getattr(metric, state)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (name, state)
            assert torch.equal(found, expected), (name, state)
        if metric._update_count:
            torch.testing.assert_close(ours[name].compute(), metric.compute(), rtol=0, atol=0, equal_nan=True)


def batches(kind: str, ignored: int | None) -> list[tuple[Tensor, Tensor]]:
    """Volumes, images and rows; with ties, nan, probabilities, and a batch of which nothing counts."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((2, 3, 4, 5), (3, 6, 7), (5,)):
        output = torch.randn(shape[0], 4, *shape[1:], generator=generator).mul(2).round().div(2)  # many are the same
        target = torch.randint(4, shape, generator=generator)
        if kind == "Binary":
            output, target = output[:, 0], target % 2
        if ignored is not None:
            target = target.masked_fill(torch.rand(shape, generator=generator) < 0.3, ignored)
        found.append((output, target))
    output, target = found[0]
    found.append((output.sigmoid(), target.to(torch.uint8) if ignored != -1 else target.int()))
    broken = output.clone()
    broken.flatten()[::3] = torch.nan
    found.append((broken, target))
    if ignored is not None:
        found.append((output, torch.full_like(target, ignored)))
        beyond = output.sigmoid()
        found.append((torch.where(target == ignored, beyond + 2, beyond) if kind == "Binary" else beyond, target))
    return found


@pytest.mark.parametrize("ignored", [None, 255, -1, 0])
@pytest.mark.parametrize("kind", ["Multiclass", "Binary"])
def test_states_and_figures_are_torchmetrics_own(kind: str, ignored: int | None) -> None:
    ours, theirs = (made(kind, ignore_index=ignored, validate_args=kind == "Binary") for _ in range(2))
    assert all(family_of(metric) for metric in ours.values())
    metrics = metrics_of(ours)
    for _ in range(2):
        for number, (output, target) in enumerate(batches(kind, ignored)):
            metrics.update(output, target, number)
            for metric in theirs.values():
                metric.update(output, target)
            assert_same(ours, theirs)
        metrics.reset()
        for metric in theirs.values():
            metric.reset()


def test_what_all_count_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, own = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *given, **keys: counted.append(1) or own(*given, **keys))
    metrics = metrics_of(
        made("Multiclass") | {f"ignoring {key}": it for key, it in made("Multiclass", ignore_index=1).items()}
    )
    metrics.update(*batches("Multiclass", None)[0], 0)
    assert len(counted) == 2  # one for each ignore_index
    metrics.update(*batches("Multiclass", None)[1], 1)
    assert len(counted) == 4


def test_a_target_of_whole_numbers_is_one_of_labels() -> None:
    ours, theirs = made("Binary"), made("Binary")
    output, target = batches("Binary", None)[0]
    metrics_of(ours).update(output, target.float(), 0)
    for metric in theirs.values():
        metric.update(output, target)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.randn(2, 4, 5, 5), torch.full((2, 5, 5), 4)),  # no such class
        (torch.randn(2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long)),  # too few channels
        (torch.randn(2, 4, 5, 5), torch.zeros(2, 5, 6, dtype=torch.long)),
        (torch.randn(2, 4, 5, 5), torch.zeros(2, 1, 5, 5, dtype=torch.long)),
    ],
)
def test_what_is_wrong_is_told_by_torchmetrics(output: Tensor, target: Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError)) as expected:
        tmc.MulticlassConfusionMatrix(4).update(output, target)
    with pytest.raises(type(expected.value)) as found:
        metrics_of({"Matrix": tmc.MulticlassConfusionMatrix(4)}).update(output, target, 0)
    assert str(found.value) == str(expected.value)


class Halved(tmc.MulticlassAccuracy):
    """Looks at one half of what there is."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds[:1], target[:1])


class Doubled(tmc.MulticlassAccuracy):
    """Counts what is right twice."""

    def _update_state(self, tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> None:
        super()._update_state(2 * tp, fp, tn, fn)


@pytest.mark.parametrize(
    "metric",
    [
        Halved(4), Doubled(4), tmc.MulticlassAccuracy(4, top_k=2), tmc.MulticlassAUROC(4),
        tmc.MulticlassAccuracy(4, multidim_average="samplewise"), tmc.MultilabelAccuracy(4),
    ],
)  # fmt: skip
def test_what_counts_in_a_way_of_its_own_does_so(metric: Any) -> None:
    assert family_of(metric) is None


def test_our_own_metrics_count_a_batch_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, own = [], ClassReader.label_counts
    monkeypatch.setattr(ClassReader, "label_counts", lambda *given: counted.append(1) or own(*given))
    (output, target), other = batches("Multiclass", None)[0], MeanIoU(ignore_index=0)
    those = {"iou": MeanIoU(), "dice": DiceCoefficient(soft=False), "no background": MeanIoU(include_background=False)}
    metrics = metrics_of(those | {"other": other})
    metrics.update(output, target, 0)
    assert len(counted) == 2
    output.neg_()
    metrics.update(output, target, 1)
    assert len(counted) == 4
    alone = MeanIoU()
    alone.update(-output, target)
    alone.update(output, target.clone())
    assert torch.equal(alone.totals, those["iou"].totals)
