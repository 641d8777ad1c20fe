"""Metrics of every form over two and three real gloo ranks, some without a batch: the figures of one process."""

import itertools
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics as tm
import torchmetrics.functional as tmf
from torch import Tensor

from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.data.samplers import EvaluationShard
from dtrain.distributed.ranks import Ranks
from dtrain.metrics import Metrics, get_evaluation_metric

CPU = torch.device("cpu")
BATCH = 4
SIZES = {"many": 37, "few": 6, "one batch": 3}  # with three ranks, one and two of them have none of the last two
WORLDS = (2, 3)


# What users write


class Alien:
    """Nothing but update, compute and reset, and a result that hangs on the order of the batches."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.trace, self.batches = 0.0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.trace = 0.9 * self.trace + float(output.double().sum()) + float(target.double().sum())
        self.batches += 1

    def compute(self) -> dict[str, float]:
        return {"trace": self.trace, "batches": self.batches}


class Holder:
    """An object that leaves its work to torchmetrics."""

    def __init__(self) -> None:
        self.one = tm.Recall(task="multiclass", num_classes=3)
        self.more = {"precision": tm.Precision(task="multiclass", num_classes=3)}

    def reset(self) -> None:
        for metric in (self.one, *self.more.values()):
            metric.reset()

    def update(self, output: Tensor, target: Tensor) -> None:
        for metric in (self.one, *self.more.values()):
            metric.update(output, target)

    def compute(self) -> dict[str, Tensor]:
        return {"recall": self.one.compute(), "precision": self.more["precision"].compute()}


class Spread(tm.Metric):
    """States of every reduction that torchmetrics has, and one of its author's own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("highest", torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("lowest", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("each", [], dist_reduce_fx="cat")
        self.add_state("kept", [], dist_reduce_fx=None)
        self.add_state("of_ranks", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("product", torch.tensor(1.0, dtype=torch.float64), dist_reduce_fx=partial(torch.prod, dim=0))

    def update(self, output: Tensor, target: Tensor) -> None:
        values = output.double().mean(-1)
        self.total += values.sum()
        self.highest = torch.maximum(self.highest, output.max())
        self.lowest = torch.minimum(self.lowest, output.min())
        self.each.append(values)
        self.kept.append(target.double())
        self.of_ranks += values.sum()
        self.product *= (1 + values / 10).prod()

    def compute(self) -> dict[str, Tensor]:
        return {
            "total": self.total,
            "span": self.highest - self.lowest,
            "median": torch.cat([item.reshape(-1) for item in self.each]).sort().values.median(),
            "kept": torch.cat([item.reshape(-1) for item in self.kept]).sum(),
            "of_ranks": self.of_ranks.sum(),
            "product": self.product,
        }


def right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def right_of_each(output: Tensor, target: Tensor, classes: int = 3) -> list[Tensor]:
    return [(output.argmax(1) == index).float().mean() for index in range(classes)]


def several(output: Tensor, target: Tensor) -> dict[str, Any]:
    return {"right": right(output, target), "mean": float(output.mean())}


CLASSES: dict[str, Callable[[], Any]] = {
    "Accuracy": lambda: tm.Accuracy(task="multiclass", num_classes=3),
    "PerClass": lambda: tm.Accuracy(task="multiclass", num_classes=3, average="none"),
    "F1": lambda: tm.F1Score(task="multiclass", num_classes=3, average="macro"),
    "Confusion": lambda: tm.ConfusionMatrix(task="multiclass", num_classes=3),
    "AUROC": lambda: tm.AUROC(task="multiclass", num_classes=3),
    "BinnedAUROC": lambda: tm.AUROC(task="multiclass", num_classes=3, thresholds=20),
    "Calibration": lambda: tm.CalibrationError(task="multiclass", num_classes=3, n_bins=5),
    "Classwise": lambda: tm.ClasswiseWrapper(tm.Precision(task="multiclass", num_classes=3, average=None)),
    "MinMax": lambda: tm.MinMaxMetric(tm.Accuracy(task="multiclass", num_classes=3)),
    "Collection": lambda: tm.MetricCollection(
        {
            "recall": tm.Recall(task="multiclass", num_classes=3),
            "top2": tm.Accuracy("multiclass", num_classes=3, top_k=2),
        }
    ),
    "Spread": Spread,
    "Alien": Alien,
    "Holder": Holder,
    "right": lambda: right,
    "right_of_each": lambda: partial(right_of_each, classes=2),
    "several": lambda: several,
    "functional": lambda: partial(tmf.accuracy, task="multiclass", num_classes=3),
}
NUMBERS: dict[str, Callable[[], Any]] = {
    "MSE": tm.MeanSquaredError,
    "R2": tm.R2Score,
    "Explained": tm.ExplainedVariance,
    "Pearson": lambda: tm.PearsonCorrCoef(num_outputs=2),
    "Spearman": lambda: tm.SpearmanCorrCoef(num_outputs=2),
    "Each": lambda: tm.MultioutputWrapper(tm.MeanAbsoluteError(), num_outputs=2),
    "MSELoss": torch.nn.MSELoss,
}


def classes_of(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, generator=generator).softmax(1), torch.randint(3, (size,), generator=generator)


def numbers_of(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    target = torch.randn(size, 2, generator=generator)
    return target + 0.5 * torch.randn(size, 2, generator=generator), target


CASES = {"classes": (CLASSES, classes_of), "numbers": (NUMBERS, numbers_of)}


def figures_of(ranks: Ranks) -> dict[str, dict[str, float]]:
    """What this rank computes of every case and size, each computed twice, as in two validations."""
    result = {}
    for case, (makers, data) in CASES.items():
        metrics = Metrics(makers, ranks, CPU)
        for size_name, size in SIZES.items():
            output, target = data(size)
            for _ in range(2):
                metrics.reset()
                for number, (_, *indices) in enumerate(EvaluationShard(size, ranks.rank, ranks.world_size, BATCH)):
                    metrics.update(
                        output[indices], target[indices], ranks.rank + number * ranks.world_size, len(indices)
                    )
                figures = metrics.compute()
                cells = {f"{name}, cell {at}": value for name, table in metrics.tables.items()
                         for at, value in enumerate(itertools.chain(*table))}  # fmt: skip
                result[f"{case}, {size_name}"] = figures | cells
    return result


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    """One gloo rank."""
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found = figures_of(Ranks(rank, rank, world_size, CPU))
    (folder / f"{world_size}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def without_torchmetrics_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, float]]:
    return figures_of(Ranks(0, 0, 1, CPU))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, float]]]]:
    """Each rank's figures, by the number of ranks. The imports are paid for once, by the server that forks them."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torchmetrics", "dtrain.metrics", "dtrain.distributed.process_group", "dtrain.dataloader"]
    )
    processes = [context.Process(target=rank_main, args=(rank, n, folder)) for n in WORLDS for rank in range(n)]
    for process in processes:
        process.start()
    end = time.monotonic() + 250
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    running = [process for process in processes if process.is_alive()]
    for process in running:
        process.kill()
    assert not running
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in WORLDS}


ALL = [f"{case}, {size}" for case in CASES for size in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", ALL)
def test_the_figures_of_several_ranks_are_those_of_one_process(
    case: str,
    world_size: int,
    alone: dict[str, dict[str, float]],
    of_ranks: dict[int, list[dict[str, dict[str, float]]]],
) -> None:
    expected, found = alone[case], of_ranks[world_size][0][case]
    assert found.keys() == expected.keys()
    different = {
        name: (value, expected[name])
        for name, value in found.items()
        if not (math.isclose(value, expected[name], rel_tol=1e-6, abs_tol=1e-6) or (value != value != expected[name]))
    }
    assert different == {}


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_has_the_figures(world_size: int, of_ranks: dict[int, list[dict[str, dict[str, float]]]]) -> None:
    first, *others = (json.dumps(figures, sort_keys=True) for figures in of_ranks[world_size])
    assert all(figures == first for figures in others)


def test_one_process_gives_torchmetrics_own_figures_over_the_whole_set(alone: dict[str, dict[str, float]]) -> None:
    output, target = classes_of(37)
    found = alone["classes, many"]
    for name in ("Accuracy", "F1", "AUROC", "BinnedAUROC", "Calibration"):
        metric = CLASSES[name]()
        assert found[name] == pytest.approx(float(metric(output, target)))
    assert found["right"] == pytest.approx(float(right(output, target)))
    output, target = numbers_of(37)
    for name in ("MSE", "R2", "Explained", "MSELoss"):
        assert alone["numbers, many"][name] == pytest.approx(float(NUMBERS[name]()(output, target)))
    pearson = tmf.pearson_corrcoef(output, target)
    assert [alone["numbers, many"][f"Pearson_{index}"] for index in (0, 1)] == pytest.approx(pearson.tolist())


# The names of figures


def test_a_vector_gives_its_mean_and_its_elements(alone: dict[str, dict[str, float]]) -> None:
    found = alone["classes, many"]
    parts = [found[f"PerClass_{index}"] for index in range(3)]
    assert found["PerClass"] == pytest.approx(sum(parts) / 3)
    assert {name for name in found if name.startswith("right_of_each")} == {
        "right_of_each", "right_of_each_0", "right_of_each_1",
    }  # fmt: skip
    output, target = classes_of(SIZES["many"])
    cells = [float(((target == row) & (output.argmax(1) == column)).sum()) for row in range(3) for column in range(3)]
    assert {name: value for name, value in found.items() if name.startswith("Confusion")} == {
        f"Confusion, cell {at}": value for at, value in enumerate(cells)
    }, "a table, and no figures"


def test_a_dict_gives_a_figure_for_each_key(alone: dict[str, dict[str, float]]) -> None:
    found = alone["classes, many"]
    assert found["several_right"] == pytest.approx(found["right"])
    assert {name for name in found if name.startswith("Collection")} == {"Collection_recall", "Collection_top2"}
    assert {name for name in found if name.startswith("Classwise")} == {
        f"Classwise_multiclassprecision_{index}" for index in range(3)
    }
    assert found["Alien_batches"] == 10


def test_a_class_without_samples_does_not_spoil_the_mean() -> None:
    metrics = metrics_of(lambda: lambda output, target: torch.tensor([0.5, math.nan]))
    metrics.update(torch.zeros(2), torch.zeros(2), 0)
    found = metrics.compute()
    assert found["metric"] == 0.5
    assert math.isnan(found["metric_1"])


def test_a_figure_for_each_sample_is_refused_once_a_batch_is_shorter() -> None:
    metrics = metrics_of(lambda: lambda output, target: (output == target).float())
    for number, size in enumerate([4, 4, 1]):
        metrics.update(torch.zeros(size), torch.zeros(size), number, size)
    with pytest.raises(ValueError, match=r"a list of 1 for one batch and of 4 for another") as refusal:
        metrics.compute()
    assert refusal.value.__notes__ == ["in the metric metric"]


# Around the figures


def metrics_of(maker: Callable[[], Any]) -> Metrics:
    return Metrics({"metric": maker}, Ranks(0, 0, 1, CPU), CPU)


def test_a_validation_forgets_the_one_before() -> None:
    for maker in (Alien, tm.MeanSquaredError, lambda: lambda output, target: output.mean()):
        metrics = metrics_of(maker)
        found = []
        for value in (1.0, 5.0, 1.0):
            metrics.reset()
            metrics.update(torch.full((2,), value), torch.zeros(2), 0)
            found.append(metrics.compute())
        assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("form", ["tensor", "array", "dict"])
def test_a_function_may_return_the_same_object_for_each_batch(form: str) -> None:
    held: dict[str, Any] = {"tensor": torch.zeros(()), "array": np.zeros(()), "dict": {"part": 0.0}}

    def largest(output: Tensor, target: Tensor) -> Any:
        if form == "dict":
            held["dict"]["part"] = float(output.max())
        else:
            held[form][...] = float(output.max())
        return held[form]

    metrics = Metrics({"Largest": lambda: largest}, Ranks(0, 0, 1, CPU), CPU)
    metrics.reset()
    for number, (values, count) in enumerate([([1.0, 2.0, 6.0], 3), ([2.0], 1)]):
        metrics.update(torch.tensor(values), torch.zeros(count), number, count)
    assert [*metrics.compute().values()] == [(3 * 6.0 + 2.0) / 4]


def test_metrics_are_made_when_first_needed_and_once() -> None:
    made: list[int] = []
    metrics = metrics_of(lambda: made.append(1) or Alien())
    assert made == []
    metrics.prepare()
    metrics.reset()
    assert made == [1]


def test_making_a_metric_draws_nothing_from_the_models_generators() -> None:
    before = torch.get_rng_state()
    metrics_of(lambda: torch.nn.Linear(3, 3) and Alien()).prepare()
    assert torch.equal(torch.get_rng_state(), before)


def test_outputs_of_half_precision_are_summed_in_full() -> None:
    metrics = metrics_of(tm.MeanSquaredError)
    for number in range(300):
        metrics.update(torch.full((64,), 0.1, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16), number)
    exact = float(torch.tensor(0.1, dtype=torch.bfloat16).double() ** 2)
    assert metrics.compute()["metric"] == pytest.approx(exact, rel=1e-4)


def test_metrics_look_at_the_main_output() -> None:
    metrics = metrics_of(lambda: right)
    output, target = classes_of(5)
    metrics.update({"aux": torch.zeros(1), "out": output}, (target, torch.zeros(1)), 0)
    assert metrics.compute()["metric"] == pytest.approx(float(right(output, target)))


@pytest.mark.parametrize(
    "maker",
    [
        lambda: tm.Accuracy(task="multiclass", num_classes=3),
        lambda: lambda output, target: 1 / 0,
        lambda: lambda output, target: "high",
    ],
)
def test_an_error_in_a_metric_names_it(maker: Callable[[], Any]) -> None:
    metrics = metrics_of(maker)
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)) as failure:
        metrics.update(torch.zeros(2, 5), torch.full((2,), 7), 0)
        metrics.compute()
    assert "in the metric metric" in failure.value.__notes__


class NoReset:
    def update(self, output: Tensor, target: Tensor) -> None: ...

    def compute(self) -> float:
        return 0.0


def test_what_is_not_a_metric_says_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="metric metric: NoReset is not a function and lacks reset"):
        metrics_of(NoReset).prepare()
    with pytest.raises(TypeError, match="int is not a function and lacks update, compute, reset"):
        metrics_of(lambda: 3).prepare()


def test_a_metric_says_whether_higher_is_better() -> None:
    assert metrics_of(tm.MeanSquaredError).higher_is_better("metric") is False
    assert metrics_of(tm.R2Score).higher_is_better("metric") is True
    assert metrics_of(Alien).higher_is_better("metric") is None


# From a config


def of_config(metrics: Any) -> Metrics:
    sections = {
        "modules": ["test_metrics"],
        "model": {"name": "Identity"},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "loaders": {"name": "TensorDataset", "train": {}},
        "trainer": {"max_epochs": 1},
    }
    return get_evaluation_metric(from_mapping(sections | {"metrics": metrics}), Ranks(0, 0, 1, CPU), CPU)


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        (None, []),
        ({"name": "MeanSquaredError"}, ["MeanSquaredError"]),
        ({"name": "Accuracy", "task": "multiclass", "num_classes": 3}, ["Accuracy"]),
        ({"name": "test_metrics:right"}, ["right"]),
        ({"name": "right_of_each", "classes": 2}, ["right_of_each"]),
        ({"acc": {"name": "right"}, "odd": {"name": "Alien"}}, ["acc", "odd"]),
        ([{"name": "right"}, {"name": "Alien"}], ["right", "Alien"]),
    ],
)
def test_the_labels_of_metrics_from_a_config(metrics: Any, names: list[str]) -> None:
    found = of_config(metrics)
    assert found.names == names == list(found.prepare())


def test_several_names_share_arguments_and_have_their_own() -> None:
    found = of_config(
        {
            "name": ["Accuracy", "Precision", "Alien"],
            "task": "multiclass",
            "num_classes": 3,
            "Precision": {"average": "none"},
        }
    )
    output, target = classes_of(9)
    found.update(output, target, 0)
    figures = found.compute()
    assert figures["Accuracy"] == pytest.approx(float(tmf.accuracy(output, target, "multiclass", num_classes=3)))
    assert "Precision_2" in figures and "Accuracy_2" not in figures


def test_a_metric_may_not_be_called_loss() -> None:
    with pytest.raises(ConfigError, match="'loss' is the loss's own name"):
        of_config({"loss": {"name": "right"}})
