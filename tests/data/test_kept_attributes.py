"""Plain attributes that change between calls come back as they were; what the config made stays the config's."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.checkpoint.contents import take_snapshot
from dtrain.data.kept_attributes import KeptAttributes

CPU = torch.device("cpu")


class Ramp:
    """Attributes of every form."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls, self.best = factor, 0, None
        self.history: list[Any] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.counts, self.mean = np.zeros(3), torch.zeros(2)
        self.by_class: dict[str, float] = {}
        self.function = abs

    def step(self) -> None:
        self.calls += 1
        self.best = np.float64(0.5 * self.calls)
        self.history.append((self.calls, "step"))
        self.recent.append(float(self.calls))
        self.counts[1] += 1
        self.mean = self.mean + 2
        self.by_class["a"] = 0.1 * self.calls


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inner = 0, nn.Linear(1, 1)
        self.inner.shown = ""
        self.register_buffer("seen", torch.zeros(1))
        self.graph: Any = None


def kept_by(with_buffers: bool = False, **objects: Any) -> KeptAttributes:
    kept = KeptAttributes(CPU, with_buffers)
    kept.begin(objects)
    return kept


def test_what_has_changed_is_saved_and_put_back() -> None:
    one = Ramp()
    kept = kept_by(loss=one)
    assert kept.state_dict() == {}
    for _ in range(3):
        one.step()
    state = take_snapshot({}, kept.state_dict()).state
    one.step()  # what was saved is a copy
    other = Ramp(factor=7.0)
    kept_by(loss=other).load_state_dict(state)
    assert (other.calls, other.best, other.history) == (3, 1.5, [(1, "step"), (2, "step"), (3, "step")])
    assert other.recent == deque([2.0, 3.0]) and other.recent.maxlen == 2
    assert other.counts.tolist() == [0, 3, 0] and other.mean.tolist() == [6, 6]
    assert other.by_class == {"a": pytest.approx(0.3)} and other.function is abs
    assert other.factor == 7.0, "the config's new value holds"


def test_a_state_of_before_takes_later_changes_back() -> None:
    one = Ramp()
    kept = kept_by(loss=one)
    one.step()
    kept.load_state_dict({})
    assert (one.calls, one.best, one.history, one.mean.tolist()) == (0, None, [], [0, 0])


def test_what_is_loaded_before_the_objects_are_made_waits_for_them() -> None:
    kept = KeptAttributes(CPU)
    kept.load_state_dict({"metric.calls": 4})
    assert kept.state_dict() == {"metric.calls": 4}
    one = Ramp()
    kept.begin({"metric": one})
    assert one.calls == 4


def test_modules_are_looked_through_and_their_weights_left_to_others() -> None:
    part = Part()
    kept, with_buffers = kept_by(loss=part), kept_by(True, loss=part)
    part.calls, part.inner.shown = 2, "yes"
    part.graph = part.inner(torch.ones(1))
    part.seen = part.seen + 1
    part.eval()
    assert kept.state_dict() == {"loss.calls": 2, "loss.inner.shown": "yes"}
    assert with_buffers.state_dict() == {"loss.calls": 2, "loss.inner.shown": "yes", "loss:buffers.seen": torch.ones(1)}


def test_a_torchmetrics_own_bookkeeping_is_not_a_state() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())
    both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
    kept = kept_by(True, metric=metric, both=both)
    metric.update(torch.tensor([1.0, 3.0]))
    both.update(torch.tensor([1.0, 3.0]))
    assert metric.compute()["max"] == 2 and both.compute()["SumMetric"] == 4
    for each in (metric, both):
        each.reset()
    found = {name: float(value) for name, value in kept.state_dict().items()}
    assert found == {"metric.min_val": 2, "metric.max_val": 2}, "over all evaluations, as it documents"
