"""This rank: device, world, process group, agreement between ranks; alone reads RANK & co.; knows no training."""

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import psutil

from dtrain.board import Board
from dtrain.calm import calm_forks
from dtrain.yamlfile import ConfigError, Mistake

if TYPE_CHECKING:
    import torch

    from dtrain.shards import Shards


class Environment(NamedTuple):
    """What the launcher says about this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "none"
    restarts: int = 0  # of all ranks, by the launcher, without which this would be the first start


def environment() -> Environment:
    """Read this process's place from torchrun's or accelerate's variables, else from srun's.

    Inside torchrun, SLURM's variables are those of the node's one task, and in a batch script they are set although
    srun started nothing; so they count only where srun itself started several tasks.

    Raises:
        ConfigError: The variables contradict one another.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        found = Environment(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), world, local_world, "torchrun", restarts)
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        world, node = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_NODEID", 0))
        local_world = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(world)))[node]
        found = Environment(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), world, local_world, "srun")
    else:
        found = Environment()
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(f"RANK is {found.rank}, but WORLD_SIZE is {found.world_size}")
    return found


def is_main() -> bool:
    """Whether this process is the one that speaks, before there is a process group."""
    try:
        return environment().rank == 0
    except ConfigError:
        return True


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's '2(x3),1' -> [2, 2, 2, 1]."""
    result: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        result += [int(count)] * int(times or 1)
    return result


def _first_host(nodelist: str) -> str:
    """SLURM's 'node[03-07,9],other' -> 'node03'."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodelist)
    return (match[1] + (match[2] or "")) if match else "127.0.0.1"


def _export_srun(found: Environment) -> None:
    """Give torch the variables that it reads, since srun sets only its own."""
    job = int(os.environ.get("SLURM_JOB_ID", 0)) * 7 + int(os.environ.get("SLURM_STEP_ID", 0) or 0)
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))  # jobs on one node must not meet on a port
    names = {"RANK": found.rank, "LOCAL_RANK": found.local_rank, "WORLD_SIZE": found.world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(found.local_world_size)


@dataclass
class Ranks:
    """This rank among the others. All ranks call the same methods in the same order."""

    rank: int
    local_rank: int
    world_size: int
    device: "torch.device"
    launcher: str = "none"
    accelerator: Any = None
    notes: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)
    board: Board = field(default_factory=lambda: Board(0, 1))
    shards: "Shards | None" = None  # how models are shared out over the ranks, where they are
    are_lost: bool = False  # some are gone, so that nothing can be agreed on any more

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def wrap(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """The model as the ranks train it: DistributedDataParallel when there are several, or itself shared out."""
        if self.world_size == 1 or not any(item.requires_grad for item in model.parameters()):
            return model
        if not self.shards:
            return self.accelerator.prepare_model(model)
        if self.shards.syncs_buffers and any(True for _ in model.buffers()):
            model.register_forward_pre_hook(self._begin_with_same_buffers)
        return self.share_out(model)

    def share_out(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Where models are shared out, leave this rank its part of the main rank's weights."""
        if not self.shards:
            return model
        self.share_weights(model)
        return self.shards.share_out(model)

    def no_sync(self, model: Any) -> Any:
        """A context in which gradients add up on each rank alone, until the last batch of a step."""
        if self.shards:
            return self.shards.amid_step()
        return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()

    def sum_(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Add a tensor up over the ranks, in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in the order of ranks, on the main rank; None on the others."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any = None) -> Any:
        """The main rank's value, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def share_weights(self, model: "torch.nn.Module") -> None:
        """Give every rank the main rank's parameters and buffers."""
        if self.world_size > 1:
            import torch
            import torch.distributed as dist

            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):
                    dist.broadcast(value, src=0)

    def whole(self, tree: Any) -> Any:
        """A state_dict or the like as one process would have it: of shards, the main rank gets whole tensors."""
        return self.shards.whole(tree, self.is_main) if self.shards else tree

    def load_weights(self, model: "torch.nn.Module", weights: Mapping[str, Any] | None) -> None:
        """Give every rank these weights, which only the main rank has, or its own where it has none."""
        if self.shards:
            self.shards.load_weights(model, weights, self.broadcast)
            return
        if weights is not None:
            model.load_state_dict(weights)
        self.share_weights(model)

    def load_optimizer(self, optimizer: "torch.optim.Optimizer", state: "dict[str, Any] | None") -> None:
        """Give every rank's optimizer this state, which only the main rank has."""
        if self.shards:
            self.shards.load_optimizer(optimizer, state, self.broadcast)
        else:
            optimizer.load_state_dict(self.broadcast(state))

    def agree_on_buffers(self, model: "torch.nn.Module") -> None:
        """Give every rank the main rank's buffers: BatchNorm's running statistics differ between ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            for buffer in model.buffers():
                dist.broadcast(buffer.data, src=0)

    def _begin_with_same_buffers(self, model: "torch.nn.Module", _inputs: Any) -> None:
        """What DistributedDataParallel does before the first forward of each step."""
        assert self.shards
        if model.training and not self.shards.is_amid_step:
            self.agree_on_buffers(model)
        self.shards.is_amid_step = False

    def close(self) -> None:
        """Leave the process group; only after success, since it waits for the others."""
        if self.world_size > 1 and not self.are_lost:
            import torch.distributed as dist

            dist.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone away in the middle of something in common."""
    import torch.distributed as dist

    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "recvValue failed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    )


