"""dtrain replay: the failed step once more, on one process, with a look at every number."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dtrain.checkpoint.checkpoint_files import LOSS, Loaded, load
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.config.errors import ConfigError
from dtrain.data import rng
from dtrain.dataloader import MicroBatch, TrainLoader
from dtrain.reporting.own_frames import in_one_line
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import read_json
from dtrain.training.state import SAMPLES_OF, Trainables, TrainState


@dataclass
class Step:
    """What takes the step: the trainer's own means, but that no optimizer steps."""

    learn: Callable[[MicroBatch], None]  # forward and backward of one batch
    state: TrainState  # where it adds up the loss
    trainables: Trainables


def replay(step: Step, loader: TrainLoader, folder: Path) -> Iterator[str]:
    """Repeat the failed step of a run folder, rank by rank; yields what is found, a line at a time.

    The step's model is made of the run's own config; its weights are overwritten, and what was frozen is so again. Of a
    `training_step` that takes steps itself, each gradient is that of the weights before the first of them.

    Raises:
        ConfigError: The folder holds no failed step.
    """
    kept = Checkpoints(RunFolder(folder).failed_step).last()
    if kept is None:
        raise ConfigError(f"{folder} holds no failed step; one is kept when a training fails in a step")
    loaded = load(kept)
    state = loaded.state
    step.trainables.module.load_state_dict(loaded.weights)
    if step.trainables.freezing:
        step.trainables.freezing.apply(state["epoch"])
    step.trainables.module.train()
    step.state.step, step.state.epoch, step.state.position = state["step"], state["epoch"], state["position"]
    _restore_loss(step.trainables.criterion, loaded)
    yield f"step {state['step'] + 1} in epoch {state['epoch'] + 1}, as on {state['world_size']} rank(s)"
    if not state["exact"]:
        yield "it was found some steps later: running statistics and dropout, with fp16 also weights, are those of then"
    is_clean = True
    for rank in range(state["world_size"]):
        for line in _of_rank(step, loader, state, rank):
            is_clean = is_clean and not line.startswith("  ")
            yield line
    failure = read_json(RunFolder(folder).failure)
    if is_clean and failure:
        what = in_one_line(failure["error"], failure["message"])
        yield f"forward and backward did not fail this time; the training failed in {failure['phase']}: {what}"


def _restore_loss(criterion: Any, loaded: Loaded) -> None:
    """The loss's own weights and attributes, as they were."""
    if criterion is None:
        return
    if LOSS in loaded.others and criterion.module is not None:
        criterion.module.load_state_dict(loaded.others[LOSS])
    criterion.kept.load_state_dict(loaded.state.get("kept", {}).get("loss", {}))


def _of_rank(step: Step, loader: TrainLoader, state: dict[str, Any], rank: int) -> Iterator[str]:
    shard = loader.shard_as(state, rank)
    if rank in state["rng"]:
        rng.set_state(state["rng"][rank])
    else:
        yield f"rank {rank}: its random numbers are not known; dropout may differ"
    requests = shard.requests_from(state["epoch"], state["position"], state["accumulate"])
    for number, (epoch, *ids) in enumerate(requests):
        micro = f", batch {number + 1}" if state["accumulate"] > 1 else ""
        batch = loader.batches.batch(epoch, *ids)
        if batch is None:
            yield f"rank {rank}{micro}: collate_fn left out all samples, {', '.join(map(str, ids))}"
            continue
        failed: list[str] = []
        try:
            found, loss = _examined(step, batch, ids, failed)
        except Exception:
            yield f"rank {rank}{micro}: failed, samples {', '.join(map(str, ids))}"
            yield from (f"  {line}" for line in failed)
            raise
        yield f"rank {rank}{micro}: loss {loss:.6g}, samples {', '.join(map(str, ids))}"
        yield from (f"  {line}" for line in found)


def _examined(step: Step, batch: Any, ids: list[int], failed: list[str]) -> tuple[list[str], float]:
    """What is not finite in one forward and backward: in the samples, after which module, in which gradients.

    Where a module raises, `failed` is given its name and what went into it.
    """
    found, module = list(_bad_samples(batch, ids)), step.trainables.module
    names = {part: name or "the model" for name, part in module.named_modules()}
    bad_outputs: list[str] = []  # the modules, in the order of their calls, that gave something that is not finite

    calls: list[tuple[torch.nn.Module, Any]] = []  # that have not returned, the innermost last

    def begin(part: torch.nn.Module, inputs: Any) -> None:
        if part in names:
            calls.append((part, inputs))

    def look(part: torch.nn.Module, inputs: Any, output: Any) -> None:
        if calls and part is calls[-1][0]:
            calls.pop()
        if part in names and not all(map(_is_finite, _tensors(output))):
            fine = all(map(_is_finite, _tensors(inputs)))
            what = "its input was finite" if fine else "its input was not finite either"
            bad_outputs.append(f"{names[part]} ({type(part).__name__}); {what}: {_described(inputs)}")

    module.zero_grad()
    step.state.clear()
    count = len(ids)
    with register_module_forward_pre_hook(begin), register_module_forward_hook(look):
        try:
            step.learn(MicroBatch(batch, 1.0, count, closes=False, position=0, start=0, step_samples=count))
        except Exception:
            failed += [
                f"into {names[part]} ({type(part).__name__}) went {_described(inputs)}"
                for part, inputs in calls[:-4:-1]
            ]
            raise
    found += [f"first bad output: {text}" for text in bad_outputs[:1]]
    means = {name: float(total) / count for name, total in step.state.sums.items()}
    loss = means.pop("loss")
    terms = {name.removeprefix("loss_"): value for name, value in means.items() if not name.endswith(SAMPLES_OF)}
    found += [f"loss term {name}: {value:.6g}" for name, value in terms.items()]
    if math.isfinite(loss):
        bad = [name for name, item in module.named_parameters() if item.grad is not None and not _is_finite(item.grad)]
        more = ", ..." if len(bad) > 10 else ""
        found += [f"gradients that are not finite: {', '.join(bad[:10])}{more}"] if bad else []
    return found, loss


def _described(inputs: Any) -> str:
    """Shape, dtype and range of tensors: `float32 [8, 3, 32, 32] from -1.2 to 3.4`."""
    texts = []
    for item in _tensors(inputs):
        known = item.detach()[torch.isfinite(item)] if item.is_floating_point() else item.detach()
        ends = (
            f" from {float(known.min()):.4g} to {float(known.max()):.4g}"
            if known.numel() and not item.is_complex()
            else ""
        )
        bad = f", {lost} not finite" if (lost := item.numel() - known.numel()) else ""
        texts.append(f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}{ends}{bad}")
    return "; ".join(texts) or "no tensors"


def _bad_samples(batch: Any, ids: list[int]) -> Iterator[str]:
    tensors = [item for item in _tensors(batch) if len(item) == len(ids) and item.is_floating_point()]
    for index, sample in enumerate(ids):
        if bad := sum(int((~torch.isfinite(tensor[index])).sum()) for tensor in tensors):
            yield f"sample {sample}: {bad} values are not finite"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.dim():
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())
