"""One pass over a phase's data: loss and metrics, exact over ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dtrain.config.errors import mark_section
from dtrain.data import rng
from dtrain.data.batch import to_device
from dtrain.distributed.ranks import Ranks
from dtrain.metrics import Metrics
from dtrain.modelloader import Forward, Outcome
from dtrain.reporting.validation_pictures import Album
from dtrain.training.own_step import figure_of


class Measured(NamedTuple):
    """What an evaluation gives, the same on every rank."""

    figures: dict[str, float]
    samples: int  # that they are of
    has_outcomes: bool = True  # which metrics and pictures see; else there are figures alone


@torch.no_grad()
@rng.untouched()
def evaluate(
    step: Callable[[torch.nn.Module, Any], Any],
    module: torch.nn.Module,
    loader: Iterable[tuple[Any, int]],
    metrics: Metrics,
    ranks: Ranks,
    stop: Callable[[], bool] = bool,
    album: Album | None = None,
) -> Measured | None:
    """Loss (with its terms) and metrics over all ranks' batches, the same on every rank; None where a rank stopped.

    How often and when a training is validated changes no random number that it draws on the CPU. `stop` is asked before
    each batch. An error passes on with the number of this rank's batch, `batch_number`, by which its samples are found.

    `step(module, batch)` gives what `Forward` does, or a dict of figures, each the mean over the batch's samples; then
    metrics and pictures see nothing of it.

    `module` is the model without the ranks' wrapper, whose collectives would wait for a rank without batches; a sharded
    one has no wrapper, and is called equally often on all ranks. `loader` gives this rank's batches, each with its
    number of samples, by which its figures weigh; every sample of the phase is in one rank's batches, once.

    Raises:
        ValueError: No rank has a sample.
    """
    ranks.agree_on_buffers(module)
    module.eval()
    metrics.reset()
    own, stopped = _Own(), False
    for number, (batch, count, stopped) in enumerate(ranks.strategy.rounds(_batches(loader), stop)):
        if stopped:
            break
        if batch is None:
            continue
        try:
            outcome = own.add(step(module, batch), count)
            if outcome is None or not count:
                continue
            of_all_ranks = ranks.rank + number * ranks.world_size
            with _from_section("metrics"):
                metrics.update(outcome.output, outcome.target, of_all_ranks, count)
            if album:
                album.see(outcome, of_all_ranks, count)
        except Exception as error:
            error.batch_number = number  # type: ignore[attr-defined]
            raise
    everybody = ranks.gather((None if stopped else own.plain(), album.seen() if album and not stopped else None))
    measured: Measured | None = ranks.broadcast(_measured([own for own, _ in everybody]) if everybody else None)
    if measured is not None:
        with _from_section("loaders"):
            _refuse_none(measured.samples)
        if measured.has_outcomes:
            measured = measured._replace(figures=measured.figures | metrics.compute())
    metrics.reset()
    if album and measured is not None and measured.has_outcomes:
        seen = [seen for _, seen in everybody or ()]
        ranks.strategy.lead(module, step, lambda step: album.draw(seen, module, step))
    return measured


@torch.no_grad()
@rng.untouched()
def evaluate_volumes(
    module: torch.nn.Module,
    outcomes: Iterable[tuple[int, torch.Tensor, Any]],
    metrics: Metrics,
    ranks: Ranks,
    stop: Callable[[], bool] = bool,
    forward: Forward | None = None,
    album: Album | None = None,
) -> dict[str, float] | None:
    """Metrics over whole volumes, each one sample, the same on every rank; None where a rank stopped.

    `outcomes` are this rank's volumes: number, output (1, K, *spatial), target; every volume is one rank's. `stop` is
    asked at the end. With `forward`, its loss and terms, too: their means over the volumes. A loss of several outputs
    has none: of them, one is put together.
    """
    criterion: Any = forward.criterion if forward else None
    ranks.agree_on_buffers(module)
    module.eval()
    metrics.reset()
    own = _Own()
    for number, output, target in outcomes:
        outcome = Outcome(None, output.to(ranks.device), to_device(target, ranks.device))
        is_of_several = forward is not None and forward.gives_several and not criterion.main_only
        with _from_section("loss"):
            told = (None, {}) if criterion is None or is_of_several else criterion(*outcome[1:])
            own.add({} if told[0] is None else (*told, outcome), 1)
        with _from_section("metrics"):
            metrics.update(outcome.output, outcome.target, number, 1)
        if album:
            album.see(outcome, number, 1)
    everybody = ranks.gather((None if stop() else own.plain(), album.seen() if album else None))
    measured: Measured | None = ranks.broadcast(_measured([own for own, _ in everybody]) if everybody else None)
    result = None if measured is None else measured.figures | metrics.compute()
    metrics.reset()
    if album and forward and result is not None:
        seen = [seen for _, seen in everybody or ()]
        ranks.strategy.lead(module, forward, lambda forward: album.draw(seen, module, forward))
    return result


@contextmanager
def _from_section(section: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        mark_section(error, section)
        raise


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    with _from_section("loaders"):
        yield from loader


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    """Sums over many batches need more digits than a batch's loss has; Apple's GPUs lack them."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def _refuse_none(samples: int) -> None:
    if not samples:
        raise ValueError("there is no sample to evaluate: collate_fn left out all of them")


class _Own:
    """What one rank has seen."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Any, int]] = {}  # of each figure, with the samples that it is of
        self.samples, self.has_outcomes = 0, False

    def add(self, result: Any, count: int) -> Outcome | None:
        """One more batch of so many samples, 0 for a dummy one; what metrics see of it."""
        values, outcome = _told(result)
        self.samples, self.has_outcomes = self.samples + count, self.has_outcomes or outcome is not None
        for name, value in values.items() if count else ():
            total, samples = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach().to(_sum_dtype(value)) * count, samples + count)
        return outcome

    def plain(self) -> tuple[dict[str, tuple[float, int]], int, bool]:
        """Sums, samples, and whether metrics have seen any."""
        sums = {name: (float(total), count) for name, (total, count) in self.sums.items()}
        return sums, self.samples, self.has_outcomes


def _measured(of_ranks: list[Any]) -> Measured | None:
    """The means of every rank's sums, each with its number of samples; None where a rank stopped, and has None."""
    if None in of_ranks:
        return None
    sums_of_ranks, samples, have_outcomes = zip(*of_ranks, strict=True)
    names = dict.fromkeys(name for sums in sums_of_ranks for name in sums)
    parts = {name: [sums[name] for sums in sums_of_ranks if name in sums] for name in names}
    means = {name: sum(t for t, _ in part) / sum(n for _, n in part) for name, part in parts.items()}
    return Measured(means, sum(samples), any(have_outcomes))


def _told(result: Any) -> tuple[dict[str, torch.Tensor], Outcome | None]:
    """The figures of one batch, and what metrics see of it.

    Raises:
        TypeError: An `evaluation_step` returned something else.
    """
    if isinstance(result, tuple) and len(result) == 3:
        loss, terms, outcome = result
        if loss is None:  # of a model that computes it in train mode alone
            return {}, outcome
        return {"loss": loss, **{f"loss_{key}": term for key, term in terms.items()}}, outcome
    if not isinstance(result, Mapping):
        expected = "expected a dict of figures, or (loss, terms, outcome) as self.forward gives it"
        raise TypeError(f"evaluation_step returned a {type(result).__name__}; {expected}")
    return {str(name): figure_of("evaluation_step", name, value) for name, value in result.items()}, None
