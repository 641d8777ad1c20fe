"""This process takes its place among the ranks: process group, device, threads."""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dtrain.config.errors import ConfigError
from dtrain.distributed import by_node
from dtrain.distributed.affinity import pci_addresses, raise_open_files, take_place
from dtrain.distributed.ddp import DDP, ddp_options, hook_mistake
from dtrain.distributed.device import choose_device, gpus_are_bound
from dtrain.distributed.environment import (
    Environment,
    environment,
    export_local_rank,
    export_rank_variables,
    has_accelerate_settings,
    launchers_node,
    node_name,
    tasks_of_job,
)
from dtrain.distributed.fsdp import FSDP, copies_mistake
from dtrain.distributed.interfaces import choose_interfaces
from dtrain.distributed.launched_rank import leaves_to_launcher
from dtrain.distributed.mailbox import Mailbox
from dtrain.distributed.ranks import Ranks

GPUS_SECONDS = 60.0  # so long a rank waits for the others' word on their GPUs, where that is doubtful


def set_up(
    device: str | Sequence[str] = "auto",
    ddp: dict[str, Any] | None = None,
    deterministic: bool = False,
    fsdp: dict[str, Any] | None = None,
) -> Ranks:
    """Join the process group, choose the device, set threads; see `choose_device`, `ddp_options`, `fsdp_options`."""
    found = environment()
    notes = export_rank_variables(found)
    options = {key: value for key, value in ddp_options(**(ddp or {})).items() if value is not None}
    backend = options.pop("backend", None)
    timeout_seconds = options.pop("timeout_seconds", None)
    if found.world_size == 1 and not leaves_to_launcher():
        notes += _alone_by_mistake()
    raise_open_files()
    gpus = torch.cuda.device_count()
    chosen, device_notes = choose_device(device, found, gpus, backend)
    share, affinity_notes = take_place(found, _gpus_of_node(found, chosen, gpus))
    notes += affinity_notes + choose_interfaces(found, chosen.type == "cuda")
    _share_cores(found, share)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ranks = Ranks(found.rank, found.local_rank, found.world_size, chosen, found.launcher, notes=notes + device_notes)
    if fsdp and fsdp.get("replicate") == "nodes":
        fsdp = {**fsdp, "replicate": found.world_size // found.local_world_size}
    # Before the ranks meet: one that leaves would take the store away from those that are still on their way.
    if fsdp and (text := copies_mistake(fsdp.get("replicate") or 1, found.world_size)) and found.world_size > 1:
        raise ConfigError(text)
    if found.world_size > 1:
        _join(found, chosen, backend, timeout_seconds, options.get("comm_hook"))
        accelerator = _accelerator(found, chosen, options) if has_accelerate_settings() else None
        ranks.mailbox = Mailbox(found.rank, found.world_size, dist.distributed_c10d._get_default_store())
        ranks.mailbox.post("node", node_name())
        if chosen.type == "cuda" and backend != "gloo" and gpus_are_bound(found, gpus):
            _refuse_shared_gpus(ranks)
        syncs_buffers = options.get("broadcast_buffers") is not False
        ranks.strategy = DDP(ranks, options, accelerator) if fsdp is None else FSDP(ranks, fsdp, syncs_buffers)
    elif fsdp is not None:
        ranks.notes.append("trainer.strategy: fsdp shards the model over several ranks; one process holds all of it")
    return ranks


def _join(
    found: Environment, device: torch.device, backend: str | None, timeout_seconds: float | None, hook: str | None
) -> None:
    """Join the process group.

    CPU tensors need gloo beside NCCL: votes and objects must not wait for the GPU.
    """
    default = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if text := hook_mistake(hook, backend or default):
        raise ConfigError(f"trainer.ddp.comm_hook: {text}; possible: no, fp16, power_sgd")
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    has_several_nodes = found.local_world_size < found.world_size
    if has_several_nodes:
        by_node.expect_several_nodes()
    dist.init_process_group(backend or default, timeout=timeout)
    if has_several_nodes:
        place = socket.gethostname(), launchers_node(found.launcher), found.local_rank
        by_node.join(dist.distributed_c10d._get_default_store(), found.rank, found.world_size, place, timeout)


def _accelerator(found: Environment, device: torch.device, options: Mapping[str, Any]) -> Any:
    """The Accelerator of these ranks, whose `prepare_model` does what the settings say that accelerate was given.

    Where it was given none it is not imported, which takes 0.15 s and 13 MB.
    """
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what it asks for is done here, and not where the config says ddp
    if device.type == "cuda":
        export_local_rank(device.index)  # where ranks share a GPU, accelerate must see the device's index
    given = dict(options)
    if "comm_hook" in given:
        given["comm_hook"] = DDPCommunicationHookType(given["comm_hook"])
    handlers = [DistributedDataParallelKwargs(**given)]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != found.world_size:
        raise ConfigError(
            f"accelerate sees {accelerator.num_processes} process(es), but WORLD_SIZE is {found.world_size}; "
            "every rank would train alone"
        )
    return accelerator


def _refuse_shared_gpus(ranks: Ranks) -> None:
    """Raise where two ranks that each see one GPU see the same one, which NCCL refuses in words of its own."""
    own = str(getattr(torch.cuda.get_device_properties(ranks.device), "uuid", ranks.rank))
    if ranks.has_several_nodes:  # whose ranks are too many for each to read what all have left
        gpus = ranks.gather(own) or []
        counts = Counter(gpus)
        same = ranks.broadcast([rank for rank, gpu in enumerate(gpus) if counts[gpu] > 1])
    else:
        ranks.mailbox.post("gpu", own)
        same = [rank for rank, other in ranks.mailbox.notes("gpu", GPUS_SECONDS).items() if other == own]
    if len(same) > 1:
        raise ConfigError(
            f"device: ranks {', '.join(map(str, same))} have the same GPU; give each its own (--gpus-per-task=1), "
            "or let ranks share with trainer.ddp.backend=gloo"
        )


def _alone_by_mistake() -> list[str]:
    """A line where more processes were asked for than there are; ConfigError where accelerate was."""
    words: list[str] = []
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
    if any("accelerate" in word for word in words[:3]) and "--num_processes" in words:
        asked = words[words.index("--num_processes") + 1 :][:1]
        if asked and asked[0].isdigit() and int(asked[0]) > 1:
            raise ConfigError(
                f"accelerate was asked for {asked[0]} processes, but started one (as `--cpu` makes it do); "
                f"use: accelerate launch --multi_gpu --num_processes {asked[0]} (gloo ranks where there is no GPU)"
            )
    if (tasks := tasks_of_job()) > 1:
        return [f"this job has {tasks} tasks, but one process was started: use srun or torchrun for all of them"]
    return []


def _gpus_of_node(found: Environment, device: torch.device, gpus: int) -> list[str | None]:
    """The PCI address of the GPU of each of this node's ranks, as far as this one sees them."""
    none: list[str | None] = [None] * found.local_world_size
    if device.type != "cuda" or found.world_size == 1:
        return none
    addresses = pci_addresses(gpus)
    if found.local_world_size <= gpus:  # each has that of its local rank
        return addresses[: found.local_world_size]
    if gpus_are_bound(found, gpus):
        none[found.local_rank] = addresses[device.index]
        return none
    return [addresses[local % gpus] for local in range(found.local_world_size)]


def _share_cores(found: Environment, share: int) -> None:
    """Give each of several ranks its share of the cores, unless the user chose.

    torchrun writes OMP_NUM_THREADS=1 into its ranks' environment when the user said nothing; only its own
    environment, which is its parent's, shows which it was.
    """
    if found.world_size == 1:
        return
    chosen_by_user = "OMP_NUM_THREADS" in os.environ
    if chosen_by_user and found.launcher != "srun":
        with suppress(psutil.Error):
            chosen_by_user = "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
    if not chosen_by_user:
        os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
