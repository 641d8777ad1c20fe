"""dtrain doctor: are this machine, or a job's nodes, fit to train? One line per probe; leaves nothing behind.

Every probe has a time limit: a disk or a server that does not answer is a finding. Started by srun or torchrun, all
ranks meet: each node is probed, their clocks are compared, and the all-reduce is theirs.
"""

import errno
import io
import json
import math
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
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from dtrain.config.build import version_of
from dtrain.config.errors import ConfigError, one_line
from dtrain.config.load import run_folder
from dtrain.distributed.environment import Environment, environment
from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.tracking.secrets import redact
from dtrain.tracking.start_mirror import look_at_mirror, resolve_mirror, shown
from dtrain.tracking.start_sender import probe_store
from dtrain.tracking.uri import resolve_tracking_uri, sqlite_file

if TYPE_CHECKING:
    from dtrain.distributed.ranks import Ranks

LOCAL_SECONDS = 20.0  # for what looks at this machine alone
STORE_SECONDS = 40.0  # of which importing mlflow takes some
TOGETHER_SECONDS = 120.0  # for all ranks to meet; importing torch takes some
OLDEST = {"torch": (2, 10), "accelerate": (1, 0), "mlflow": (3, 0)}
TENSOR_MB = 16
ROUNDS = 5
DISK_MB = 64
DISK_SECONDS = 3.0  # a slow disk is written to no longer
OWN_FILES, FILES_PER_RANK = 256, 4  # that a process has open, and for each rank of its node: gloo, store, two pipes
Probe = Callable[[], "Finding"]
NODE_PROBES = ("versions", "gpus", "nccl", "fabric", "disk", "files", "shared memory")  # in the order shown


class Finding(NamedTuple):
    """What one probe found: ok, warn or fail, in one line, and what helps."""

    probe: str
    status: str
    found: str
    cure: str = ""


def judged(probe: str, found: str, *checks: tuple[bool, str, str]) -> Finding:
    """What was found, with status and cure of the first check that holds, else ok."""
    status, cure = next(((status, cure) for holds, status, cure in checks if holds), ("ok", ""))
    return Finding(probe, status, found, cure)


def examine(config: Mapping[str, Any], as_json: bool = False) -> int:
    """Run all probes and print what they find, as lines or one JSON object; every rank calls it, rank 0 prints.

    The run folder and the MLflow that are probed are those of `config`, which may be empty. Returns the exit status,
    the same on every rank: 0 where nothing failed, else 1.
    """
    here = environment()
    node, mlflow = _alone(here, config)
    findings = _together(here, node, mlflow) if here.world_size > 1 else [*node, _pair(), *mlflow]
    if here.rank == 0:
        print(_as_text(findings, as_json), flush=True)
    return FAILED if any(one.status == "fail" for one in findings) else DONE


def _alone(here: Environment, config: Mapping[str, Any]) -> tuple[list[Finding], list[Finding]]:
    """What each node's first rank finds without the others, and what rank 0 alone finds of MLflow."""
    if here.local_rank != 0:
        return [], []
    folder = run_folder(config)
    probes = {**node_probes(here), "disk": lambda: disk(folder)}
    probes = {name: probes[name] for name in NODE_PROBES}
    if here.rank != 0:
        return in_time(probes, LOCAL_SECONDS), []
    uri, experiment = (config.get("mlflow") or {}).get("tracking_uri"), config.get("experiment") or "default"
    probes["mlflow"] = lambda: store(uri, experiment)  # beside the others, since all ranks wait for it
    if (config.get("trainer") or {}).get("mirror_to"):
        probes["mirror"] = lambda: mirror(config)[0]
    found = in_time(probes, STORE_SECONDS + 5)
    far = [one for one in found if one.probe in ("mlflow", "mirror")]
    return [one for one in found if one not in far], far


def node_probes(here: Environment) -> dict[str, Probe]:
    """What is looked at on each node, but for the disk."""
    return {
        "versions": versions,
        "gpus": gpus,
        "nccl": nccl,
        "fabric": fabric,
        "files": lambda: files(here),
        "shared memory": shared_memory,
    }


def _as_text(findings: Sequence[Finding], as_json: bool) -> str:
    if as_json:
        ok = all(one.status != "fail" for one in findings)
        return json.dumps({"ok": ok, "findings": [one._asdict() for one in findings]}, indent=2)
    width = max(len(one.probe) for one in findings)
    texts = ["; ".join(one_line(text) for text in (one.found, one.cure) if text) for one in findings]
    return "\n".join(f"{one.status:<5} {one.probe:<{width}}  {text}" for one, text in zip(findings, texts, strict=True))


