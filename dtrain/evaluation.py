"""One pass over a phase's data: loss and metrics, exact over ranks; knows no training and no optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from dtrain import rng
from dtrain.batch import size
from dtrain.distributed import Ranks
from dtrain.metrics import Metrics


class Outcome(NamedTuple):
    """One batch and what the model made of it."""

    inputs: Any
    output: Any
    target: Any


Forward = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Mapping[str, torch.Tensor], Outcome]]


@torch.no_grad()
@rng.untouched()
def evaluate(
    module: torch.nn.Module, loader: Iterable[Any], forward: Forward, metrics: Metrics, ranks: Ranks
) -> dict[str, float]:
    """Loss (with its terms) and metrics over all ranks' batches, the same on every rank.

    How often and when a training is validated changes no random number that it draws on the CPU.

    Args:
        module: The model without the ranks' wrapper, whose collectives would wait for a rank without batches.
        loader: This rank's batches; every sample of the phase is in one rank's batches, once.
        forward: `forward(module, batch)` gives the loss (mean over the batch), its terms, and the outcome.
        metrics: What is updated and computed; forgotten afterwards.
        ranks: The ranks that share the phase.
    """
    ranks.agree_on_buffers(module)
    module.eval()
    metrics.reset()
    sums: dict[str, tuple[Any, int]] = {}
    for number, batch in enumerate(loader):
        loss, terms, outcome = forward(module, batch)
        count = size(outcome.inputs)
        for name, value in {"loss": loss, **{f"loss_{key}": term for key, term in terms.items()}}.items():
            total, samples = sums.get(name, (0.0, 0))
            sums[name] = (total + value.detach().to(_sum_dtype(value)) * count, samples + count)
        metrics.update(outcome.output, outcome.target, ranks.rank + number * ranks.world_size)
    result = _means_over_ranks(sums, ranks) | metrics.compute()
    metrics.reset()
    return result


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    """Sums over many batches need more digits than a batch's loss has; Apple's GPUs lack them."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def _means_over_ranks(sums: dict[str, tuple[Any, int]], ranks: Ranks) -> dict[str, float]:
    everybody = ranks.gather({name: (float(total), count) for name, (total, count) in sums.items()})
    if everybody is None:
        return ranks.broadcast()
    names = dict.fromkeys(name for rank in everybody for name in rank)
    parts = {name: [rank[name] for rank in everybody if name in rank] for name in names}
    return ranks.broadcast({name: sum(t for t, _ in part) / sum(n for _, n in part) for name, part in parts.items()})