def lost_rank() -> Exception:
    """The error for a rank that is told of it before it sees it."""
    import torch.distributed as dist

    return dist.DistError("another rank has failed")


def ddp_options(
    *,
    backend: Literal["gloo", "nccl"] | None = None,
    timeout_seconds: float | None = None,
    broadcast_buffers: bool | None = None,
    bucket_cap_mb: int | None = None,
    find_unused_parameters: bool | None = None,
    gradient_as_bucket_view: bool | None = None,
    static_graph: bool | None = None,
    comm_hook: Literal["no", "fp16", "bf16", "power_sgd", "batched_power_sgd"] | None = None,
) -> dict[str, Any]:
    """The keys under `trainer.ddp`: DistributedDataParallel's own, and two of the process group.

    Args:
        backend: gloo lets several ranks share a GPU. Default: NCCL on GPUs, gloo on CPUs.
        timeout_seconds: After so long a wait for another rank, a collective fails.
        broadcast_buffers: Give all ranks rank 0's buffers before each forward (default true).
        bucket_cap_mb: Size of the buckets in which gradients are reduced.
        find_unused_parameters: For models that leave some parameters out of some steps.
        gradient_as_bucket_view: Let gradients live in the buckets, which saves memory.
        static_graph: Promise that every step uses the same parameters.
        comm_hook: How gradients are compressed on the way.
    """
    return dict(locals())


def job_ends_at() -> float | None:
    """When the batch system ends this job, in unix seconds; None where it has not said."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def batch_job() -> dict[str, str]:
    """What SLURM calls the job that this process is part of, and how often it was put back; {} outside of one."""
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    return {"SLURM_RESTART_COUNT": "0", **found} if found else {}


def launcher_precision() -> str | None:
    """The precision that `accelerate launch` was asked for, in dtrain's words; None when it was not."""
    return {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))


def set_up(
    device: str = "auto",
    ddp: dict[str, Any] | None = None,
    deterministic: bool = False,
    fsdp: dict[str, Any] | None = None,
) -> Ranks:
    """Join the process group, choose the device, set the threads.

    Args:
        device: The config's `device`.
        ddp: DistributedDataParallel's options, and `backend` (gloo lets ranks share a GPU) and `timeout_seconds`.
        deterministic: Ask torch for deterministic algorithms.
        fsdp: The options of sharing the model out; None: it is not.

    Raises:
        ConfigError: The device does not exist, or there are fewer GPUs than ranks.
    """
    import torch

    found = environment()
    if found.launcher == "srun":
        _export_srun(found)
    options = {key: value for key, value in ddp_options(**(ddp or {})).items() if value is not None}
    backend = options.pop("backend", None)
    timeout_seconds = options.pop("timeout_seconds", None)
    notes = _thread_notes(found) + _lost_process_notes(found)
    chosen, device_notes = choose_device(device, found, torch.cuda.device_count(), backend)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ranks = Ranks(found.rank, found.local_rank, found.world_size, chosen, found.launcher, notes=notes + device_notes)
    if found.world_size > 1:
        ranks.accelerator = _join(found, chosen, backend, timeout_seconds, options)
        ranks.board = Board(found.rank, found.world_size, torch.distributed.distributed_c10d._get_default_store())
        calm_forks()
        if fsdp is not None:
            from dtrain.shards import Shards

            ranks.shards = Shards(chosen, found.world_size, fsdp, options.get("broadcast_buffers") is not False)
    elif fsdp is not None:
        ranks.notes.append("trainer.strategy: fsdp shares the model out over several ranks; one process has all of it")
    return ranks


