"""What a trained model is asked for: predictions, and figures of whole volumes. Knows a trainer, but no config."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.files import load, load_weights
from dtrain.checkpoint.snapshot import CheckpointError
from dtrain.checkpoint.weights import fitted, misfits_of
from dtrain.config.errors import ConfigError
from dtrain.data import batch as batches
from dtrain.data import rng
from dtrain.predict.items import predict_items
from dtrain.predict.predictor import Predictor
from dtrain.predict.stitching import READING, Network, Run, Source, StoppedError, stitched
from dtrain.predict.work_folder import Folder, digest
from dtrain.predict.writer import Desk, Result, Task, Work, agreed, dealt

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FOLDER = "predictions"
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a convolution's weights
IDLE_SECONDS = 7 * 86400.0  # ranks share a prediction once, before it begins, so one may wait long for another's end


class Use(NamedTuple):
    """How a trained model is used.

    Attributes:
        predictor: The settings of predictions.
        identity: What tells this model and its data from others, besides the weights and the files.
        configured: Whether the config has a section `predictor`: then tests are of whole volumes.
        has_weights: Whether the model has weights without a checkpoint of the run.
    """

    predictor: Predictor
    identity: Mapping[str, Any]
    configured: bool
    has_weights: bool

    def whole_volumes(self, loader: Any) -> bool:
        """Whether a test on this data measures whole volumes."""
        return self.configured and hasattr(loader.dataset.dataset, "volumes")


def autocast(trainer: "Trainer") -> Any:
    """The context of a forward in the trainer's precision."""
    if trainer.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(trainer.device.type, DTYPES[trainer.precision])


def load_for_use(trainer: "Trainer", checkpoint: Path | None, required: bool = False) -> None:
    """Give every rank the weights to be used: the averaged ones where a checkpoint has them.

    Args:
        trainer: Whose model gets them.
        checkpoint: A checkpoint folder or a weight file. Default: the best, else the last.
        required: Refuse to use the model as it is where there is none and it has no weights otherwise.

    Raises:
        ConfigError: There is none, or it does not fit the model.
    """
    weights: Mapping[str, Any] | None = None

    def decide() -> None:
        nonlocal weights
        path = checkpoint or trainer.checkpoints.best() or trainer.checkpoints.last()
        if path is not None:
            weights = _weights_for(trainer.module, path)
        elif required and not trainer.parts.use.has_weights:
            raise ConfigError(
                f"{trainer.checkpoints.folder} holds no checkpoint; train first, or name one: --checkpoint"
            )

    agreed(trainer.ranks, decide)
    trainer.ranks.load_weights(trainer.module, weights)


def _weights_for(module: torch.nn.Module, path: Path) -> Mapping[str, Any]:
    try:
        if path.is_dir():
            loaded = load(path)
            weights = loaded.ema or loaded.weights
        else:
            weights = fitted(module, load_weights(path))
    except (CheckpointError, OSError) as error:
        raise ConfigError(str(error)) from error
    if misfits := misfits_of(module, weights):
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise ConfigError(f"{path} does not fit the model: {'; '.join(misfits[:5])}{more}")
    return weights


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
    loader: Any = trainer.loaders.predict or trainer.loaders.test
    if trainer.ranks.shards:
        raise ConfigError("a model that is shared out predicts nothing: use create_trainer(..., purpose='predict')")
    if loader is None:
        raise ConfigError("loaders: has neither 'predict' nor 'test', so there is nothing to predict")
    use = trainer.parts.use
    predictor, wanted = use.predictor, checkpoint or use.predictor.checkpoint
    load_for_use(trainer, Path(wanted) if wanted else None, required=True)
    weights = agreed(trainer.ranks, lambda: [_digest(trainer.module.state_dict())])[0]
    folder = Path(output_dir or predictor.output_dir or trainer.parts.run.folder / FOLDER)
    identity = {"weights": weights, "model and data": digest(use.identity), "precision": trainer.precision}
    with trainer.stop_request.listening(), rng.untouched(), _channels_last(trainer):
        trainer.compiled.eval()
        work = _work(trainer, identity)
        dataset = loader.dataset.dataset  # the loader's own wraps it
        if hasattr(dataset, "volumes"):
            size = loader.batch_sampler.batch_size
            return volumes(predictor, dataset, work, folder, overwrite, size)
        work = work._replace(network=work.network._replace(activation=predictor.activated))
        own = sum(len(request) - 1 for request in loader.batch_sampler)
        step = Steps(work, own)
        return predict_items(predictor, loader, _inputs(trainer), work, folder, overwrite, step)


