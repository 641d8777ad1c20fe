"""What a trained model is asked for: predictions, and figures of whole volumes. Knows a trainer, but no config."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtrain import batch as batches
from dtrain import rng
from dtrain.checkpoint import CheckpointError, load, load_weights
from dtrain.desk import Result, Work, agreed
from dtrain.items import predict_items
from dtrain.modelloader import misfits_of
from dtrain.parts import digest
from dtrain.predict import Steps
from dtrain.stitch import Network, StoppedError
from dtrain.yamlfile import ConfigError

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

FOLDER = "predictions"


def load_for_use(trainer: "Trainer", checkpoint: Path | None) -> str:
    """Give every rank the weights to be used: the averaged ones where a checkpoint has them.

    Args:
        trainer: Whose model gets them.
        checkpoint: A checkpoint folder or a weight file. Default: the best, else the last, else `trainer.pre_trained`,
            whose weights the model has.

    Returns:
        A digest of the weights.

    Raises:
        ConfigError: There is none, or it does not fit the model.
    """

    def decide() -> list[str]:
        path = checkpoint or trainer.checkpoints.best() or trainer.checkpoints.last()
        if path is not None:
            _load(trainer.module, path)
        elif not trainer.parts.pre_trained:
            raise ConfigError(
                f"{trainer.checkpoints.folder} holds no checkpoint; train first, or name one: --checkpoint"
            )
        return [_digest(trainer.module.state_dict())]

    found: list[str] = agreed(trainer.ranks, decide)
    trainer.ranks.share_weights(trainer.module)
    return found[0]


def _load(module: torch.nn.Module, path: Path) -> None:
    try:
        if path.is_dir():
            loaded = load(path)
            weights = loaded.ema or loaded.weights
        else:
            weights = load_weights(path)
    except (CheckpointError, OSError) as error:
        raise ConfigError(str(error)) from error
    if misfits := misfits_of(module, weights):
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise ConfigError(f"{path} does not fit the model: {'; '.join(misfits[:5])}{more}")
    module.load_state_dict(weights)


def _digest(weights: Mapping[str, Any]) -> str:
    """One short text for weights, the same on any device."""
    result = hashlib.sha256()
    for name, value in weights.items():
        result.update(name.encode())
        if isinstance(value, torch.Tensor):
            result.update(f"{value.dtype}{tuple(value.shape)}".encode())
            result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def predict(
    trainer: "Trainer", checkpoint: str | Path | None, output_dir: str | Path | None, overwrite: bool
) -> Result:
    """Predict what `loaders.predict` holds, else `loaders.test`, into files. All ranks call it.

    Args:
        trainer: With the model.
        checkpoint: See `load_for_use`. Default: the predictor's own.
        output_dir: Where the files go. Default: the predictor's own, else `predictions` in the run folder.
        overwrite: Make files anew that were made with another model or other settings.

    Raises:
        ConfigError: There is nothing to predict, no checkpoint, or a file that is not to be written.
        PredictionError: A file cannot be written.
    """
    loader = trainer.loaders.predict or trainer.loaders.test
    if loader is None:
        raise ConfigError("loaders: has neither 'predict' nor 'test', so there is nothing to predict")
    predictor = trainer.parts.predictor
    wanted = checkpoint or predictor.checkpoint
    weights = load_for_use(trainer, Path(wanted) if wanted else None)
    folder = Path(output_dir or predictor.output_dir or trainer.parts.start.folder / FOLDER)
    identity = {"weights": weights, "model and data": digest(trainer.parts.identity), "precision": trainer.precision}
    with trainer.stop_request.listening(), rng.untouched():
        trainer.compiled.eval()
        work = _work(trainer, identity)
        dataset = loader.dataset.dataset  # the loader's own wraps it
        if hasattr(dataset, "volumes"):
            size = loader.batch_sampler.batch_size
            return predictor.volumes(dataset, work, folder, overwrite, size)
        work = work._replace(network=work.network._replace(activation=predictor.activated))
        own = sum(len(request) - 1 for request in loader.batch_sampler)
        step = Steps(work, own)
        return predict_items(predictor, loader, _inputs(trainer), work, folder, overwrite, step)


def outcomes_of_volumes(trainer: "Trainer", loader: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's whole volumes with their logits and labels, for metrics; see `Predictor.logits`."""
    work = _work(trainer, {})
    try:
        yield from trainer.parts.predictor.logits(loader.dataset.dataset, work, loader.batch_sampler.batch_size)
    except StoppedError:
        return


def _work(trainer: "Trainer", identity: Mapping[str, Any]) -> Work:
    def forward(inputs: Any) -> Tensor:
        inputs = batches.to_device(inputs, trainer.device) if trainer.device.type != "cpu" else inputs
        with trainer.autocast():
            return batches.main_output(batches.caller(trainer.module, inputs)(trainer.compiled, inputs))

    network = Network(forward, lambda logits: logits, trainer.device)
    return Work(network, trainer.ranks, trainer.progress, trainer.asked_to_stop, identity)


def _inputs(trainer: "Trainer") -> Any:
    return lambda batch: batches.inputs(batch, trainer.input_key, trainer.target_key)
