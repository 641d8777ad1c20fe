"""How fast this rank's processor runs now: what is told of a rank that is slow."""

import re
import statistics
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtrain.distributed.affinity import SYSFS

SLOWER = 0.9  # of the others' clock: the cause, or a part of it
_THROTTLED = {  # NVML's reasons why a GPU's clock is low, by bit
    0x4: "its power limit", 0x8: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}  # fmt: skip


class ClockSpeed(NamedTuple):
    """GHz, 0 where it is not known, and what holds it down."""

    ghz: float = 0.0
    why: str = ""


def clock_speed(device: torch.device, cpus: set[int], root: Path = SYSFS) -> ClockSpeed:
    """The clock of a GPU, or the mean of these CPUs'; one that is not known is 0."""
    if device.type == "cuda":
        with suppress(Exception):  # neither nvidia-ml-py nor the driver need be there
            return ClockSpeed(torch.cuda.clock_rate(device) / 1e3, _throttled(device))
        return ClockSpeed()
    known = []
    for cpu in sorted(cpus):
        with suppress(OSError, ValueError):
            known.append(int((root / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq").read_text()) / 1e6)
    if not known:
        known = _of_cpuinfo(cpus)
    return ClockSpeed(statistics.fmean(known) if known else 0.0)


def _of_cpuinfo(cpus: set[int], path: Path = Path("/proc/cpuinfo")) -> list[float]:
    with suppress(OSError):
        found = re.findall(r"^processor\s*:\s*(\d+)$.*?^cpu MHz\s*:\s*([\d.]+)$", path.read_text(), re.M | re.S)
        return [float(mhz) / 1e3 for cpu, mhz in found if int(cpu) in cpus]
    return []


def _throttled(device: torch.device) -> str:
    with suppress(Exception):
        import pynvml

        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return ", ".join(text for bit, text in _THROTTLED.items() if bits & bit)
    return ""


def compared(slow: int, speeds: Mapping[int, ClockSpeed]) -> str:
    """What the clocks say of a slow rank; '' where too few are known."""
    others = [speed.ghz for rank, speed in speeds.items() if rank != slow and speed.ghz]
    own = speeds.get(slow, ClockSpeed())
    if not own.ghz or not others:
        return ""
    usual = statistics.median(others)
    if own.ghz >= SLOWER * usual:
        return f"its clock runs as fast as theirs ({own.ghz:.2f} GHz)"
    return f"its clock runs at {own.ghz:.2f} GHz, theirs at {usual:.2f} GHz" + (f" ({own.why})" if own.why else "")