def outcomes_of_volumes(trainer: "Trainer", loader: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's whole volumes with their logits and labels, for metrics; see `logits`."""
    work = _work(trainer, {})
    with contextlib.suppress(StoppedError), _channels_last(trainer):
        yield from logits(trainer.parts.use.predictor, loader.dataset.dataset, work, loader.batch_sampler.batch_size)


def volumes(predictor: Predictor, dataset: Any, work: Work, folder: Path, overwrite: bool, batch_size: int) -> Result:
    """Predict every volume of a dataset into a file of its own. All ranks call it.

    Args:
        predictor: The settings.
        dataset: With `volumes`.
        work: This rank's surroundings.
        folder: Where the files go.
        overwrite: Make files anew that were made with another model or other settings.
        batch_size: Where the predictor's own is not given.

    Raises:
        ConfigError: The folder or a file in it is not to be written, or settings do not fit.
        PredictionError: A file cannot be written.
    """
    source = predictor.source(dataset)
    with contextlib.ExitStack() as held:
        desk = Desk(predictor, source, Folder(folder), work, overwrite)
        tasks: list[Task] = agreed(work.ranks, lambda: desk.open(held))
        own = dealt(tasks, source, work.ranks)
        network = work.network._replace(activation=predictor.activated)
        step = Steps(work, sum(len(source.grids[run.volume].touching(*run[1:])) for run in own))
        stopped = False
        try:
            for run, planes in stitched(source, own, network, predictor.batch_size or batch_size, step):
                desk.take(tasks, run, own[run], planes)
        except StoppedError:
            stopped = True
        stopped = desk.join_rest(tasks, stopped)
        return desk.result(tasks, stopped)


def logits(predictor: Predictor, dataset: Any, work: Work, batch_size: int) -> Iterator[tuple[int, Tensor, Any]]:
    """This rank's volumes, whole: the number, logits (1, K, *spatial) and label (1, *spatial), (1, K, *spatial).

    Volume v is rank v modulo the number of ranks' own. One volume and its logits are in memory at a time.

    Raises:
        ValueError: A volume has no label.
    """
    source = predictor.source(dataset)
    own = range(work.ranks.rank, len(source.volumes), work.ranks.world_size)
    runs = [Run(number, 0, source.volumes[number].shape[0]) for number in own]
    step = Steps(work, sum(len(source.grids[number]) for number in own))
    for run, planes in stitched(source, runs, work.network, predictor.batch_size or batch_size, step):
        volume, whole = source.volumes[run.volume], None
        for low, chunk in planes:
            if whole is None:
                whole = torch.empty((1, len(chunk), *volume.shape))
            whole[0, :, low : low + chunk.shape[1]] = torch.from_numpy(chunk)
        assert whole is not None
        yield run.volume, whole, _label(dataset, source, run.volume)


def _label(dataset: Any, source: Source, number: int) -> Tensor:
    """A volume's whole label, as the dataset's transforms make it."""
    volume = source.volumes[number]
    if not volume.has_label:
        raise ValueError(f"{volume.path} has no label, so nothing can be measured on it")
    region = tuple(slice(0, extent) for extent in volume.shape)
    with READING:
        if hasattr(dataset, "sample"):
            sample = dataset.sample(number, region)
        else:
            sample = {"image": volume.read(region), "label": volume.read_label(region)}
        label = np.asarray(source.prepared(sample)["label"])
    return torch.from_numpy(label.astype(np.float32 if label.dtype.kind == "f" else np.int64, copy=False))[None]


class Steps:
    """Counts patches, and stops the work when it is asked to."""

    def __init__(self, work: Work, patches: int) -> None:
        self.work = work
        work.progress.start_patches(patches)

    def __call__(self, patches: int) -> None:
        """So many more are done."""
        for _ in range(patches):
            self.work.progress.step()
        if self.work.stop():
            raise StoppedError


@contextlib.contextmanager
def _channels_last(trainer: "Trainer") -> Iterator[None]:
    """Lay a convolution's weights out for the CPU while nothing is trained: that is 10 to 45 % faster.

    Not beside GroupNorm, whose sums in that layout are off by 1e-4 in a volume of 64 x 96 x 96 (torch 2.13).
    """
    exact = not any(isinstance(part, torch.nn.GroupNorm) for part in trainer.module.modules())
    suits = trainer.compiled is trainer.module and trainer.device.type == "cpu" and exact
    parameters = list(trainer.module.parameters()) if suits else []
    _lay_out(parameters, LAYOUTS)
    try:
        yield
    finally:
        _lay_out(parameters, dict.fromkeys(LAYOUTS, torch.contiguous_format))


def _lay_out(parameters: Iterable[torch.nn.Parameter], layouts: Mapping[int, torch.memory_format]) -> None:
    for item in parameters:
        if item.dim() in layouts:
            item.data = item.data.contiguous(memory_format=layouts[item.dim()])


def _work(trainer: "Trainer", identity: Mapping[str, Any]) -> Work:
    def once(inputs: Any) -> Tensor:
        inputs = batches.to_device(inputs, trainer.device) if trainer.device.type != "cpu" else inputs
        with autocast(trainer):
            return batches.main_output(
                batches.call(trainer.compiled, inputs, batches.call_form(trainer.module, inputs))
            )

    def forward(inputs: Any) -> Tensor:
        try:
            return once(inputs)
        except RuntimeError:  # a model may look at its tensors' layout, as `view` does
            _lay_out(trainer.module.parameters(), dict.fromkeys(LAYOUTS, torch.contiguous_format))
            return once(inputs)

    network = Network(forward, lambda logits: logits, trainer.device)
    return Work(network, trainer.ranks, trainer.progress, trainer.asked_to_stop, identity)


def _inputs(trainer: "Trainer") -> Any:
    return lambda batch: batches.inputs(batch, trainer.input_key, trainer.target_key)
