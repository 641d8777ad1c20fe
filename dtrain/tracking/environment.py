"""With what a run ran: Python, packages, CUDA, GPUs and their driver; found without importing any of it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dtrain.tracking.whole_file import write_json, write_text

_PATIENCE_SECONDS = 20.0  # with nvidia-smi, which may hang with a GPU


def capture_environment(folder: Path) -> dict[str, str]:
    """Writes requirements.txt and environment.json into a folder; the most important of it, as tags."""
    packages = installed_packages()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": packages.get("torch", ""),
        "cuda": _cuda_of_torch(),
        "gpus": _gpus(),
        "packages": packages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", facts)
    write_text(folder / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in packages.items()))
    gpus = facts["gpus"]
    tags = {"python": facts["python"], "torch": facts["torch"], "cuda": facts["cuda"]}
    if gpus:
        tags |= {"gpu": f"{len(gpus)} x {gpus[0]['name']}", "gpu_driver": gpus[0]["driver"]}
    return {f"dtrain.{key}": value for key, value in tags.items() if value}


def installed_packages() -> dict[str, str]:
    """Name and version of each package that this Python finds, from the folders in which their metadata lie."""
    found: dict[str, str] = {}
    for place in filter(None, sys.path):
        for folder in sorted(Path(place).glob("*.dist-info")):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            if version:  # what stands earlier on the path is what is imported
                found.setdefault(name.replace("_", "-").lower(), version)
    return dict(sorted(found.items()))


def _cuda_of_torch() -> str:
    """The version of CUDA that torch was built with; '' of a build without."""
    for place in filter(None, sys.path):
        file = Path(place) / "torch" / "version.py"
        if file.is_file():
            match = re.search(r"^cuda(?:: [^=]*)? = ['\"]([^'\"]+)", file.read_text(errors="replace"), re.MULTILINE)
            return match[1] if match else ""
    return ""


def _gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each NVIDIA GPU, as nvidia-smi says."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = ("name", "driver_version", "memory.total")
    command = [program, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(("name", "driver", "memory"), line, strict=True)) for line in lines if len(line) == len(asked)]