def in_time(probes: Mapping[str, Probe], seconds: float) -> list[Finding]:
    """What the probes find, all at once; one that fails or does not come back in time is a finding, too."""
    found: dict[str, Finding] = {}

    def run(name: str, probe: Probe) -> None:
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = Finding(name, "fail", f"{type(error).__name__}: {error}")

    # Daemons: what hangs in the kernel can only be abandoned.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in probes.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {seconds:.0f} s"
    return [found.get(name) or Finding(name, "fail", late, "look at its file system or network") for name in probes]


def versions() -> Finding:
    """Python and the libraries that a training cannot do without."""
    found, missing = [f"Python {platform.python_version()}"], []
    for name, least in OLDEST.items():
        version = version_of(name)
        found.append(f"{name} {version}" if version else f"no {name}")
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()) < least:
            missing.append(f"{name}>={'.'.join(map(str, least))}")
    return judged("versions", ", ".join(found), (bool(missing), "fail", f"pip install {shlex.join(missing)}"))


def gpus() -> Finding:
    """What torch can compute on."""
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidia0").exists() and not shutil.which("nvidia-smi"):
            return Finding("gpus", "ok", "none; the CPU is used")
        cure = "install a torch built for CUDA, or a driver that fits it; in a container: --gpus all"
        return Finding("gpus", "fail", f"there is an NVIDIA device, but torch {torch.__version__} sees none", cure)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    memory = [torch.cuda.mem_get_info(index) for index in range(len(names))]
    used = [str(index) for index, (free, total) in enumerate(memory) if free < 0.9 * total]
    text = f"{kinds}, CUDA {torch.version.cuda}" + (f"; memory taken on {', '.join(used)}" if used else "")
    return judged("gpus", text, (bool(used), "warn", "another process uses them: nvidia-smi"))


def nccl() -> Finding:
    """The library by which GPUs communicate."""
    import torch

    if not torch.cuda.is_available():
        return Finding("nccl", "ok", "not needed: CPUs communicate through gloo")
    if not torch.distributed.is_nccl_available():
        cure = "install a torch with NCCL; without it GPUs communicate through gloo, slowly"
        return Finding("nccl", "fail" if torch.cuda.device_count() > 1 else "warn", "this torch has none", cure)
    return Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def fabric() -> Finding:
    """How this machine reaches others: InfiniBand's ports, network interfaces, and those that variables choose."""
    up = {name: stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup}
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        prefixes = tuple(name.lstrip("=") for name in value.split(",") if name and not name.startswith("^"))
        if prefixes and not any(name.startswith(prefixes) for name in up):
            cure = f"unset it, or choose from {', '.join(up)}"
            return Finding("fabric", "fail", f"{variable} is {value}, and no such interface is up", cure)
    states = {path.parts[-4]: path.read_text() for path in Path("/sys/class/infiniband").glob("*/ports/*/state")}
    active = [name for name, state in states.items() if "ACTIVE" in state]
    if states and not active:
        text = f"InfiniBand is present but not active: {', '.join(states)}"
        return Finding("fabric", "warn", text, "ibstat shows why")
    others = [f"{name} {speed} Mb/s" if speed else name for name, speed in up.items() if name != "lo"]
    text = f"InfiniBand {', '.join(active)}" if active else f"no InfiniBand; {', '.join(others) or 'lo alone'}"
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        cure = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return Finding("fabric", "warn", f"{text}; this host's name {socket.gethostname()} has no address", cure)
    return Finding("fabric", "ok", text)


def disk(folder: Path) -> Finding:
    """Whether the run folder's disk can be written and read, how fast, and its free space; by a file without a name."""
    existing = existing_part(folder)
    try:
        written, read = disk_speeds(existing)
    except OSError as error:
        return Finding("disk", "fail", f"{existing}: {error.strerror}", "choose another trainer.checkpoint_dir")
    free_gb = shutil.disk_usage(existing).free / 1e9
    return judged(
        "disk",
        f"{existing}: {written:.0f} MB/s, synced at each MB, read at {read:.0f} MB/s, {free_gb:.1f} GB free",
        (free_gb < 0.1, "fail", "free some space"),
        (free_gb < 5, "warn", "a checkpoint is four times the weights, and trainer.keep_last are kept"),
        (written < 20, "warn", "checkpoints take long there; choose a faster trainer.checkpoint_dir"),
    )


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def disk_speeds(folder: Path) -> tuple[float, float]:
    """MB/s written, and read back past the system's own memory where it can be; an OSError where it cannot be done."""
    block = os.urandom(1 << 20)
    written, began = 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while written < DISK_MB and time.monotonic() - began < DISK_SECONDS:
            file.write(block)
            os.fsync(file.fileno())
            written += 1
        to_write = time.monotonic() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began, whole = time.monotonic(), io.BufferedReader(file, 1 << 20)
        while back := whole.read(1 << 20):
            if back != block:
                raise OSError(errno.EIO, "what was read is not what was written")
        return written / max(to_write, 1e-9), written / max(time.monotonic() - began, 1e-9)