def _join(found: Environment, device: Any, backend: str | None, timeout_seconds: float | None, options: Any) -> Any:
    """Join the process group and let accelerate, whose `prepare_model` wraps the model, find it.

    The group is ours to make because CPU tensors need gloo beside NCCL: votes and objects must not wait for the GPU.
    """
    from datetime import timedelta

    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    default = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend or default, timeout=timeout)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what it asks for is done here, and not where the config says ddp
    if device.type == "cuda":
        # Where ranks share a GPU, accelerate must see the device's index, not the rank's.
        os.environ["LOCAL_RANK"] = str(device.index)
    if "comm_hook" in options:
        options["comm_hook"] = DDPCommunicationHookType(options["comm_hook"])
    handlers = [DistributedDataParallelKwargs(**options)] if options else []
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != found.world_size:
        raise ConfigError(
            f"accelerate sees {accelerator.num_processes} process(es), but WORLD_SIZE is {found.world_size}; "
            "every rank would train alone"
        )
    return accelerator


def choose_device(wish: str, found: Environment, gpus: int, backend: str | None = None) -> tuple[Any, list[str]]:
    """The device of this rank, and what is worth saying about it.

    Raises:
        ConfigError: There is no such device, or fewer GPUs than ranks.
    """
    import torch

    def wrong(text: str) -> ConfigError:
        return ConfigError(Mistake(f"device: {text}"))

    kind, _, index = wish.partition(":")
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise wrong("'mps' was asked for, but this torch sees none; possible here: cpu")
        return torch.device("mps"), []
    if kind == "cpu":
        return torch.device("cpu"), _one_process_note(
            found, "the CPU" + ("" if wish == "cpu" else " (torch sees no GPU)")
        )
    if not gpus:
        raise wrong(f"'{wish}' was asked for, but torch {torch.__version__} sees no GPU; possible here: auto, cpu")
    if found.world_size == 1:
        if index and int(index) >= gpus:
            raise wrong(f"'{wish}' was asked for, but there are {gpus} GPU(s): cuda:0 to cuda:{gpus - 1}")
        idle = f"; {gpus - 1} more idle, torchrun --nproc_per_node={gpus} uses all" if gpus > 1 else ""
        return torch.device("cuda", int(index or 0)), _one_process_note(found, f"cuda:{index or 0}{idle}")
    if found.launcher == "srun" and gpus == 1:
        return torch.device("cuda", 0), []  # each task was given a GPU of its own, and sees no other
    if found.local_world_size > gpus:
        if backend != "gloo":
            raise wrong(
                f"{found.local_world_size} ranks on this node, but {gpus} GPU(s); start {gpus}, or let ranks share "
                "with trainer.ddp.backend=gloo, or use device=cpu"
            )
        text = f"{found.local_world_size} ranks share {gpus} GPU(s) over gloo: slower than one rank per GPU"
        return torch.device("cuda", found.local_rank % gpus), [text]
    text = f"device {wish}: with several ranks each takes the GPU of its LOCAL_RANK"
    return torch.device("cuda", found.local_rank), [text] if index else []


def _one_process_note(found: Environment, where: str) -> list[str]:
    return [f"one process on {where}"] if found.world_size == 1 else []


def _lost_process_notes(found: Environment) -> list[str]:
    """A line where more processes were asked for than there are.

    Raises:
        ConfigError: `accelerate launch --cpu --num_processes N` starts one process and says nothing.
    """
    if found.world_size > 1:
        return []
    words = _parent_words()
    if any("accelerate" in word for word in words[:3]) and "--num_processes" in words:
        asked = words[words.index("--num_processes") + 1 :][:1]
        if asked and asked[0].isdigit() and int(asked[0]) > 1:
            raise ConfigError(
                f"accelerate was asked for {asked[0]} processes, but started one (as `--cpu` makes it do); "
                f"use: accelerate launch --multi_gpu --num_processes {asked[0]} (gloo ranks where there is no GPU)"
            )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        return [f"this job has {tasks} tasks, but one process was started: use srun or torchrun for all of them"]
    return []


def _parent_words() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _thread_notes(found: Environment) -> list[str]:
    """Give each of several ranks its share of the cores, unless the user chose.

    torchrun writes OMP_NUM_THREADS=1 into its ranks' environment when the user said nothing; only its own
    environment, which is its parent's, tells the two apart.
    """
    if found.world_size == 1:
        return []
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        try:
            chosen_by_user = found.launcher == "srun" or "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
        except psutil.Error:
            chosen_by_user = True
        if chosen_by_user:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            return []
    threads = max(1, cores() // found.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return []


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
