"""dtrain doctor: are this machine, or a job's nodes, fit to train? One line per probe; leaves nothing behind.

Every probe has a limit in time: a disk or a server that does not answer is a finding. Started by srun or torchrun, all
ranks come together: each node is looked at, their clocks are compared, and the all-reduce is theirs.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from dtrain.config.errors import ConfigError, one_line
from dtrain.config.load import run_folder
from dtrain.distributed.environment import Environment, environment
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.setup import set_up
from dtrain.tracking.secrets import redact
from dtrain.tracking.start_sender import probe_store
from dtrain.tracking.uri import resolve_tracking_uri, sqlite_file

LOCAL_SECONDS = 20.0  # for what looks at this machine alone
STORE_SECONDS = 40.0  # of which importing mlflow takes some
TOGETHER_SECONDS = 120.0  # for all ranks to come; importing torch takes some
OLDEST = {"torch": (2, 10), "accelerate": (1, 0), "mlflow": (3, 0)}
TENSOR_MB = 16
ROUNDS = 5
DISK_MB = 64
PATIENT_DISK_SECONDS = 3.0  # a slow disk is asked no longer
STATUS = ("ok", "warn", "fail")


class Finding(NamedTuple):
    """What one probe found: ok, warn or fail, in one line, and what helps."""

    probe: str
    status: str
    found: str
    cure: str = ""


Probe = Callable[[], Finding]


def examine(config: Mapping[str, Any], say: Callable[[str], None], as_json: bool = False) -> int:
    """Look at everything and say it; every rank calls it, rank 0 speaks.

    Args:
        config: Whose run folder and MLflow are probed; may be empty.
        say: Takes a line.
        as_json: One JSON object instead: `ok`, and the `findings`.

    Returns:
        The exit status, the same on every rank: 0 where nothing failed, else 1.
    """
    here = environment()
    folder, experiment = run_folder(config), config.get("experiment") or "default"
    findings, last = [], []
    if here.local_rank == 0:
        look = {"versions": versions, "gpus": gpus, "nccl": nccl, "fabric": fabric, "disk": lambda: disk(folder)}
        look |= {"files": lambda: files(here.world_size), "shared memory": shared_memory}
        uri = (config.get("mlflow") or {}).get("tracking_uri")
        if here.rank == 0:  # beside the others, since all ranks wait for it
            look["mlflow"] = lambda: store(uri, experiment)
        findings = in_time(look, STORE_SECONDS + 5 if here.rank == 0 else LOCAL_SECONDS)
        last = [findings.pop()] if here.rank == 0 else []
    if here.world_size > 1:
        findings = _together(here, findings, last)
    else:
        findings += [_pair(), *last]
    if here.rank == 0:
        for line in _as_text(findings, as_json):
            say(line)
    return int(any(one.status == "fail" for one in findings))


def _as_text(findings: Sequence[Finding], as_json: bool) -> list[str]:
    if as_json:
        ok = all(one.status != "fail" for one in findings)
        return [json.dumps({"ok": ok, "findings": [one._asdict() for one in findings]}, indent=2)]
    width = max(len(one.probe) for one in findings)
    return [
        f"{one.status:<5} {one.probe:<{width}}  {one_line(one.found)}" + (f"; {one_line(one.cure)}" if one.cure else "")
        for one in findings
    ]


def in_time(probes: Mapping[str, Probe], seconds: float) -> list[Finding]:
    """What the probes find, all at once; one that fails or does not come back in time is a finding, too."""
    found: dict[str, Finding] = {}

    def run(name: str, probe: Probe) -> None:
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = Finding(name, "fail", f"{type(error).__name__}: {error}")

    # Daemons: what hangs in the kernel can only be left alone.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in probes.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = "look at its file system or network"
    return [found.get(name) or Finding(name, "fail", f"no answer within {seconds:.0f} s", late) for name in probes]


# --------------------------------------------------------------------------------------------------- one machine alone


def versions() -> Finding:
    """Python and the libraries that a training cannot do without."""
    found, wrong = [f"Python {platform.python_version()}"], []
    for name, least in OLDEST.items():
        its = version_of(name)
        found.append(f"{name} {its}" if its else f"no {name}")
        numbers = tuple(int(part) for part in its.split("+")[0].split(".")[:2] if part.isdigit())
        wrong += [f"{name}>={'.'.join(map(str, least))}"] if numbers < least else []
    cure = f"pip install {shlex.join(wrong)}" if wrong else ""
    return Finding("versions", "fail" if wrong else "ok", ", ".join(found), cure)


def version_of(package: str) -> str:
    """The version of an installed package, which is not imported; '' if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def gpus() -> Finding:
    """What torch can compute on."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            cure = "install a torch built for CUDA, or a driver that fits it; in a container: --gpus all"
            return Finding("gpus", "fail", f"there is an NVIDIA device, but torch {torch.__version__} sees none", cure)
        return Finding("gpus", "ok", "none; the CPU is used")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    free = [torch.cuda.mem_get_info(index) for index in range(len(names))]
    used = [index for index, (left, whole) in enumerate(free) if left < 0.9 * whole]
    text = f"{kinds}, CUDA {torch.version.cuda}"
    if used:
        cure = "another process is at work there: nvidia-smi"
        return Finding("gpus", "warn", f"{text}; memory taken on {', '.join(map(str, used))}", cure)
    return Finding("gpus", "ok", text)


def nccl() -> Finding:
    """The library by which GPUs talk to one another."""
    import torch

    if not torch.cuda.is_available():
        return Finding("nccl", "ok", "not needed: CPUs talk through gloo")
    if not torch.distributed.is_nccl_available():
        several = torch.cuda.device_count() > 1
        cure = "install a torch with NCCL; without it GPUs talk through gloo, slowly"
        return Finding("nccl", "fail" if several else "warn", "this torch has none", cure)
    return Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def fabric() -> Finding:
    """How this machine reaches others: InfiniBand's ports, network interfaces, and those that variables choose."""
    up = {name: stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup}
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wish = os.environ.get(variable, "")
        names = [name.lstrip("=") for name in wish.split(",") if name and not name.startswith("^")]
        if names and not any(there.startswith(name) for name in names for there in up):
            cure = f"unset it, or choose from {', '.join(up)}"
            return Finding("fabric", "fail", f"{variable} is {wish}, and no such interface is up", cure)
    states = {path.parts[-4]: path.read_text() for path in Path("/sys/class/infiniband").glob("*/ports/*/state")}
    active = [name for name, state in states.items() if "ACTIVE" in state]
    wires = [f"{name} {speed} Mb/s" if speed else name for name, speed in up.items() if name != "lo"]
    text = f"InfiniBand {', '.join(active)}" if active else f"no InfiniBand; {', '.join(wires) or 'lo alone'}"
    if states and not active:
        return Finding("fabric", "warn", f"InfiniBand is there but not active: {', '.join(states)}", "ibstat tells why")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        cure = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return Finding("fabric", "warn", f"{text}; this host's name {socket.gethostname()} has no address", cure)
    return Finding("fabric", "ok", text)