def files(here: Environment | None = None) -> Finding:
    """How many files and sockets processes may have open: workers pass tensors by them, and ranks talk through them.

    The ranks of one node are connected each with each, and their launcher with all of them; those of several nodes with
    some. The store that all ranks of a job have a connection with is where rank 0 is.
    """
    here = here or Environment()
    soft, hard = (_files(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    needed, in_torchrun = OWN_FILES + FILES_PER_RANK * here.local_world_size, math.inf
    if here.world_size > 1 and here.rank == here.local_rank:
        needed += here.world_size
        if here.launcher == "torchrun":  # torchrun itself takes no more than it was given; `dtrain launch` does
            in_torchrun = _files(resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)[0])
    text = f"{hard} open files at most, which ranks take (at first {soft}); {needed} are needed on this node"
    cure = f"ulimit -Hn {max(65536, needed)} before the start, by an administrator (limits.conf, LimitNOFILE)"
    few = f"ulimit -Sn {hard} before torchrun, which may have {in_torchrun} and holds one for each rank of the job"
    checks = (hard < needed, "fail", cure), (in_torchrun < needed, "fail", few), (hard < 4096, "warn", cure)
    finding = judged("files", text, *checks)
    return finding._replace(found=finding.found.replace("inf", "no limit"))


def _files(limit: int) -> float:
    return math.inf if limit == resource.RLIM_INFINITY else limit


def shared_memory() -> Finding:
    """The memory by which loader workers pass batches on."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    free_gb = shutil.disk_usage(place).free / 1e9
    fails = free_gb < 0.05 or not os.access(place, os.W_OK)
    cure = "docker run --shm-size=8g (or --ipc=host); else loaders.num_workers=0"
    return judged(
        "shared memory", f"{free_gb:.2f} GB free in {place}", (fails, "fail", cure), (free_gb < 1, "warn", cure)
    )


def store(given: str | None, experiment: str) -> Finding:
    """Whether MLflow can be reached and written to; nothing is made there."""
    try:
        uri = resolve_tracking_uri(given)
    except ValueError as mistake:
        return Finding("mlflow", "fail", redact(str(mistake)))
    cure = "figures wait in the run folder until `dtrain sync RUN_FOLDER`; check mlflow.tracking_uri and the network"
    if file := sqlite_file(uri):
        error = _sqlite_error(file)
        cure = "choose another mlflow.tracking_uri, on a disk of this machine"
    else:
        error = probe_store(uri, experiment, STORE_SECONDS)
    if error:
        cure = cure.partition(";")[0] if error.startswith("the server answers ") else cure
        return Finding("mlflow", "fail", f"{redact(uri)}: {error}", cure)
    return Finding("mlflow", "ok", f"{redact(uri)} can be {'made' if file and not file.exists() else 'written'}")


def mirror(config: Mapping[str, Any]) -> list[Finding]:
    """Whether `trainer.mirror_to` can be written to; nothing where there is none."""
    given = (config.get("trainer") or {}).get("mirror_to")
    if not given:
        return []
    try:
        address = resolve_mirror(given, run_folder(config))
    except ValueError as mistake:
        return [Finding("mirror", "fail", redact(str(mistake)))]
    far = look_at_mirror(address, timeout_seconds=STORE_SECONDS)
    if "error" in far:
        return [Finding("mirror", "fail", f"{redact(address)}: {far['error']}", "check trainer.mirror_to")]
    holds = f", and holds {shown(far['run'])}" if far["run"] else ""
    return [Finding("mirror", "ok", f"{redact(address)} can be written{holds}")]


def _sqlite_error(file: Path) -> str:
    """Why a database could not be written, else ''; a transaction is begun, and rolled back by closing."""
    if not file.exists():
        folder = next(path for path in file.parents if path.is_dir())
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=10)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        return str(error)
    return ""


def _together(here: Environment, node: list[Finding], mlflow: list[Finding]) -> list[Finding]:
    """What all ranks of this job find, rank 0's of MLflow at the end; on every rank all of it."""
    try:
        from dtrain.distributed.process_group import set_up

        ranks = set_up(ddp={"timeout_seconds": TOGETHER_SECONDS})
        nodes = ranks.gather((ranks.host, node) if here.local_rank == 0 else None)
        merged = _merged([each for each in nodes or () if each])
        merged += [_all_reduced(ranks.rank, ranks.world_size, ranks.device), *clocks(ranks, here), *mlflow]
        findings: list[Finding] = ranks.broadcast(merged)
        ranks.close()
        return findings
    except ConfigError as error:
        failed = Finding("ranks", "fail", str(error))
    except Exception as error:
        cure = "is each of them started, and does MASTER_ADDR lead to rank 0? GLOO_SOCKET_IFNAME chooses a network"
        failed = Finding("ranks", "fail", f"{here.world_size} ranks did not join: {error}", cure)
    return [*node, failed, *mlflow]


def _merged(nodes: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One line per probe of all nodes: the first one's, or the worst with its host."""
    merged = []
    for probes in zip(*(findings for _, findings in nodes), strict=True):
        levels = [("ok", "warn", "fail").index(probe.status) for probe in probes]
        worst = levels.index(max(levels))
        finding, count = probes[worst], levels.count(levels[worst])
        where = f" ({nodes[worst][0]}; {count} of {len(nodes)} nodes)" if len(nodes) > 1 else ""
        merged.append(finding._replace(found=finding.found + where))
    return merged


def clocks(ranks: "Ranks", here: Environment) -> list[Finding]:
    """How far the nodes' clocks are from rank 0's, by the fastest of a few questions to all; nothing for one node."""
    rounds = []
    for _ in range(ROUNDS):
        asked = time.time()
        ranks.broadcast()
        answers = ranks.gather((time.time(), ranks.rank) if here.local_rank == 0 else None) or []
        error = (time.time() - asked) / 2
        rounds.append((error, [(answer[0] - asked - error, answer[1]) for answer in answers[1:] if answer]))
    error, offsets = min(rounds)
    if not offsets:
        return []
    offset, rank = max(offsets, key=lambda each: abs(each[0]))
    text = f"of {len(offsets) + 1} nodes rank {rank}'s is farthest, {offset:+.3f} s (to {error:.3f} s) from rank 0's"
    cure = "set the clocks by NTP (chronyc makestep), else times in MLflow are wrong"
    return [judged("clocks", text, (abs(offset) > 60, "fail", cure), (abs(offset) > 1, "warn", cure))]


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
        is_right = bool((tensor == world_size * (world_size + 1) / 2).all())  # which waits for the device
        best = min(best, time.perf_counter() - began)
    gb_per_s = 2 * (world_size - 1) / world_size * TENSOR_MB / 1e3 / best  # what goes over each rank's link
    backend = "NCCL" if device.type == "cuda" and "nccl" in dist.get_backend() else "gloo"
    text = f"{world_size} ranks, {backend}, {TENSOR_MB} MB in {best * 1e3:.1f} ms: {gb_per_s:.2f} GB/s each"
    if not is_right:
        return Finding("all-reduce", "fail", f"{text}; the sum is wrong", "a broken GPU or link: try without each node")
    is_slow = gb_per_s < (1.0 if backend == "NCCL" else 0.05)
    cure = "NCCL_DEBUG=INFO shows which network is used; see *_SOCKET_IFNAME"
    return judged("all-reduce", text, (is_slow, "warn", cure))


def _pair() -> Finding:
    """The all-reduce of two ranks that are started here for it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dtrain.launch.doctor", f"{folder}/store"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
        end = time.monotonic() + TOGETHER_SECONDS
        try:
            outputs = [rank.communicate(timeout=max(0.1, end - time.monotonic())) for rank in ranks]
            return Finding(*json.loads(outputs[0][0].splitlines()[-1]))
        except subprocess.TimeoutExpired:
            found = f"two ranks on this machine gave no sum within {TOGETHER_SECONDS:.0f} s"
        except (ValueError, IndexError):
            errors = [line for _, stderr in outputs for line in stderr.strip().splitlines()[-1:]]
            found = errors[0] if errors else "two ranks on this machine gave no sum"
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    cure = "GLOO_SOCKET_IFNAME=lo, and a firewall that lets this machine connect to itself"
    return Finding("all-reduce", "fail", found, cure)


def _be_one_of_two(store_file: str, rank: int) -> None:
    """One rank of `_pair`: prints its finding as JSON."""
    import torch
    import torch.distributed as dist

    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.device_count() > 1 and dist.is_nccl_available():
        backend, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=TOGETHER_SECONDS / 2)
    dist.init_process_group(backend, f"file://{store_file}", timeout, world_size=2, rank=rank)
    print(json.dumps(_all_reduced(rank, 2, device)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_one_of_two(sys.argv[1], int(sys.argv[2]))
