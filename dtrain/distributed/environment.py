"""What launchers and batch systems say about this process: the only reader of RANK and the like."""

import os
import re
import socket
import zlib
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


class Names(NamedTuple):
    """The variables by which one kind of launcher numbers its processes; '' for one that it does not set."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str = ""
    local_world_size: str = ""


TORCH = Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# mpirun's come before srun's: its daemons on other nodes may be started by srun, whose variables ranks inherit.
_OWN_LOCAL_RANKS = (
    Names("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI, and IBM's
    Names("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
          "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH2
    Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    Names("mpirun", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray's PALS
)  # fmt: skip
# srun with PMI-2 or PMIx sets these beside its own; where nothing else is set, they say too little.
_INCOMPLETE = (
    *(Names("mpirun", f"{mpi}_COMM_WORLD_RANK", f"{mpi}_COMM_WORLD_SIZE") for mpi in ("OMPI", "MV2")),
    Names("mpirun", "PMI_RANK", "PMI_SIZE"), Names("mpirun", "PMIX_RANK", ""),
)  # fmt: skip
_JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID", "PMI_JOBID")  # what tells jobs of mpirun apart
_SET_ALL = "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in each process, or start with torchrun"


def environment() -> Environment:
    """Read this process's place from torchrun's or accelerate's variables, else from mpirun's, else from srun's.

    Inside torchrun, SLURM's and MPI's variables are those of the node's one task, and in a batch script SLURM's are set
    although srun started nothing; so they count only where srun itself started several tasks.
    ConfigError: for what is not an integer or contradicts itself; where others were started beside this process, but
    nothing says which of them it is, so that each would train alone; and where nothing says where they meet.
    """
    found = _found()
    if found.world_size > 1 and found.launcher != "srun":
        _refuse_unknown_meeting_place(found)
    return found


def _found() -> Environment:
    if _is_set(TORCH.rank) and _is_set(TORCH.world_size):
        return _place(TORCH)._replace(restarts=_number("TORCHELASTIC_RESTART_COUNT", 0))
    for names in _OWN_LOCAL_RANKS:
        if all(map(_is_set, names[1:])) and _number(names.world_size) > 1:
            return _place(names)
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1 and _is_set("SLURM_PROCID"):
        return _place_in_srun()
    _refuse_half_a_place()
    return Environment()


def _place(names: Names) -> Environment:
    """This process's place by one launcher's variables. Those of the node may be missing: then all ranks share one."""
    rank, world = _number(names.rank), _number(names.world_size)
    local_rank, local_world = _number(names.local_rank, 0), _number(names.local_world_size, world)
    for name, number, of, size in (
        (names.rank, rank, names.world_size, world),
        (names.local_rank, local_rank, names.local_world_size, local_world),
    ):
        if size < 1:
            raise ConfigError(f"{of} is {size}: expected 1 or more")
        if not 0 <= number < size:
            raise ConfigError(f"{name} is {number}, but {of} is {size}: expected 0 to {size - 1}")
    if local_world > world:
        raise ConfigError(f"{names.local_world_size} is {local_world}, but {names.world_size} is {world}")
    return Environment(rank, local_rank, world, local_world, names.launcher)


def _place_in_srun() -> Environment:
    rank, world, node = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_NODEID", 0)
    if not 0 <= rank < world:
        raise ConfigError(f"SLURM_PROCID is {rank}, but SLURM_STEP_NUM_TASKS is {world}")
    tasks = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    if not 0 <= node < len(tasks):
        raise ConfigError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes")
    return Environment(rank, _number("SLURM_LOCALID", 0), world, tasks[node], "srun")


def _refuse_half_a_place() -> None:
    """Raise where a variable says that this is one of several processes, and another one that is needed is missing."""
    for names in (TORCH, *_INCOMPLETE):
        is_numbered = _is_set(names.rank) and _number(names.rank) > 0
        if names.world_size and _is_set(names.world_size) and _number(names.world_size) > 1:
            if not _is_set(names.rank):
                raise ConfigError(f"{names.world_size} is {_number(names.world_size)}, but {names.rank} is not set; "
                                  f"{_SET_ALL}, or unset {names.world_size} for one process")  # fmt: skip
            is_numbered = True
        if is_numbered:
            missing = "the number of ranks" if not _is_set(names.world_size) else "the rank's number on its node"
            raise ConfigError(f"{names.rank} is {_number(names.rank)}, but {missing} is in no variable that is known; "
                              f"{_SET_ALL}, or unset {names.rank} for one process")  # fmt: skip


def _is_set(name: str) -> bool:
    """Whether a variable has a value: templates of batch systems leave some empty."""
    return bool(name and os.environ.get(name, "").strip())


def _number(name: str, default: int | None = None) -> int:
    """A variable that holds a whole number; `default` where it is not set."""
    text = os.environ.get(name, "").strip() if name else ""
    if not text and default is not None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ConfigError(f"{name} is {text!r}, which is not an integer; a launcher such as torchrun sets it")
    return int(text)


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


def _refuse_unknown_meeting_place(found: Environment) -> None:
    """Raise where nothing says where the ranks meet. On one node mpirun's can do without an address."""
    if _is_set("MASTER_PORT"):
        _number("MASTER_PORT")
    if found.launcher == "mpirun" and not _is_set("MASTER_ADDR") and found.local_world_size < found.world_size:
        raise ConfigError(
            f"mpirun started {found.world_size} ranks on several nodes, and MASTER_ADDR is not set, which says where "
            "they meet: the host of rank 0, by a name that all nodes know. Open MPI: mpirun -x MASTER_ADDR=node1 -x "
            "MASTER_PORT=29500 ...; MPICH, Intel MPI: mpiexec -genv MASTER_ADDR node1 -genv MASTER_PORT 29500 ..."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not _is_set(name)]
    if found.launcher == "torchrun" and missing:
        raise ConfigError(
            f"RANK is {found.rank} of WORLD_SIZE {found.world_size}, but {missing[0]} is not set, which says where the "
            "ranks meet; start with torchrun, or unset RANK and WORLD_SIZE for one process"
        )


