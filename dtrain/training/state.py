"""All that a training is at one step, besides its weights: out of a trainer into plain values, and back; no files."""

from typing import TYPE_CHECKING, Any

import torch

from dtrain.checkpoint.checkpoint_files import Loaded
from dtrain.data import rng
from dtrain.distributed.fsdp import is_shard

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

FORMAT = 1  # raised when a state of before can no longer be restored


def state_of(trainer: "Trainer", generators: dict[int, Any] | None = None) -> dict[str, Any]:
    """Everything but the weights that going on needs. All ranks call it, the main rank's is complete.

    Args:
        trainer: Whose state it is.
        generators: The state of the ranks' generators, where they cannot be asked; then this rank's sums are taken for
            the sums of all, and no other rank is needed.
    """
    sums = torch.stack(list(trainer.sums.values()))
    if generators is None:
        sums, states = trainer.ranks.sum_(sums), _generators_of_all(trainer)
    else:
        states = list(generators.values())
    return {
        "format": FORMAT,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "position": trainer.position,
        "best": trainer.best,
        "bad_validations": trainer.bad_validations,
        "validated_step": trainer.validated_step,
        "score": trainer.score,
        "rate": trainer.rate,
        "grad_norm": float(trainer.grad_norm),
        "skipped": trainer.skipped,
        "sums": dict(zip(trainer.sums, sums.tolist(), strict=True)),
        "samples": trainer.samples,
        "optimizer": trainer.ranks.whole(trainer.optimizer.state_dict()),
        "optimizer_name": type(trainer.optimizer).__name__,
        "schedule": trainer.schedule.state_dict(),
        "scaler": trainer.scaler.state_dict() if trainer.scaler else {},
        "averaged": trainer.ema.updates if trainer.ema else 0,
        "seed": trainer.parts.seed,
        "rng": states,
    }


def _generators_of_all(trainer: "Trainer") -> list[Any] | None:
    """The ranks' generators, on the main rank; on the way the ranks' weights are compared.

    Raises:
        RuntimeError: They differ, as after a wrong collective, a bad GPU, or a model that is not the same everywhere.
    """
    if trainer.ranks.world_size == 1:
        return [rng.get_state()]
    gathered = trainer.ranks.gather((rng.get_state(), fingerprint(trainer.module)))
    if gathered is None:
        return None
    states, prints = zip(*gathered, strict=True)
    for name, value in prints[0].items():
        if apart := [str(rank) for rank, its in enumerate(prints) if its.get(name) != value]:
            told = ", ".join(apart)
            raise RuntimeError(f"the ranks' weights are not the same: {name} of rank {told} is not that of rank 0")
    return list(states)


def fingerprint(module: torch.nn.Module) -> dict[str, int]:
    """A checksum of each tensor's bits, by name, but for shards; it costs one reading of them, and one wait."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    entries = {name: item for name, item in module.state_dict().items() if isinstance(item, torch.Tensor)}
    tensors = {name: item.detach() for name, item in entries.items() if not is_shard(item)}
    sums = []
    for value in tensors.values():
        real = torch.view_as_real(value) if value.is_complex() else value
        sums.append(real.contiguous().view(-1).view(bits[real.element_size()]).sum(dtype=torch.int64))
    values = torch.stack([item.to(sums[0].device) for item in sums]).tolist() if sums else []
    return dict(zip(tensors, values, strict=True))


def restore(trainer: "Trainer", loaded: Loaded | None) -> None:
    """Go on from a checkpoint, which only the main rank has read (None elsewhere)."""
    trainer.ranks.load_weights(trainer.module, loaded.weights if loaded else None)
    if trainer.ema:
        trainer.ranks.load_weights(trainer.ema.module, loaded.ema if loaded else None)
    state = dict(loaded.state) if loaded else {}
    trainer.ranks.load_optimizer(trainer.optimizer, state.pop("optimizer", None))
    state = trainer.ranks.broadcast(state)
    trainer.step, trainer.epoch, trainer.position = state["step"], state["epoch"], state["position"]
    trainer.best, trainer.bad_validations, trainer.skipped = state["best"], state["bad_validations"], state["skipped"]
    trainer.samples = state["samples"]
    trainer.validated_step, trainer.score, trainer.rate = state["validated_step"], state["score"], state["rate"]
    trainer.grad_norm.fill_(state["grad_norm"])
    for name, value in state["sums"].items():  # all ranks add up the same sums; what was summed so far is rank 0's
        trainer.sum_of(name).fill_(value if trainer.ranks.is_main else 0.0)
    trainer.schedule.load_state_dict(state["schedule"])
    if trainer.scaler and state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.ema:
        trainer.ema.updates = state["averaged"]
    trainer.judge_patience()
    trainer.saver.is_saved(trainer)
    if len(state["rng"]) == trainer.ranks.world_size:
        rng.set_state(state["rng"][trainer.ranks.rank])
    else:  # another number of ranks: new streams, that no earlier start has used
        rng.seed_all(trainer.parts.seed, 2 + trainer.ranks.rank, trainer.step)