def disk(folder: Path) -> Finding:
    """Whether the run folder's disk can be written, how fast, and how much room it has; by a file without a name."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    block = os.urandom(1 << 20)
    written, began = 0, time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            while written < DISK_MB and time.monotonic() - began < PATIENT_DISK_SECONDS:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written += 1
    except OSError as error:
        return Finding("disk", "fail", f"{there}: {error.strerror}", "choose another trainer.checkpoint_dir")
    speed = written / max(time.monotonic() - began, 1e-9)
    free_gb = shutil.disk_usage(there).free / 1e9
    text = f"{there}: {speed:.0f} MB/s, synced at each MB, {free_gb:.1f} GB free"
    if free_gb < 0.1:
        return Finding("disk", "fail", text, "free some space")
    if free_gb < 5:
        return Finding("disk", "warn", text, "a checkpoint is four times the weights, and trainer.keep_last are kept")
    if speed < 20:
        return Finding("disk", "warn", text, "checkpoints take long there; choose a faster trainer.checkpoint_dir")
    return Finding("disk", "ok", text)


def files(world_size: int = 1) -> Finding:
    """How many files and sockets a process may have open: workers pass tensors by them, gloo has one per rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    need = 256 + 2 * world_size
    if soft == resource.RLIM_INFINITY or soft >= max(4096, need):
        return Finding("files", "ok", f"{'no limit' if soft == resource.RLIM_INFINITY else soft} open files")
    cure = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)} before the start"
    return Finding("files", "fail" if soft < need else "warn", f"{soft} open files at most (hard limit {most})", cure)


