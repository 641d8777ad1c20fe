"""Which device a rank computes on."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from dtrain.config.errors import ConfigError, Mistake, shown
from dtrain.distributed.environment import Environment

if TYPE_CHECKING:
    import torch


def set_kernels(matmul_precision: str | None = None, cudnn_benchmark: bool | None = None) -> None:
    """How exact float32 matrix products are, and whether cuDNN times its algorithms; None leaves torch's setting."""
    import torch

    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
    if cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = cudnn_benchmark


def device_name(device: "torch.device") -> str:
    """What a person calls it: cpu, or cuda:0 (NVIDIA H200)."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def choose_device(
    wish: str | Sequence[str], found: Environment, gpus: int, backend: str | None = None
) -> "tuple[torch.device, list[str]]":
    """The device of this rank, and notes on it; ConfigError where there is no such device, or fewer GPUs than ranks.

    Of several wishes the first is taken that is there.
    """
    import torch

    wishes = [wish] if isinstance(wish, str) else list(wish)
    reasons: list[str] = []
    for each in wishes:
        if reason := _why_absent(each, found, gpus):
            reasons.append(f"{shown(each)} was asked for, but {reason}")
        elif each.partition(":")[0] == "cuda" or (each == "auto" and gpus):
            alone = found.world_size == 1
            number, notes = _only_gpu(each, gpus) if alone else _own_gpu(each, found, gpus, backend)
            return torch.device("cuda", number), _in_one_line(reasons, notes)
        else:
            seen = "" if each == "cpu" else " (torch sees no GPU)"
            alone = found.world_size == 1 and each != "mps"
            notes = [f"one process on the CPU{seen}"] if alone else []
            return torch.device("cpu" if each == "auto" else each), _in_one_line(reasons, notes)
    raise ConfigError(
        Mistake(f"device: {'; '.join(reasons)}; possible here: {'auto, cpu' if not gpus else 'cuda, cpu'}")
    )


def _why_absent(wish: str, found: Environment, gpus: int) -> str:
    """Why a device is not there; '' where it is."""
    import torch

    kind, _, number = wish.partition(":")
    if kind == "mps":
        return "" if torch.backends.mps.is_available() else "this torch sees none"
    if kind == "cuda" and not gpus:
        return f"torch {torch.__version__} sees no GPU"
    if found.world_size == 1 and int(number or 0) >= max(1, gpus):  # with several ranks the number does not count
        return f"there are {gpus} GPU(s): cuda:0 to cuda:{gpus - 1}"
    return ""


def _in_one_line(reasons: list[str], notes: list[str]) -> list[str]:
    return ["; ".join([*reasons, *notes])] if reasons else notes


def _only_gpu(wish: str, gpus: int) -> tuple[int, list[str]]:
    """The GPU of a process on its own, and a note."""
    number = int(wish.partition(":")[2] or 0)
    idle = f"; {gpus - 1} more idle, torchrun --nproc_per_node={gpus} uses all" if gpus > 1 else ""
    return number, [f"one process on cuda:{number}{idle}"]


def _own_gpu(wish: str, found: Environment, gpus: int, backend: str | None) -> tuple[int, list[str]]:
    """The GPU of one of several ranks, and notes."""
    if found.local_world_size <= gpus:
        text = f"device {wish}: with several ranks each takes the GPU of its LOCAL_RANK"
        return found.local_rank, [text] if ":" in wish else []
    if gpus_are_bound(found, gpus):
        return found.local_rank % gpus, []
    if backend != "gloo":
        text = (
            f"{found.local_world_size} ranks on this node, but {gpus} GPU(s); start {gpus}, or let ranks share "
            "with trainer.ddp.backend=gloo, or use device=cpu"
        )
        raise ConfigError(Mistake(f"device: {text}"))
    text = f"{found.local_world_size} ranks share {gpus} GPU(s) over gloo: slower than one rank per GPU"
    return found.local_rank % gpus, [text]


def gpus_are_bound(found: Environment, gpus: int) -> bool:
    """Whether each rank was given GPUs of its own, and sees no others: they are counted from 0 in each rank.

    Batch systems do so (`--gpus-per-task`, `--gpu-bind=closest`), and scripts between launcher and rank, which set
    CUDA_VISIBLE_DEVICES: then it is not what the launcher itself has.
    """
    if found.local_world_size <= gpus:
        return False
    if found.launcher in ("srun", "mpirun") and gpus == 1:
        return True
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    with suppress(psutil.Error):
        return own is not None and psutil.Process(os.getppid()).environ().get("CUDA_VISIBLE_DEVICES") != own
    return False
