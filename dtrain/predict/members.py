"""Ensembles and folds: several checkpoints of one model, whose predictions are put together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.weights import load_for_use
from dtrain.config.errors import ConfigError
from dtrain.data.folds import fold_numbers
from dtrain.predict.inference import Inference
from dtrain.predict.predictor import Predictor
from dtrain.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class Members:
    """The checkpoints that predict; their probabilities are averaged, or each predicts what its training never saw.

    They are loaded one after another: there is one set of weights in memory at a time.
    """

    weights: Sequence[str] = ("",)  # of each, what tells it from others
    load: Callable[[int], None] = lambda number: None  # puts its weights into the model; all ranks call it
    folds: Sequence[int] | None = None  # of each volume or item, the one member that predicts it; None: all do

    def of(self, number: int) -> list[int]:
        """The members that predict a volume or an item, in the order in which they do."""
        return [*range(len(self.weights))] if self.folds is None else [self.folds[number]]

    def identity(self, number: int) -> str | list[str]:
        """The weights that a volume's prediction is made with."""
        own = [self.weights[member] for member in self.of(number)]
        return own[0] if len(own) == 1 else own


def checkpoints_of(wishes: Sequence[str | Path]) -> list[Path]:
    """The checkpoints that are meant: each a checkpoint folder, a weight file, a run folder or a pattern of these.

    A run folder stands for its best checkpoint, else its last; a folder of run folders, as a sweep leaves it, for all.

    Raises:
        ConfigError: There is no such file or folder, or a run without any checkpoint.
    """
    found: list[Path] = []
    for wish in wishes:
        path = Path(wish)
        is_pattern = any(sign in str(wish) for sign in "*?[") and not path.exists()
        anchor = Path(path.anchor)
        paths = sorted(anchor.glob(str(path.relative_to(anchor)))) if is_pattern else [path]
        if not paths:
            raise ConfigError(f"--checkpoint: nothing fits the pattern {wish}")
        if not all(each.exists() for each in paths):
            raise ConfigError(f"--checkpoint {wish}: there is no such file or folder")
        found += [checkpoint for each in paths for checkpoint in _in_folder(each)]
    return found


def _in_folder(path: Path) -> list[Path]:
    """The checkpoints of one path; neither a run folder nor one of runs, it is itself one, or will be refused later."""
    if _is_run(path):
        checkpoints = Checkpoints(RunFolder(path).checkpoints)
        chosen = checkpoints.to_use()
        if chosen is None:
            raise ConfigError(f"{RunFolder(path).checkpoints} holds no checkpoint")
        return [chosen]
    runs = runs_in(path)
    return [checkpoint for run in runs for checkpoint in _in_folder(run)] if runs else [path]


def runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder."""
    return sorted(entry for entry in folder.iterdir() if _is_run(entry)) if folder.is_dir() else []


def _is_run(path: Path) -> bool:
    return RunFolder(path).checkpoints.is_dir() and RunFolder(path).run.is_file()


def folds_of(dataset: Any, settings: Mapping[str, Any]) -> list[int]:
    """The fold of each volume or item.

    Raises:
        ConfigError: The dataset does not say what it is split by.
    """
    try:
        return fold_numbers(dataset, settings)
    except ValueError as error:
        raise ConfigError(f"loaders.folds: {error}") from None


class Ensemble(nn.Module):
    """One model with several sets of weights: the logits of the mean of their probabilities.

    The weights are kept on the CPU and loaded into the model one after another, for each batch.

    Args:
        module: The model.
        states: The weights.
        predictor: Says what makes probabilities of outputs.
        called: What is called: the model, or the same compiled. Default: the model.
    """

    def __init__(
        self,
        module: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        predictor: Predictor,
        called: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.module, self.states, self.predictor = module, states, predictor
        self._called = [called or module]  # in a list: it has the same weights, which count once

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """See the class.

        Raises:
            ConfigError: The model has several outputs.
        """
        total: Any = 0
        for number in range(len(self.states)):
            self.load(number)
            output = self._called[0](*inputs, **named)
            if not isinstance(output, Tensor):
                text = f"the model returns a {type(output).__name__}, and the mean of several outputs is not defined"
                raise ConfigError(f"--checkpoint: an ensemble needs one output; {text}: test one checkpoint at a time")
            total = total + self.predictor.activated(output.float())
        return self.logits(total / len(self.states))

    def load(self, number: int) -> nn.Module:
        """The model with one set of weights."""
        self.module.load_state_dict(self.states[number])
        return self._called[0]

    def logits(self, probabilities: Tensor) -> Tensor:
        """What gives these probabilities when it is activated; they may be 1e-7 away from 0 and 1."""
        activation = self.predictor.activation or ("sigmoid" if probabilities.shape[1] == 1 else "softmax")
        if activation == "softmax":
            return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return probabilities.logit(1e-7) if activation == "sigmoid" else probabilities


def load_to_test(
    inference: Inference,
    called: nn.Module,
    checkpoints: Checkpoints,
    wish: str | Path | Sequence[str | Path] | None,
    criterion: Any,
) -> tuple[nn.Module, int | None, Path | None]:
    """Load the weights to be tested; of several checkpoints an ensemble is made. All ranks call it.

    Args:
        inference: Has the model.
        called: The model, or the same compiled.
        checkpoints: The run's, whose best or last is loaded where nothing else is wanted.
        wish: One or several of what `checkpoints_of` takes.
        criterion: The loss, whose weights are loaded, too.

    Returns:
        What is to be called, the step of the last weights, and where the first ones are.
    """
    wishes = [] if wish is None else [wish] if isinstance(wish, str | Path) else wish
    paths: list[Path | None] = [*inference.ranks.decide(lambda: checkpoints_of(wishes))] or [None]
    module, states, step = inference.forward.module, [], None
    for path in paths:
        step = load_for_use(module, inference.ranks, checkpoints, path, criterion=criterion)
        if len(paths) > 1:
            states.append({key: value.cpu().clone() for key, value in module.state_dict().items()})
    return (Ensemble(module, states, inference.predictor, called) if states else called), step, paths[0]
