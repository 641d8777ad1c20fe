"""One pass over a phase's data: loss and metrics, exact over ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class Measured(NamedTuple):
    """What an evaluation gives, the same on every rank."""

    figures: dict[str, float]
    samples: int  # that they are of


@torch.no_grad()
@rng.untouched()
def evaluate(
    forward: Forward,
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

    `module` is the model without the ranks' wrapper, whose collectives would wait for a rank without batches; a sharded
    one has no wrapper, and is called equally often on all ranks. `loader` gives this rank's batches, each with its
    number of samples, by which its figures weigh; every sample of the phase is in one rank's batches, once.

    Raises:
        ValueError: No rank has a sample.
    """
    ranks.agree_on_buffers(module)
    module.eval()
    metrics.reset()
    sums: dict[str, tuple[Any, int]] = {}
    stopped = False
    for number, (batch, count, stopped) in enumerate(ranks.strategy.rounds(_batches(loader), stop)):
        if stopped:
            break
        if batch is None:
            continue
        try:
            loss, terms, outcome = forward(module, batch)
            if not count:
                continue
            of_all_ranks = ranks.rank + number * ranks.world_size
            for name, value in {"loss": loss, **{f"loss_{key}": term for key, term in terms.items()}}.items():
                total, samples = sums.get(name, (0.0, 0))
                sums[name] = (total + value.detach().to(_sum_dtype(value)) * count, samples + count)
            with _from_section("metrics"):
                metrics.update(outcome.output, outcome.target, of_all_ranks, count)
            if album:
                album.see(outcome, of_all_ranks, count)
        except Exception as error:
            error.batch_number = number  # type: ignore[attr-defined]
            raise
    own = None if stopped else {name: (float(total), count) for name, (total, count) in sums.items()}
    everybody = ranks.gather((own, album.seen() if album and not stopped else None))
    own_result = _measured([its_sums for its_sums, _ in everybody]) if everybody else None
    measured: Measured | None = ranks.broadcast(own_result)
    result = None
    if measured is not None:
        with _from_section("loaders"):
            _refuse_none(measured.samples)
        result = measured._replace(figures=measured.figures | metrics.compute())
    metrics.reset()
    if album and result is not None:
        seen = [seen for _, seen in everybody or ()]
        ranks.strategy.lead(module, forward, lambda forward: album.draw(seen, module, forward))
    return result


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
    sums: dict[str, tuple[float, int]] = {}
    for number, output, target in outcomes:
        output, target = output.to(ranks.device), to_device(target, ranks.device)
        with _from_section("loss"):
            is_of_several = forward is not None and forward.gives_several and not criterion.main_only
            loss, terms = (None, {}) if criterion is None or is_of_several else criterion(output, target)
        named = {} if loss is None else {"loss": loss, **{f"loss_{key}": term for key, term in terms.items()}}
        for name, value in named.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + float(value), count + 1)
        with _from_section("metrics"):
            metrics.update(output, target, number, 1)
        if album:
            album.see(Outcome(None, output, target), number, 1)
    everybody = ranks.gather((None if stop() else sums, album.seen() if album else None)) or []
    own = [sums for sums, _ in everybody]
    means: dict[str, float] | None = ranks.broadcast(None if None in own else _means(own))
    result = None if means is None else means | metrics.compute()
    metrics.reset()
    if album and forward and result is not None:
        ranks.strategy.lead(
            module, forward, lambda forward: album.draw([seen for _, seen in everybody], module, forward)
        )
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


def _measured(sums_of_ranks: list[Any]) -> Measured | None:
    """The means of every rank's sums, each with its number of samples; None where a rank stopped, and has None."""
    if None in sums_of_ranks:
        return None
    return Measured(_means(sums_of_ranks), sum(sums["loss"][1] for sums in sums_of_ranks if "loss" in sums))


def _means(sums_of_ranks: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    names = dict.fromkeys(name for sums in sums_of_ranks for name in sums)
    parts = {name: [sums[name] for sums in sums_of_ranks if name in sums] for name in names}
    return {name: sum(total for total, _ in part) / sum(count for _, count in part) for name, part in parts.items()}
