"""dtrain replay: the failed step once more, on one process, with a look at every number."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from dtrain.checkpoint.checkpoint_files import LOSS, Loaded, load
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.config.errors import ConfigError
from dtrain.data import rng
from dtrain.dataloader import TrainLoader
from dtrain.modelloader import Forward
from dtrain.tracking.run_folder import RunFolder
from dtrain.training.freezing import Freezing


def replay(
    forward: Forward, module: torch.nn.Module, loader: TrainLoader, folder: Path, freezing: Freezing | None = None
) -> Iterator[str]:
    """Repeat the failed step of a run folder, rank by rank; yields what is found, a line at a time.

    The module is made of the run's own config; its weights are overwritten, and of it is frozen what was.

    Raises:
        ConfigError: The folder holds no failed step.
    """
    kept = Checkpoints(RunFolder(folder).failed_step).last()
    if kept is None:
        raise ConfigError(f"{folder} holds no failed step; one is kept when a training fails in a step")
    loaded = load(kept)
    state = loaded.state
    module.load_state_dict(loaded.weights)
    if freezing:
        freezing.apply(state["epoch"])
    module.train()
    _restore_loss(forward.criterion, loaded)
    yield f"step {state['step'] + 1} in epoch {state['epoch'] + 1}, as on {state['world_size']} rank(s)"
    if not state["exact"]:
        yield "it was found some steps later: running statistics and dropout, with fp16 also weights, are those of then"
    for rank in range(state["world_size"]):
        yield from _of_rank(forward, module, loader, state, rank)


def _restore_loss(criterion: Any, loaded: Loaded) -> None:
    """The loss's own weights and attributes, as they were."""
    if LOSS in loaded.others and criterion.module is not None:
        criterion.module.load_state_dict(loaded.others[LOSS])
    criterion.kept.load_state_dict(loaded.state.get("kept", {}).get("loss", {}))


def _of_rank(
    forward: Forward, module: torch.nn.Module, loader: TrainLoader, state: dict[str, Any], rank: int
) -> Iterator[str]:
    layout = {"world_size": state["world_size"], "batch_size": state["batch_size"], "order": state.get("order", 1)}
    shard = replace(loader.shard, rank=rank, **layout)
    if rank in state["rng"]:
        rng.set_state(state["rng"][rank])
    else:
        yield f"rank {rank}: its random numbers are not known; dropout may differ"
    for number, ids in enumerate(shard.batches_from(state["epoch"], state["position"], state["accumulate"])):
        micro = f", batch {number + 1}" if state["accumulate"] > 1 else ""
        batch = loader.batches.batch(state["epoch"], *ids)
        if batch is None:
            yield f"rank {rank}{micro}: collate_fn left out all samples, {', '.join(map(str, ids))}"
            continue
        found, loss = _examined(forward, module, batch, ids)
        yield f"rank {rank}{micro}: loss {loss:.6g}, samples {', '.join(map(str, ids))}"
        yield from (f"  {line}" for line in found)


def _examined(forward: Forward, module: torch.nn.Module, batch: Any, ids: list[int]) -> tuple[list[str], float]:
    """What is not finite in one forward and backward: in the samples, after which module, in which gradients."""
    found = list(_bad_samples(batch, ids))
    names = {part: name or "the model" for name, part in module.named_modules()}
    bad_outputs: list[str] = []  # the modules, in the order of their calls, that gave something that is not finite

    def look(part: torch.nn.Module, inputs: Any, output: Any) -> None:
        if part in names and not all(map(_is_finite, _tensors(output))):
            fine = all(map(_is_finite, _tensors(inputs)))
            what = "its input was finite" if fine else "its input was not finite either"
            bad_outputs.append(f"{names[part]} ({type(part).__name__}); {what}")

    module.zero_grad()
    with register_module_forward_hook(look):
        loss, terms, _ = forward(module, batch)
    found += [f"first bad output: {text}" for text in bad_outputs[:1]]
    found += [f"loss term {name}: {float(term):.6g}" for name, term in terms.items()]
    if math.isfinite(float(loss.detach())):
        loss.backward()
        bad = [name for name, item in module.named_parameters() if item.grad is not None and not _is_finite(item.grad)]
        more = ", ..." if len(bad) > 10 else ""
        found += [f"gradients that are not finite: {', '.join(bad[:10])}{more}"] if bad else []
    return found, float(loss.detach())


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
