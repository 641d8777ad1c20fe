"""get_evaluation_metric: the metrics that the config names, exact over all ranks.

Four forms: a torchmetrics.Metric (its states are gathered once and reduced as it says), a class of monai.metrics (its
values of each sample are gathered), any object with update, compute and reset (the main rank replays all batches in
order), a plain function f(output, target) (mean over samples).
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from ml_collections import ConfigDict

from dtrain.config.build import make
from dtrain.config.errors import ConfigError
from dtrain.config.metric_rules import CONFUSION
from dtrain.config.schema import calls, refused
from dtrain.data import rng
from dtrain.data.confusion import Batch, family_of, take_in
from dtrain.data.heads import main_pair, shows_outputs
from dtrain.data.kept_attributes import KeptAttributes
from dtrain.data.monai_inputs import Activation, kind_of, monai_inputs
from dtrain.distributed.ranks import Ranks


def metric_settings(
    *,
    output_key: str | int | list[str | int] | None = None,
    target_key: str | int | list[str | int] | None = None,
    activation: Literal["softmax", "sigmoid", "none"] | None = None,
) -> dict[str, Any]:
    """Dtrain's own keys of a metric; the other keys are the metric's.

    Args:
        output_key: Which of a model's several outputs is measured: a key of a dict, an index of a tuple, a field; a
            list gives a dict of those. Default: what is under the key that outputs and targets share, else the main.
        target_key: The same of the target. Default: output_key, where the target has it.
        activation: For the classes of monai.metrics, which want probabilities or masks: what makes them of the output.
            Default: sigmoid for one channel, softmax for several. 'none': the model gives probabilities.
    """
    return dict(locals())


class Metrics:
    """All metrics of a training, updated batch by batch and computed over every rank's batches at once.

    They are made when first needed: importing torchmetrics takes seconds, which the first step need not wait for.
    `settings` has the `metric_settings` of some of them.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Any]],
        ranks: Ranks,
        device: torch.device,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._makers, self._ranks, self._device, self._settings = makers, ranks, device, settings or {}
        self._metrics: dict[str, Any] | None = None
        self._has_several = False  # outputs, the model: a batch has shown it
        self.names = list(makers)  # the labels under which they are logged
        self.kept = KeptAttributes(device, with_buffers=True)  # what they keep from one validation to the next
        self.tables: dict[str, list[list[float]]] = {}  # of the last evaluation, its confusion matrices

    def prepare(self) -> dict[str, Any]:
        """Make the metrics, once.

        Raises:
            TypeError: One of them has none of the four forms.
            ConfigError: One of MONAI's wants what is not known here.
        """
        if self._metrics is None:
            with rng.untouched():  # a metric with a network of its own draws weights; when it is made must not matter
                self._metrics = {name: self._adapted(name, make_one()) for name, make_one in self._makers.items()}
            self.kept.begin({name: metric.metric for name, metric in self._metrics.items()})
        return self._metrics

    def higher_is_better(self, name: str, part: str = "") -> bool | None:
        """What the metric says of itself, or of one part of its result; None when it says nothing."""
        return _higher_is_better(self.prepare()[name].metric, part)

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.prepare().values():
            metric.reset()

    def update(self, output: Any, target: Any, number: int, samples: int = 1) -> None:
        """Take in outputs and targets of one batch of so many samples, numbered over all ranks.

        Raises:
            ConfigError: It takes a key to tell which of them a metric compares.
        """
        batches: dict[str, Batch] = {}  # by the keys that say what of the model's and the data's is compared
        for name, metric in self.prepare().items():
            with _named(name):
                keys = self._settings.get(name, {})
                compared = repr((keys.get("output_key"), keys.get("target_key")))
                if compared not in batches:
                    batches[compared] = Batch(*self._pair(name, output, target, samples))
                metric.update(batches[compared], number, samples)

    def _pair(self, name: str, output: Any, target: Any, samples: int) -> tuple[Any, Any]:
        """What a metric compares."""
        if output is None:
            text = "the model returned its loss in eval mode, and no predictions that could be measured"
            raise ConfigError(f"metrics.{name}: {text}; let it return them beside the loss, or remove metrics")
        try:
            keys = self._settings.get(name, {})
            # A model that has once returned several outputs does so in a batch of just as many samples, too.
            self._has_several = self._has_several or shows_outputs(output, samples)
            samples = 0 if self._has_several else samples
            measured, wanted = main_pair(output, target, keys.get("output_key"), keys.get("target_key"), samples)
        except ValueError as error:
            raise ConfigError(f"metrics.{name}: {error}") from None
        return _full_precision(measured), wanted

    def compute(self) -> dict[str, float]:
        """The figures over all ranks' batches, the same on every rank. A vector gives its mean and its elements.

        A confusion matrix gives none: it is in `tables` afterwards, one of several labels under <name>_<label>.
        """
        figures: dict[str, float] = {}
        self.tables = {}
        for name, metric in self.prepare().items():
            with _named(name):
                value = metric.compute(self._ranks)
                is_confusion = CONFUSION in f"{name} {_name_of(metric.metric)}".lower()
                tables = _matrices(name, value) if is_confusion else {}
                self.tables |= tables
                figures |= {} if tables else _figures(name, value)
        return figures

    def _adapted(self, name: str, metric: Any) -> Any:
        lacking = [method for method in ("update", "compute", "reset") if not callable(getattr(metric, method, None))]
        for torchmetric in _torchmetrics_in(metric):
            torchmetric.distributed_available_fn = bool  # false: gathered here, once; its own would wait for all
        for held in _held_by(metric):
            if kind_of(held) is not None and hasattr(held, "get_buffer"):
                held.get_buffer = functools.partial(_own_buffer, held)
        if hasattr(metric, "_reductions"):
            return _Reduced(metric.to(self._device))
        kind = kind_of(metric)
        if kind == "":
            text = f"metrics.{name}: dtrain does not know what {_name_of(metric)} of monai.metrics wants of it"
            raise ConfigError(f"{text}; call it in a class of your own with update, compute and reset")
        if kind is not None:
            return _OfMonai(metric, kind, self._settings.get(name, {}).get("activation"))
        if not lacking:
            return _Replayed(metric, at_once=self._ranks.world_size == 1)
        if not callable(metric) or lacking == ["reset"]:
            kind = type(metric).__name__
            raise TypeError(f"metric {name}: {kind} is not a function and lacks {', '.join(lacking)}")
        return _Averaged(metric.to(self._device) if isinstance(metric, torch.nn.Module) else metric)


