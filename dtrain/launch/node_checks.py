"""What a rank finds by itself before a big job: does its GPU compute, does its memory keep, what has the driver noted?

Xid numbers: NVIDIA's "XID Errors" catalogue; those of a program's own mistakes (13, 31, 43, 45, ...) count for nothing.
"""

import hashlib
import math
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.launch.code_copy import LINK_BYTES, own_code

if TYPE_CHECKING:
    import torch

MARK_SECONDS = 5.0  # a network disk remembers for a while what was not there
ASK_SECONDS = 15.0  # nvidia-smi may hang with a GPU
COMPUTE_SECONDS = {"cuda": 2.0, "cpu": 0.3}  # a hot GPU slows down only after a while
MATRIX = {"cuda": 8192, "cpu": 384}  # rows of the square matrices that are multiplied
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}  # of the CPU's, two are more than most caches
PIECE_BYTES = {"cuda": 2**30, "cpu": 2**21}  # copied at once: of a CPU, in less time than its system gives it in a row
COPIES, COPY_SECONDS = 5, 0.2  # at least; the best one counts
MOST_OF_MEMORY = 0.9  # of what is free of a GPU's; of the CPU's two chunks
PATTERNS = (0x5555555555555555, -0x5555555555555556)  # alternating bits, and the others
XIDS = {  # of hardware: what they say
    46: "GPU stopped processing", 48: "double bit ECC error", 61: "microcontroller halted",
    62: "microcontroller halted", 63: "memory row remapped", 64: "memory row could not be remapped",
    74: "NVLink error", 79: "GPU has fallen off the bus", 92: "many single bit ECC errors",
    94: "contained memory error", 95: "uncontained memory error", 109: "context switch timed out",
    119: "GPU's system processor timed out",
    120: "GPU's system processor failed", 136: "NVLink link training failed", 140: "unrecovered ECC error",
}  # fmt: skip
XID_DAY = 86400.0  # older ones were seen to, or are told as a warning
SMI_FIELDS = {  # of nvidia-smi --query-gpu: what a number above 0, or one of the words, says
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the driver was loaded",
    "remapped_rows.failure": "a broken memory row could not be remapped",
    "remapped_rows.pending": "a memory row waits to be remapped: reset the GPU",
    "retired_pages.pending": "a memory page waits to be retired: reset the GPU",
    "clocks_event_reasons.hw_thermal_slowdown": "too hot: its clock is lowered",
    "clocks_event_reasons.hw_power_brake_slowdown": "power brake: its clock is lowered",
}
SMI_WARNS = {"clocks_event_reasons.hw_thermal_slowdown", "clocks_event_reasons.hw_power_brake_slowdown"}
Faults = Iterator[tuple[str, str]]  # ("bad", "warn" or "note", what was found)


