"""get_evaluation_metric: the metrics that the config names, exact over all ranks.

Three forms: a torchmetrics.Metric (its states are gathered once and reduced as it says), any object with update,
compute and reset (the main rank replays all batches in order), a plain function f(output, target) (mean over samples).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from ml_collections import ConfigDict

from dtrain.config.build import make
from dtrain.config.schema import calls, refused
from dtrain.data import rng
from dtrain.data.batch import main_output
from dtrain.distributed.ranks import Ranks


class Metrics:
    """All metrics of a training, updated batch by batch and computed over every rank's batches at once.

    They are made when first needed: importing torchmetrics takes seconds, which the first step need not wait for.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Any]], ranks: Ranks, device: torch.device) -> None:
        self._makers, self._ranks, self._device = makers, ranks, device
        self._metrics: dict[str, Any] | None = None
        self.names = list(makers)  # the labels under which they are logged

    def prepare(self) -> dict[str, Any]:
        """Make the metrics, once.

        Raises:
            TypeError: One of them has none of the three forms.
        """
        if self._metrics is None:
            with rng.untouched():  # a metric with a network of its own draws weights; when it is made must not matter
                self._metrics = {name: self._adapted(name, make_one()) for name, make_one in self._makers.items()}
        return self._metrics

    def higher_is_better(self, name: str) -> bool | None:
        """What the metric says of itself; None when it says nothing."""
        return getattr(self.prepare()[name].metric, "higher_is_better", None)

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.prepare().values():
            metric.reset()

    def update(self, output: Any, target: Any, number: int, samples: int = 1) -> None:
        """Take in the main output and the main target of one batch of so many samples, numbered over all ranks."""
        output, target = _full_precision(main_output(output)), main_output(target)
        for name, metric in self.prepare().items():
            with _named(name):
                metric.update(output, target, number, samples)

    def compute(self) -> dict[str, float]:
        """The figures over all ranks' batches, the same on every rank. A vector gives its mean and its elements."""
        figures: dict[str, float] = {}
        for name, metric in self.prepare().items():
            with _named(name):
                figures |= _figures(name, metric.compute(self._ranks))
        return figures

    def _adapted(self, name: str, metric: Any) -> Any:
        lacking = [method for method in ("update", "compute", "reset") if not callable(getattr(metric, method, None))]
        for torchmetric in _torchmetrics_in(metric):
            torchmetric.distributed_available_fn = bool  # false: gathered here, once; its own would wait for all
        if hasattr(metric, "_reductions"):
            return _Reduced(metric.to(self._device))
        if not lacking:
            return _Replayed(metric, at_once=self._ranks.world_size == 1)
        if not callable(metric) or lacking == ["reset"]:
            kind = type(metric).__name__
            raise TypeError(f"metric {name}: {kind} is not a function and lacks {', '.join(lacking)}")
        return _Averaged(metric.to(self._device) if isinstance(metric, torch.nn.Module) else metric)