class _Reduced:
    """A torchmetrics.Metric. Its own synchronisation needs data on every rank, which an exact shard cannot promise."""

    def __init__(self, metric: Any) -> None:
        self.metric, self.family = metric, family_of(metric)
        self.wants_labels = type(metric).__module__.startswith("torchmetrics.classification.")

    def reset(self) -> None:
        self.metric.reset()

    def update(self, batch: Batch, number: int, samples: int) -> None:
        confusion = batch.confusion(self.family) if self.family else None
        if self.family and confusion is not None and confusion.device.type == self.metric.device.type:
            take_in(self.metric, self.family, confusion)
        else:
            self.metric.update(batch.output, batch.labels() if self.wants_labels else batch.target)

    def compute(self, ranks: Ranks) -> Any:
        if ranks.world_size > 1:
            self._reduce(ranks)
        return ranks.broadcast(_plain(self.metric.compute()) if ranks.is_main else None)

    def _reduce(self, ranks: Ranks) -> None:
        """Put the states of all ranks together on the main rank, by the reductions that the metric declares."""
        metrics = _torchmetrics_in(self.metric)
        summed = [_summed_counts(metric, ranks) if ranks.has_several_nodes else {} for metric in metrics]
        own = []
        for metric, counts in zip(metrics, summed, strict=True):
            left = {name: state for name, state in metric.metric_state.items() if name not in counts}
            own.append((metric._update_count, _moved(left, "cpu")))
        of_ranks = ranks.gather(own)
        if of_ranks is None:
            return
        for metric, counts, counted_states in zip(metrics, summed, zip(*of_ranks, strict=True), strict=True):
            states = [state for updates, state in counted_states if updates]
            for name, reduction in metric._reductions.items() if states else ():
                if name in counts:
                    setattr(metric, name, counts[name].to(metric.device))
                    continue
                values = [_moved(state[name], metric.device) for state in states]
                if isinstance(values[0], list):
                    setattr(metric, name, [item for value in values for item in value])
                else:
                    stacked = torch.stack(values)
                    setattr(metric, name, stacked if reduction is None else reduction(stacked))