def shared_memory() -> Finding:
    """The memory by which loader workers pass batches on."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    free_gb = shutil.disk_usage(place).free / 1e9
    cure = "docker run --shm-size=8g (or --ipc=host); else loaders.num_workers=0"
    status = "fail" if free_gb < 0.05 or not os.access(place, os.W_OK) else "warn" if free_gb < 1 else "ok"
    return Finding("shared memory", status, f"{free_gb:.2f} GB free in {place}", "" if status == "ok" else cure)


def store(wish: str | None, experiment: str) -> Finding:
    """Whether MLflow can be reached and written to; nothing is made there."""
    cure = "figures wait in the run folder until `dtrain sync RUN_FOLDER`; check mlflow.tracking_uri and the network"
    try:
        uri = resolve_tracking_uri(wish)
    except ValueError as error:
        return Finding("mlflow", "fail", redact(str(error)))
    if file := sqlite_file(uri):
        wrong = _why_no_sqlite(file)
        cure = "choose another mlflow.tracking_uri, on a disk of this machine"
    else:
        wrong = probe_store(uri, experiment, STORE_SECONDS)
    if wrong:
        return Finding("mlflow", "fail", f"{redact(uri)}: {wrong}", cure)
    made = "can be made" if file and not file.exists() else "can be written"
    return Finding("mlflow", "ok", f"{redact(uri)} {made}")


def _why_no_sqlite(file: Path) -> str:
    """Why a database could not be written; a transaction is begun and rolled back, or a file without a name made."""
    if not file.exists():
        there = next(path for path in file.parents if path.is_dir())
        return "" if os.access(there, os.W_OK) else f"{there} cannot be written"
    try:
        connection = sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=10)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------------------------- ranks together


def _together(here: Environment, findings: list[Finding], last: list[Finding]) -> list[Finding]:
    """What all ranks of this job find, `last` (rank 0's) at the end; on every rank all of it."""
    try:
        ranks = set_up(ddp={"timeout_seconds": TOGETHER_SECONDS})
        nodes = ranks.gather((ranks.host, findings) if here.local_rank == 0 else None)
        merged = _merged([node for node in nodes or () if node])
        merged.append(_all_reduced(ranks.rank, ranks.world_size, ranks.device))
        merged += [one] if (one := clocks(ranks, here)) else []
        merged = ranks.broadcast(merged + last)
        ranks.close()
        return merged
    except ConfigError as error:
        apart = Finding("ranks", "fail", str(error))
    except Exception as error:
        cure = "is each of them started, and does MASTER_ADDR lead to rank 0? GLOO_SOCKET_IFNAME chooses a network"
        apart = Finding("ranks", "fail", f"{here.world_size} ranks did not come together: {error}", cure)
    return [*findings, apart, *last]


def _merged(nodes: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One line per probe of all nodes: the first one's, or the worst with its host."""
    merged = []
    for probes in zip(*(findings for _, findings in nodes), strict=True):
        worst = max(range(len(nodes)), key=lambda number: (STATUS.index(probes[number].status), -number))
        one = probes[worst]
        alike = sum(probe.status == one.status for probe in probes)
        where = f" ({nodes[worst][0]}; {alike} of {len(nodes)} nodes)" if len(nodes) > 1 else ""
        merged.append(one._replace(found=one.found + where))
    return merged


def clocks(ranks: Ranks, here: Environment) -> Finding | None:
    """How far the nodes' clocks are from rank 0's, by the fastest of a few questions and answers; None for one node."""
    import torch
    import torch.distributed as dist

    nodes = ranks.gather(ranks.rank if here.local_rank == 0 else None)
    others = [rank for rank in ranks.broadcast(nodes) if rank]
    if not others:
        return None
    offsets = []
    for rank in others:
        answer, best = torch.zeros((), dtype=torch.float64), (float("inf"), 0.0)
        for _ in range(ROUNDS):
            if ranks.is_main:
                asked = time.time()
                dist.send(answer, rank)
                dist.recv(answer, rank)
                took = time.time() - asked
                best = min(best, (took, float(answer) - asked - took / 2))
            elif ranks.rank == rank:
                dist.recv(answer, 0)
                dist.send(answer.fill_(time.time()), 0)
        offsets.append((abs(best[1]), rank, *best))
    skew, rank, took, offset = max(offsets)
    text = f"of {len(others) + 1} nodes rank {rank}'s is farthest, {offset:+.3f} s (to {took / 2:.3f} s) from rank 0's"
    status = "fail" if skew > 60 else "warn" if skew > 1 else "ok"
    cure = "" if status == "ok" else "set the clocks by NTP (chronyc makestep), else times in MLflow are wrong"
    return Finding("clocks", status, text, cure)


def _all_reduced(rank: int, world_size: int, device: Any) -> Finding:
    """The bandwidth of an all-reduce, and whether its sum is right."""
    import torch
    import torch.distributed as dist

    tensor = torch.empty(TENSOR_MB * 250_000, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        tensor.fill_(rank + 1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        right = bool((tensor == world_size * (world_size + 1) / 2).all())  # which waits for the device
        best = min(best, time.perf_counter() - began)
    gb_per_s = 2 * (world_size - 1) / world_size * TENSOR_MB / 1e3 / best  # what goes over each rank's link
    how = "NCCL" if device.type == "cuda" and "nccl" in dist.get_backend() else "gloo"
    text = f"{world_size} ranks, {how}, {TENSOR_MB} MB in {best * 1e3:.1f} ms: {gb_per_s:.2f} GB/s each"
    if not right:
        return Finding("all-reduce", "fail", f"{text}; the sum is wrong", "a broken GPU or link: try without each node")
    if gb_per_s < (1.0 if how == "NCCL" else 0.05):
        return Finding("all-reduce", "warn", text, "NCCL_DEBUG=INFO tells which network is used; see *_SOCKET_IFNAME")
    return Finding("all-reduce", "ok", text)


def _pair() -> Finding:
    """The all-reduce of two ranks that are started here for it."""
    import torch

    kind = "cuda" if torch.cuda.device_count() > 1 and torch.distributed.is_nccl_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "dtrain.launch.doctor", str(Path(folder) / "store"), kind]
        ranks = [
            subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        end = time.monotonic() + TOGETHER_SECONDS
        try:
            said = [rank.communicate(timeout=max(0.1, end - time.monotonic())) for rank in ranks]
            return Finding(*json.loads(said[0][0].splitlines()[-1]))
        except subprocess.TimeoutExpired:
            found = f"two ranks on this machine gave no sum within {TOGETHER_SECONDS:.0f} s"
        except (ValueError, IndexError):
            lines = [line for _, error in said for line in error.strip().splitlines()[-1:]]
            found = lines[0] if lines else "two ranks on this machine gave no sum"
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return Finding(
        "all-reduce", "fail", found, "GLOO_SOCKET_IFNAME=lo, and a firewall that lets this machine talk to itself"
    )


def _be_one_of_two(store_file: str, kind: Literal["cpu", "cuda"], rank: int) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    options: dict[str, Any] = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=TOGETHER_SECONDS / 2)}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{store_file}", **options)
    print(json.dumps(_all_reduced(rank, 2, device)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_one_of_two(sys.argv[1], "cuda" if sys.argv[2] == "cuda" else "cpu", int(sys.argv[3]))
