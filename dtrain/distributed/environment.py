"""What launchers and batch systems say about this process: the only reader of RANK and the like."""

import os
import re
from typing import NamedTuple

from dtrain.config.errors import ConfigError


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
    srun started nothing; so they count only where srun itself started several tasks. ConfigError: for contradictions.
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
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in groups for _ in range(int(times or 1))]


def export_srun_variables(found: Environment) -> None:
    """Give torch the variables that it reads, since srun sets only its own."""
    job = int(os.environ.get("SLURM_JOB_ID", 0)) * 7 + int(os.environ.get("SLURM_STEP_ID", 0) or 0)
    node = re.match(r"([^,\[]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", ""))  # 'n[03-07,9],x' -> n03
    os.environ.setdefault("MASTER_ADDR", node[1] + (node[2] or "") if node else "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))  # jobs on one node must not meet on a port
    for name in ("rank", "local_rank", "world_size", "local_world_size"):
        os.environ[name.upper()] = str(getattr(found, name))


def export_local_rank(number: int) -> None:
    """Let libraries take this for the rank's number on its node."""
    os.environ["LOCAL_RANK"] = str(number)


def tasks_of_job() -> int:
    """How many tasks SLURM was asked for, whether srun has started them or not; 1 outside of a job."""
    text = os.environ.get("SLURM_NTASKS", "1")
    return int(text) if text.isdigit() else 1


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


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