def _summed_counts(metric: Any, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Counts that a metric adds up, added up over the ranks: exact in any order, and nobody needs those of each rank.

    A confusion matrix of 1,000 classes has 8 MB, which from each of thousands of ranks would be more than a node has.
    """
    from torchmetrics.utilities.data import dim_zero_sum

    counts = {}
    for name, state in metric.metric_state.items():
        if metric._reductions[name] is dim_zero_sum and isinstance(state, torch.Tensor) and state.dtype == torch.int64:
            own = state.detach().to("cpu", copy=True)
            counts[name] = ranks.sum_(own if metric._update_count else own.zero_())
    return counts


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

    def update(self, batch: Batch, number: int, samples: int) -> None:
        output, target = _moved(batch.output, "cpu"), _moved(batch.target, "cpu")
        if self.at_once:
            self.metric.update(output, target)
        else:
            self.batches.append((number, output, target))

    def compute(self, ranks: Ranks) -> Any:
        for _, output, target in _gathered_in_order(ranks, self.batches):
            self.metric.update(output, target)
        return ranks.broadcast(_plain(self.metric.compute()) if ranks.is_main else None)


class _OfMonai:
    """One of MONAI's: its values of each sample are gathered as they are, and aggregated by the main rank.

    Its own buffer would be gathered by collectives of its own, in which every rank needs data. Numbers of values that
    are not nan, which some return beside the figures (get_not_nans), are left out.
    """

    def __init__(self, metric: Any, kind: str, activation: Activation) -> None:
        self.metric, self.kind, self.activation = metric, kind, activation
        self.values: list[tuple[int, Any]] = []
        if hasattr(metric, "get_not_nans"):
            metric.get_not_nans = False

    def reset(self) -> None:
        self.metric.reset()
        self.values = []

    def update(self, batch: Batch, number: int, samples: int) -> None:
        ignore_index = getattr(self.metric, "ignore_index", None)
        made = self.metric(*monai_inputs(self.kind, batch.output, batch.target, self.activation, ignore_index))
        self.metric.reset()
        self.values.append((number, _moved(made, "cpu")))

    def compute(self, ranks: Ranks) -> Any:
        values = [value for _, value in _gathered_in_order(ranks, self.values)]
        return ranks.broadcast(_plain(self._aggregated(values)) if ranks.is_main else None)

    def _aggregated(self, values: list[Any]) -> Any:
        columns = zip(*values, strict=True) if isinstance(values[0], list) else [values]
        buffers = [torch.cat([torch.atleast_1d(item) for item in column]) for column in columns]
        self.metric.get_buffer = lambda: buffers[0] if len(buffers) == 1 else buffers
        result = self.metric.aggregate()
        if not isinstance(result, list):
            return result
        # Of several quantities; 'mean' leaves an axis of one.
        result = [item.squeeze() for item in result]
        names = getattr(self.metric, "metric_name", ())
        return dict(zip(names, result, strict=True)) if len(result) > 1 else result[0]


class _Averaged:
    """A plain function of one batch: its mean over the samples."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.metric = function
        self.values: list[tuple[int, int, Any]] = []

    def reset(self) -> None:
        self.values = []

    def update(self, batch: Batch, number: int, samples: int) -> None:
        # As numbers at the end alone: a device would be waited for.
        self.values.append((number, samples, _copied(self.metric(batch.output, batch.target))))

    def compute(self, ranks: Ranks) -> Any:
        values = _gathered_in_order(ranks, [(number, count, _plain(value)) for number, count, value in self.values])
        return ranks.broadcast(_mean([(count, value) for _, count, value in values]) if ranks.is_main else None)


def _name_of(metric: Any) -> str:
    """A function's or a class's name."""
    metric = getattr(metric, "func", metric)
    return str(getattr(metric, "__name__", type(metric).__name__))


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
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, Mapping):
        return {key: _full_precision(item) for key, item in value.items()}
    return [_full_precision(item) for item in value] if type(value) in (list, tuple) else value


