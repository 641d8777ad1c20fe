"""Which device a rank computes on."""

from typing import TYPE_CHECKING

from dtrain.config.errors import ConfigError, Mistake
from dtrain.distributed.environment import Environment

if TYPE_CHECKING:
    import torch


def choose_device(
    wish: str, found: Environment, gpus: int, backend: str | None = None
) -> "tuple[torch.device, list[str]]":
    """The device of this rank, and notes on it; ConfigError where there is no such device, or fewer GPUs than ranks."""
    import torch

    kind = wish.partition(":")[0]
    if kind == "cuda" and not gpus:
        raise _wrong(f"'{wish}' was asked for, but torch {torch.__version__} sees no GPU; possible here: auto, cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise _wrong("'mps' was asked for, but this torch sees none; possible here: cpu")
        return torch.device("mps"), []
    if kind == "cpu" or not gpus:
        text = "one process on the CPU" + ("" if kind == "cpu" else " (torch sees no GPU)")
        return torch.device("cpu"), [text] if found.world_size == 1 else []
    number, notes = _only_gpu(wish, gpus) if found.world_size == 1 else _own_gpu(wish, found, gpus, backend)
    return torch.device("cuda", number), notes


def _only_gpu(wish: str, gpus: int) -> tuple[int, list[str]]:
    """The GPU of a process on its own, and a note."""
    number = int(wish.partition(":")[2] or 0)
    if number >= gpus:
        raise _wrong(f"'{wish}' was asked for, but there are {gpus} GPU(s): cuda:0 to cuda:{gpus - 1}")
    idle = f"; {gpus - 1} more idle, torchrun --nproc_per_node={gpus} uses all" if gpus > 1 else ""
    return number, [f"one process on cuda:{number}{idle}"]


def _own_gpu(wish: str, found: Environment, gpus: int, backend: str | None) -> tuple[int, list[str]]:
    """The GPU of one of several ranks, and notes."""
    if found.launcher == "srun" and gpus == 1:
        return 0, []  # each task was given a GPU of its own, and sees no other
    if found.local_world_size <= gpus:
        text = f"device {wish}: with several ranks each takes the GPU of its LOCAL_RANK"
        return found.local_rank, [text] if ":" in wish else []
    if backend != "gloo":
        raise _wrong(
            f"{found.local_world_size} ranks on this node, but {gpus} GPU(s); start {gpus}, or let ranks share "
            "with trainer.ddp.backend=gloo, or use device=cpu"
        )
    text = f"{found.local_world_size} ranks share {gpus} GPU(s) over gloo: slower than one rank per GPU"
    return found.local_rank % gpus, [text]


def _wrong(text: str) -> ConfigError:
    return ConfigError(Mistake(f"device: {text}"))
