"""Inference: what a prediction or a test of whole volumes works with, and how the model is called in it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dtrain.config.metric_rules import VOLUMES
from dtrain.distributed.ranks import Ranks
from dtrain.modelloader import Forward
from dtrain.predict.channels_last import CONTIGUOUS, laid_out, lay_out
from dtrain.predict.kept_memory import memory_kept
from dtrain.predict.mirror import mirrored
from dtrain.predict.predictor import Predictor
from dtrain.reporting.progress import Progress

IDLE_SECONDS = 7 * 86400.0  # ranks share a prediction once, before it begins, so one may wait long for another's end


class StoppedError(Exception):
    """A request to stop came between two batches."""


class Result(NamedTuple):
    """How a prediction ended."""

    files: list[Path]  # including those of earlier starts
    made: int  # how many of them this start has made
    stopped: bool  # whether it was asked to stop; the next start continues
    scores: dict[str, list[float]]  # of each file with a label, by the file's name, one figure per class
    metric: str = ""  # which figures


@dataclass(frozen=True)
class Inference:
    """What a prediction or a test of whole volumes works with."""

    predictor: Predictor
    forward: Forward
    model: nn.Module  # what is called: the bare model, or the same compiled
    ranks: Ranks
    progress: Progress
    run_folder: Path  # in which a folder of predictions is made, unless another one is named
    identity: Mapping[str, Any]  # what a prediction depends on besides the predictor's settings and the file read
    has_weights: bool = False  # whether the model has weights to use without a checkpoint
    whole_volumes: Mapping[str, int] = field(default_factory=dict)  # sets that measure them: in every so many epochs
    mirrored: frozenset[str] = frozenset()  # validations of whole volumes that mirror as a prediction does
    is_training: bool = False  # so that the model's tensors are to be left as they are
    asked_to_stop: Callable[[], bool] = bool  # asked after each batch

    def measures_volumes(self, name: str, epoch: int) -> bool:
        """Whether what follows so many whole epochs and another one measures whole volumes, rather than items."""
        return name in self.whole_volumes and (epoch + 1) % self.whole_volumes[name] == 0

    def kind(self, name: str, epoch: int) -> str:
        """What stands before the figures of a set: `val/`, of whole volumes `val/volume/`, but of a test `test/`."""
        is_named = name.startswith("val") and self.measures_volumes(name, epoch)
        return f"{name}/{VOLUMES}" if is_named else f"{name}/"

    def gives(self, figure: str, names: Iterable[str], epoch: int) -> bool:
        """Whether a figure of that name is one of these sets', measured as they are in that epoch."""
        kinds = [self.kind(name, epoch) for name in names]
        return any(figure.startswith(kind) and not figure.startswith(f"{kind}{VOLUMES}") for kind in kinds)

    def of_training(self, module: nn.Module, name: str) -> "Inference":
        """The same for a validation, by its name, of another model, such as the averaged one, within the training."""
        predictor = self.predictor if name in self.mirrored else replace(self.predictor, mirror=None)
        return replace(self, model=module, predictor=predictor, progress=Progress(), is_training=True)

    def output(self, inputs: Any) -> Tensor:
        """The model's main output for inputs of any form, on the model's device; with `mirror`, of images."""
        if not self.predictor.mirror:
            return self._called(inputs)
        images = inputs.to(self.forward.device, non_blocking=True) if isinstance(inputs, Tensor) else inputs
        return mirrored(self._called, images, self.predictor.mirror)

    def _called(self, inputs: Any) -> Tensor:
        try:
            return self.forward.predict(self.model, inputs)
        except RuntimeError:  # a model may depend on its tensors' layout, as `view` does
            if self.is_training:
                raise
            lay_out(self.forward.module, CONTIGUOUS)
            return self.forward.predict(self.model, inputs)

    def advance(self, count: int) -> None:
        """Report so many patches or items as done; StoppedError says that a request to stop came."""
        for _ in range(count):
            self.progress.step()
        if self.asked_to_stop():
            raise StoppedError

    @contextlib.contextmanager
    def channels_last(self) -> Iterator[None]:
        """Lay the model out for the CPU while nothing is trained."""
        module = self.forward.module
        if self.is_training or self.model is not module or self.forward.device.type != "cpu":
            yield
            return
        with memory_kept(), laid_out(module):
            yield