def _torchmetrics_in(metric: Any) -> list[Any]:
    """The torchmetrics in a metric: itself, the members of a collection or wrapper, what an object holds."""
    if isinstance(metric, torch.nn.Module):
        return [module for module in metric.modules() if hasattr(module, "_reductions")]
    return [found for item in _held_by(metric) if isinstance(item, torch.nn.Module) for found in _torchmetrics_in(item)]


def _held_by(metric: Any) -> list[Any]:
    """What an object's attributes are, and what is in those that are lists or dicts."""
    held = list(getattr(metric, "__dict__", {}).values())
    held += [item for value in held if isinstance(value, list | tuple) for item in value]
    return held + [item for value in held if isinstance(value, dict) for item in value.values()]


def _own_buffer(metric: Any) -> Any:
    """What a metric of MONAI has collected in this process; its own get_buffer waits for all ranks."""
    buffers = [torch.stack(items) for items in metric._buffers or ()]
    return buffers[0] if len(buffers) == 1 else buffers


def _higher_is_better(metric: Any, part: str) -> bool | None:
    """What a metric says of one part of its result ('': of all of it), for itself or by what it collects or wraps."""
    metric = getattr(metric, "func", metric)  # with arguments, a function is a partial
    said = getattr(metric, "higher_is_better", None)
    if isinstance(said, Mapping):
        said = said.get(part)
    if said is not None:
        return bool(said)
    is_torchmetrics_own = type(metric).__module__.startswith("torchmetrics.")
    if type(metric).__name__ == "CompositionalMetric":  # 1 - metric goes the other way
        return None
    if not isinstance(metric, torch.nn.Module) or not is_torchmetrics_own or part == "std":  # a spread is not a quality
        return None
    items: Any = getattr(metric, "items", {}.items)  # those of a collection
    members: dict[str, Any] = dict(items())
    fitting = [name for name in members if part == name or part.startswith(f"{name}_")]
    if fitting:
        name = max(fitting, key=len)
        return _higher_is_better(members[name], part[len(name) + 1 :])
    answers = {_higher_is_better(item, part) for item in members.values() or _held(metric)}
    return answers.pop() if len(answers) == 1 else None


def _held(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost metrics inside a wrapper."""
    for child in module.children():
        yield from [child] if hasattr(child, "higher_is_better") else _held(child)


def _mean(weighted: list[tuple[int, Any]]) -> Any:
    """The mean of numbers, of lists element by element, or of dicts key by key."""
    first = weighted[0][1]
    if isinstance(first, dict):
        return {key: _mean([(count, value[key]) for count, value in weighted]) for key in first}
    if isinstance(first, list):
        lengths = sorted({len(value) for _, value in weighted})
        if len(lengths) > 1:
            text = f"returned a list of {lengths[0]} for one batch and of {lengths[-1]} for another"
            raise ValueError(f"{text}; a metric of a batch is one number (the mean), or one for each class")
        return [_mean([(count, value[index]) for count, value in weighted]) for index in range(len(first))]
    return sum(count * value for count, value in weighted) / sum(count for count, _ in weighted)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list | tuple) else value


def _copied(value: Any) -> Any:
    """What a function returned as it is now: it may return the same tensor, array or dict again, with other values."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts of what a metric returned."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double().tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else float(value)


def _matrices(name: str, value: Any) -> dict[str, list[list[float]]]:
    """The square matrices in a metric's result, by name; {} where it is anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return {}
    if all(isinstance(row[0], list) for row in value if row):
        found = [_matrices(f"{name}_{number}", item) for number, item in enumerate(value)]
        return {key: table for part in found for key, table in part.items()} if all(found) else {}
    return {name: value} if all(len(row) == len(value) for row in value) else {}


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
    settings = {key.removeprefix("metric."): make(call) for key, call in described if key.startswith("metric.")}
    return Metrics({label: functools.partial(make, call) for label, call in found.items()}, ranks, device, settings)
