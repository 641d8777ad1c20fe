"""dtrain check: one batch of each phase, forward and, in training, backward; trains nothing, writes nothing."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from dtrain.training.evaluate import evaluate

if TYPE_CHECKING:
    from dtrain.trainer import Trainer


def rehearse(trainer: "Trainer") -> Iterator[str]:
    """Try one batch of each phase, and the metrics; yields a line for each."""
    loss, _, _ = trainer.outcome(trainer.model, next(iter(trainer.train_loader.epoch(0))).batch)
    loss.backward()
    trainer.optimizer.zero_grad()
    yield f"train: one batch forward and backward, loss {float(loss.detach()):.4g}"
    for phase in ("val", "test"):
        if (loader := getattr(trainer.loaders, phase)) is not None:
            figures = evaluate(trainer.compiled, islice(loader, 1), trainer.outcome, trainer.metrics, trainer.ranks)
            told = (f"{name} {value:.4g}" for name, value in (figures or {}).items())
            yield f"{phase}: one batch, {', '.join(told)}"