def export_rank_variables(found: Environment) -> list[str]:
    """Give torch the variables that it reads, among them where the ranks meet; returns notes on that."""
    notes = []
    if found.launcher == "srun":
        job = _number("SLURM_JOB_ID", 0) * 7 + _number("SLURM_STEP_ID", 0)
        node = re.match(r"([^,\[]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", ""))  # 'n[03-07,9],x' -> n03
        _set_default("MASTER_ADDR", node[1] + (node[2] or "") if node else "127.0.0.1")
        _set_default("MASTER_PORT", str(20000 + job % 20000))  # jobs on one node must not meet on a port
    elif found.launcher == "mpirun":
        is_one_node = found.local_world_size == found.world_size
        job_name = next(
            (os.environ[name] for name in _JOB_NAMES if _is_set(name)), str(os.getppid())
        )  # the ranks' parent
        _set_default("MASTER_ADDR", "127.0.0.1")
        _set_default("MASTER_PORT", str(20000 + zlib.crc32(job_name.encode()) % 10000) if is_one_node else "29500")
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        notes.append(f"{found.world_size} ranks of mpirun meet at {place}; MASTER_ADDR and MASTER_PORT choose another")
    for field in ("rank", "local_rank", "world_size", "local_world_size") if found.world_size > 1 else ():
        os.environ[field.upper()] = str(getattr(found, field))
    return notes


def _set_default(name: str, value: str) -> None:
    if not _is_set(name):
        os.environ[name] = value


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


def launchers_node(launcher: str) -> str:
    """The launcher's own number of this rank's node; '' where it has none."""
    return os.environ.get({"torchrun": "GROUP_RANK", "srun": "SLURM_NODEID"}.get(launcher, ""), "").strip()


def launcher_precision() -> str | None:
    """The precision that `accelerate launch` was asked for, in dtrain's words; None when it was not."""
    return {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))


def has_accelerate_settings() -> bool:
    """Whether `accelerate launch`, or `dtrain launch --launcher accelerate`, gave its settings to this process."""
    return any(name.startswith("ACCELERATE_") for name in os.environ)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def error_file() -> str:
    """Where torchrun looks for what a rank says of its failure, to repeat it as its own last words; '' elsewhere."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "")


def node_name() -> str:
    """What the batch system calls this machine, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_number(found: Environment) -> int:
    """Which of the job's nodes this is, as the launcher counts them."""
    variable = {"torchrun": "GROUP_RANK", "srun": "SLURM_NODEID"}.get(found.launcher, "")
    return _number(variable, found.rank // found.local_world_size)


def name_of_node(number: int) -> str:
    """What the batch system calls the node of that number in this step; where nothing says it, `node N`."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    names = expand_nodes(nodes)
    return names[number] if number < len(names) else f"node {number}"


def expand_nodes(text: str) -> list[str]:
    """SLURM's 'n[03-05,9],x' -> n03, n04, n05, n9, x; a name with several brackets stays as it is."""
    names = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        found = re.fullmatch(r"([^\[]*)\[([\d,-]+)\]([^\[]*)", part)
        for span in found[2].split(",") if found else [""]:
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1) if found else [0]
            names += [f"{found[1]}{n:0{len(first)}}{found[3]}" if found else part for n in numbers]
    return names