class _Reduced:
    """A torchmetrics.Metric. Its own synchronisation needs data on every rank, which an exact shard cannot promise."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def reset(self) -> None:
        self.metric.reset()

    def update(self, output: Any, target: Any, number: int, samples: int) -> None:
        self.metric.update(output, target)

    def compute(self, ranks: Ranks) -> Any:
        if ranks.world_size > 1:
            self._reduce(ranks)
        return ranks.broadcast(_plain(self.metric.compute()) if ranks.is_main else None)

    def _reduce(self, ranks: Ranks) -> None:
        """Put the states of all ranks together on the main rank, by the reductions that the metric declares."""
        metrics = _torchmetrics_in(self.metric)
        of_ranks = ranks.gather([(metric._update_count, _moved(metric.metric_state, "cpu")) for metric in metrics])
        if of_ranks is None:
            return
        for metric, counted_states in zip(metrics, zip(*of_ranks, strict=True), strict=True):
            states = [state for updates, state in counted_states if updates]
            for name, reduction in metric._reductions.items() if states else ():
                values = [_moved(state[name], metric.device) for state in states]
                if isinstance(values[0], list):
                    setattr(metric, name, [item for value in values for item in value])
                else:
                    stacked = torch.stack(values)
                    setattr(metric, name, stacked if reduction is None else reduction(stacked))


class _Replayed:
    """Any object with update, compute and reset: nothing is known of its state, so one rank sees every batch.

    It gets CPU tensors. With several ranks the batches wait in memory until all are there.
    """

    def __init__(self, metric: Any, at_once: bool) -> None:
        self.metric, self.at_once = metric, at_once
        self.batches: list[tuple[int, Any, Any]] = []

    def reset(self) -> None:
        self.metric.reset()
        self.batches = []

    def update(self, output: Any, target: Any, number: int, samples: int) -> None:
        output, target = _moved(output, "cpu"), _moved(target, "cpu")
        if self.at_once:
            self.metric.update(output, target)
        else:
            self.batches.append((number, output, target))

    def compute(self, ranks: Ranks) -> Any:
        for _, output, target in _gathered_in_order(ranks, self.batches):
            self.metric.update(output, target)
        return ranks.broadcast(_plain(self.metric.compute()) if ranks.is_main else None)


class _Averaged:
    """A plain function of one batch: its mean over the samples."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.metric = function
        self.values: list[tuple[int, int, Any]] = []

    def reset(self) -> None:
        self.values = []

    def update(self, output: Any, target: Any, number: int, samples: int) -> None:
        value = self.metric(output, target)
        self.values.append((number, samples, value.detach() if isinstance(value, torch.Tensor) else value))

    def compute(self, ranks: Ranks) -> Any:
        values = _gathered_in_order(ranks, [(number, count, _plain(value)) for number, count, value in self.values])
        return ranks.broadcast(_mean([(count, value) for _, count, value in values]) if ranks.is_main else None)


def _gathered_in_order(ranks: Ranks, numbered: list[tuple]) -> list[tuple]:
    """What all ranks have of the evaluation's batches, by their number; nothing on the other ranks than the main."""
    of_ranks = ranks.gather(numbered) or []
    return sorted((item for of_rank in of_ranks for item in of_rank), key=lambda item: item[0])


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """An error inside says which metric it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the metric {name}")
        raise


def _full_precision(value: Any) -> Any:
    """Half-precision outputs as float32: sums over a whole phase would lose them."""
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _torchmetrics_in(metric: Any) -> list[Any]:
    """The torchmetrics in a metric: itself, the members of a collection or wrapper, what an object holds."""
    if isinstance(metric, torch.nn.Module):
        return [module for module in metric.modules() if hasattr(module, "_reductions")]
    held = list(getattr(metric, "__dict__", {}).values())
    held += [item for value in held if isinstance(value, list | tuple) for item in value]
    held += [item for value in held if isinstance(value, dict) for item in value.values()]
    return [found for item in held if isinstance(item, torch.nn.Module) for found in _torchmetrics_in(item)]


def _mean(weighted: list[tuple[int, Any]]) -> Any:
    """The mean of numbers, of lists element by element, or of dicts key by key."""
    first = weighted[0][1]
    if isinstance(first, dict):
        return {key: _mean([(count, value[key]) for count, value in weighted]) for key in first}
    if isinstance(first, list):
        return [_mean([(count, value[index]) for count, value in weighted]) for index in range(len(first))]
    return sum(count * value for count, value in weighted) / sum(count for count, _ in weighted)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts of what a metric returned."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double().tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else float(value)


def _figures(name: str, value: Any) -> dict[str, float]:
    """A number under the metric's name; of a dict each entry; of a list the mean and each element."""
    if not isinstance(value, dict | list):
        return {name: float(value)}
    figures: dict[str, float] = {}
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, float | int) and item == item]
        figures |= {name: sum(numbers) / len(numbers)} if numbers else {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        figures |= _figures(f"{name}_{key}", item)
    return figures


def get_evaluation_metric(config: ConfigDict, ranks: Ranks, device: torch.device) -> Metrics:
    """The metrics under `metrics`, by label; their constructors run when they are first needed.

    Raises:
        ConfigError: Two metrics have one label.
    """
    described = calls(config).items() if config.get("metrics") else ()
    found = {key.removeprefix("metrics."): call for key, call in described if key.startswith("metrics.")}
    if "loss" in found:
        raise refused(config, ("metrics",), "'loss' is the loss's own name; give the metric another label")
    return Metrics({label: functools.partial(make, call) for label, call in found.items()}, ranks, device)
