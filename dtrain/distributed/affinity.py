"""On which processor cores a rank works: those on its GPU's side of the machine, where Linux tells and nobody chose."""

import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dtrain.config.errors import ConfigError
from dtrain.distributed.environment import Environment, cores

VARIABLE = "DTRAIN_AFFINITY"  # auto | none, also from `dtrain launch --affinity`
CHOICES = ("auto", "none")
SYSFS = Path("/sys")
_for_workers: set[int] = set()  # where this rank's loader workers may work, if not where it does itself


class Machine(NamedTuple):
    """What Linux says of a machine's processors: logical CPUs by NUMA node, and the physical core of each."""

    nodes: Mapping[int, frozenset[int]]
    core_of: Mapping[int, int]  # the first CPU of its core
    gpus: Mapping[str, int]  # NUMA node by PCI address; -1: not known

    def cores_in(self, cpus: set[int]) -> int:
        """How many physical cores they are."""
        return len({self.core_of.get(cpu, cpu) for cpu in cpus})


class Place(NamedTuple):
    """Where one rank works: on these CPUs of one NUMA node, of which it has a share with so many ranks."""

    cpus: frozenset[int]
    node: int
    ranks: int
    by_gpu: bool


def read_machine(root: Path = SYSFS, gpus: Sequence[str] = ()) -> Machine:
    """Read sysfs below a root; what is not there, as in some containers, is not known.

    Args:
        root: In place of /sys.
        gpus: PCI addresses as `0000:3b:00.0`.
    """
    nodes = {}
    for folder in sorted(root.glob("devices/system/node/node[0-9]*")):
        if cpus := parse_cpus(_text(folder / "cpulist")):  # some nodes have memory alone
            nodes[int(folder.name[4:])] = frozenset(cpus)
    core_of = {}
    for cpu in frozenset().union(*nodes.values()):
        siblings = parse_cpus(_text(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        core_of[cpu] = min(siblings, default=cpu)
    return Machine(nodes, core_of, {gpu: _node_of(root, gpu, nodes) for gpu in gpus})


def _node_of(root: Path, gpu: str, nodes: Mapping[int, frozenset[int]]) -> int:
    """A GPU's NUMA node: as the kernel numbers it, else the one whose CPUs it calls local."""
    device = root / "bus/pci/devices" / gpu
    text = _text(device / "numa_node")
    if text.isdigit() and int(text) in nodes:
        return int(text)
    local = parse_cpus(_text(device / "local_cpulist"))
    found = [node for node, cpus in nodes.items() if local and local <= cpus]
    return found[0] if len(found) == 1 else -1


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def parse_cpus(text: str) -> set[int]:
    """Linux's lists: '0-3,8' -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def cpus_text(cpus: Sequence[int] | frozenset[int] | set[int]) -> str:
    """The same back."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def places(machine: Machine, allowed: set[int], gpus: Sequence[str | None]) -> list[Place | None]:
    """Where each of a node's ranks works, by local rank; None for all of them where nothing is gained.

    Args:
        machine: From `read_machine`, with these GPUs.
        allowed: The CPUs that all of them may use, which a batch system may have limited.
        gpus: The PCI address of each rank's GPU, None of one that has none: such ranks are spread over the nodes.
    """
    sides = {node: frozenset(cpus & allowed) for node, cpus in machine.nodes.items() if cpus & allowed}
    if len(sides) < 2 or len(gpus) < 2:
        return [None] * len(gpus)
    if any(gpus):
        wanted = [machine.gpus.get(gpu, -1) if gpu else -1 for gpu in gpus]
    elif len(gpus) < len(sides):  # one rank for two sides would have half of what it may use
        return [None] * len(gpus)
    else:
        order = sorted(sides)
        wanted = [order[local * len(order) // len(gpus)] for local in range(len(gpus))]
    # Where each rank sees its own GPU alone, the others are taken to be spread evenly.
    least = -(-len(gpus) // len(sides)) if -1 in wanted else 1
    shared = {node: max(least, wanted.count(node)) for node in sides}
    return [
        Place(sides[node], node, shared[node], bool(gpus[local]))
        if node in sides and len(sides[node]) >= 2 * shared[node]  # a rank needs a CPU beside its workers'
        else None
        for local, node in enumerate(wanted)
    ]


def chosen_by_others(found: Environment) -> bool:
    """Whether somebody has given this very rank CPUs of its own: srun, mpirun, or taskset or numactl in a script."""
    own = os.sched_getaffinity(0)
    if found.launcher == "srun":
        return os.environ.get("SLURM_CPU_BIND_TYPE", "none") not in ("", "none")
    if found.launcher == "mpirun":  # whose daemons are not bound as their ranks are
        return len(own) < (psutil.cpu_count() or len(own))
    with suppress(OSError):
        return own != os.sched_getaffinity(os.getppid())
    return False


def take_place(found: Environment, gpus: Sequence[str | None], root: Path = SYSFS) -> tuple[int, list[str]]:
    """Bind this rank's main thread, and what it starts, to its place; the cores that are its share, and a note.

    ConfigError: DTRAIN_AFFINITY is neither auto nor none.
    """
    wish = os.environ.get(VARIABLE, "").strip() or "auto"
    if wish not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {wish!r}; possible: {', '.join(CHOICES)}")
    share = max(1, cores() // found.local_world_size)
    if not hasattr(os, "sched_setaffinity") or found.world_size == 1:
        return share, []
    machine, allowed = read_machine(root, [gpu for gpu in gpus if gpu]), os.sched_getaffinity(0)
    if chosen_by_others(found):  # these CPUs are this rank's alone
        return machine.cores_in(allowed), []
    if wish == "none":
        return share, []
    all_places = places(machine, allowed, gpus)
    place = all_places[found.local_rank] if found.local_rank < len(all_places) else None
    share = max(1, machine.cores_in(allowed) // found.local_world_size)
    if place is None:
        return share, []
    _bind(place, allowed, found.local_world_size)
    return max(1, machine.cores_in(set(place.cpus)) // place.ranks), [note_on(all_places)]


def _bind(place: Place, allowed: set[int], ranks: int) -> None:
    """Bind this thread; loader workers stay with it, unless its side has much less for each rank than the machine."""
    with suppress(OSError):
        os.sched_setaffinity(0, place.cpus)
    _for_workers.clear()
    if 2 * len(place.cpus) * ranks < len(allowed) * place.ranks:
        _for_workers.update(allowed)


def free_worker() -> None:
    """In a loader worker: work wherever the ranks together may, if the rank's own place is too small for workers."""
    if _for_workers:
        with suppress(OSError):
            os.sched_setaffinity(0, _for_workers)


def note_on(all_places: Sequence[Place | None]) -> str:
    """Which rank of this node works where, in one line."""
    by_node: dict[int, list[int]] = {}
    for local, place in enumerate(all_places):
        if place is not None:
            by_node.setdefault(place.node, []).append(local)
    known = {place.node: place for place in all_places if place is not None}
    parts = []
    for node, ranks in sorted(by_node.items()):
        side = f"CPUs {cpus_text(known[node].cpus)} (NUMA node {node}"
        side += f", the side of {'its GPU' if len(ranks) == 1 else 'their GPUs'})" if known[node].by_gpu else ")"
        parts.append(f"{'rank' if len(ranks) == 1 else 'ranks'} {cpus_text(ranks)} on {side}")
    return f"of this node {', '.join(parts)}; {VARIABLE}=none leaves them where the system puts them"


def pci_addresses(count: int) -> list[str | None]:
    """The PCI address of each GPU that this process sees, as sysfs calls it; None where this torch does not say."""
    import torch

    found: list[str | None] = []
    for number in range(count):
        facts: Any = torch.cuda.get_device_properties(number)
        try:
            found.append(f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0")
        except AttributeError:
            found.append(None)
    return found


def raise_open_files() -> None:
    """Take as many open files as the system allows: loader workers and ranks hold many, and the default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**20 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