def compute(device: "torch.device") -> tuple[float, list[str]]:
    """TFLOP/s of products of square matrices of -1 and 1, and what was wrong with them.

    The first rows are compared with the CPU's, all later products with the first one, bit by bit.
    """
    import torch

    rows, dtype = MATRIX[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    on_cpu = [torch.randint(0, 2, (rows, rows), generator=generator).mul_(2).sub_(1).float() for _ in range(2)]
    a, b = (matrix.to(device, dtype) for matrix in on_cpu)
    first = a @ b
    wrong = []
    if not torch.allclose(first[:8].float().cpu(), on_cpu[0][:8] @ on_cpu[1], rtol=0.02, atol=4.0):
        wrong.append("a product of matrices is wrong")
    differing = torch.zeros((), dtype=torch.int64, device=device)
    seconds = count = 0.0
    while seconds < COMPUTE_SECONDS[device.type]:
        began = time.perf_counter()
        again = a @ b
        _wait_for(device)
        seconds, count = seconds + time.perf_counter() - began, count + 1
        differing += (again != first).any()
    if int(differing):
        wrong.append(f"{int(differing)} products of the same matrices came out different")
    return 2 * rows**3 * count / seconds / 1e12, wrong


def memory(device: "torch.device") -> tuple[float, float, list[str]]:
    """GB that were written and read back, GB/s of a copy, and what was wrong."""
    import torch

    size = CHUNK_BYTES[device.type]
    wanted = 2 if device.type == "cpu" else int(MOST_OF_MEMORY * torch.cuda.mem_get_info(device)[0] / size)
    chunks: list[torch.Tensor] = []
    try:
        while len(chunks) < wanted:
            chunks.append(torch.empty(size // 8, dtype=torch.int64, device=device))
    except torch.OutOfMemoryError:  # others of this node may share the GPU
        pass
    wrong = 0
    for pattern in PATTERNS:
        for number, chunk in enumerate(chunks):
            chunk.fill_(pattern ^ number)
        for number, chunk in enumerate(chunks):  # when all are written: what is stored twice was overwritten
            wrong += int((chunk != pattern ^ number).sum())
    seconds = list[float]()
    piece = PIECE_BYTES[device.type]
    pieces = [*zip(chunks[1].split(piece // 8), chunks[0].split(piece // 8), strict=True)] if len(chunks) > 1 else []
    while pieces and (len(seconds) < COPIES or sum(seconds) < COPY_SECONDS):
        for target, source in pieces:
            _wait_for(device)
            began = time.perf_counter()
            target.copy_(source)
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
    best = min(seconds, default=math.inf)
    text = [f"memory did not keep {wrong} of the words that were written"] if wrong else []
    return len(chunks) * size / 1e9, 2 * piece / best / 1e9, text


def _wait_for(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def driver_notes() -> Faults:
    """What nvidia-smi counts on each GPU of this node, and the Xids in the kernel's messages."""
    if not (program := shutil.which("nvidia-smi")):
        return
    yield from _lost_gpus(program)
    for field, text in SMI_FIELDS.items():
        # One at a time: one that this driver does not know would spoil the whole question.
        for line in _asked([program, f"--query-gpu=index,{field}", "--format=csv,noheader,nounits"])[0]:
            index, _, value = line.partition(", ")
            count = re.match(r"\d+", value)
            if (count and int(count[0])) or value.strip() in ("Yes", "Active"):
                number = f" ({value.strip()})" if count else ""
                yield "warn" if field in SMI_WARNS else "bad", f"GPU {index}: {text}{number}"
    yield from _xids()


def _lost_gpus(program: str) -> Faults:
    lines, error = _asked([program, "--query-gpu=index", "--format=csv,noheader"])
    for line in [*lines, error]:
        if "lost" in line or "Unable to determine the device handle" in line or "no answer" in line:
            yield "bad", f"nvidia-smi: {line.strip()}"
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if lines and not error and there > len(lines):
        yield "bad", f"nvidia-smi shows {len(lines)} GPUs of {there}"


def _xids() -> Faults:
    """Of each kind the newest, with its age; what may not be read is told."""
    lines, error = _asked(["dmesg"])
    if error:
        yield "note", f"Xid notes: the kernel's messages cannot be read: {error}"
    newest: dict[tuple[str, int], float] = {}
    for line in lines:
        if found := re.search(r"\[\s*([\d.]+)\] .*NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)", line):
            newest[found[2], int(found[3])] = float(found[1])
    for (gpu, number), since_boot in newest.items():
        if number in XIDS:
            age = time.clock_gettime(time.CLOCK_MONOTONIC) - since_boot
            level = "bad" if age < XID_DAY else "warn"
            yield level, f"GPU {gpu}: Xid {number} ({XIDS[number]}) {age / 3600:.1f} hours ago"


def _asked(command: Sequence[str]) -> tuple[list[str], str]:
    """The lines of a program, and what it says if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {ASK_SECONDS:.0f} s"
    except OSError as error:
        return [], str(error.strerror)
    lines = done.stdout.splitlines()
    return ([], (done.stderr.strip() or done.stdout.strip())) if done.returncode else (lines, "")


def software(packages: dict[str, str]) -> dict[str, str]:
    """Names and versions of what must be the same on all nodes."""
    import torch

    facts = {"Python": platform.python_version(), "CUDA of torch": str(torch.version.cuda)}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts | packages


def code_digests(modules: set[str]) -> dict[str, str]:
    """A digest of each file of dtrain and of the user's own modules, by path; nothing for what pip installed."""
    found = {}
    for place, files in own_code(modules):
        for file in files:
            size = file.stat().st_size
            content = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if size <= LINK_BYTES else ""
            found[str(file.relative_to(place.parent))] = f"{size} {content}"
    return found


def digest_of(values: dict[str, str]) -> str:
    """One text for a whole list of names and values."""
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]


def missed_mark(mark: Path) -> str:
    """Why a file that another node has just made on the run folder's disk is not seen here; '' where it is."""
    end = time.monotonic() + MARK_SECONDS
    while not mark.exists():
        if time.monotonic() > end:
            return f"{mark.parent} is not the disk of the first node: a file that was made there is not here"
        time.sleep(0.2)
    return ""
