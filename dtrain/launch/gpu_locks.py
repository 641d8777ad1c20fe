"""The GPUs of this machine, which all sweeps on it share: a lock for each, which the kernel frees at the end."""

import errno
import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU, or a part of one."""

    name: str  # as CUDA_VISIBLE_DEVICES takes it
    identity: str  # the same for all processes of this machine, as far as nvidia-smi says it


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, else all that nvidia-smi lists; of one that is split (MIG), its parts."""
    listed = _listed()
    wish = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wish is None:
        return [Gpu(each, each) for each in listed]
    names: list[str] = []
    for name in filter(None, map(str.strip, wish.split(","))):
        if name.startswith("-"):  # CUDA looks no further
            break
        names.append(name)
    by_number = {str(number): identity for number, identity in enumerate(listed)}
    return [Gpu(name, by_number.get(name, name)) for name in names]


def _listed() -> list[str]:
    """The UUIDs that nvidia-smi lists; none where there is no nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: list[str] = []
    for uuid in re.findall(r"UUID: ((?:GPU|MIG)-[\w/-]+)", done.stdout):
        if uuid.startswith("MIG") and found and found[-1].startswith("GPU"):
            found.pop()  # the whole, of which this is the first part
        found.append(uuid)
    return found


class GpuLocks:
    """Takes GPUs for a trial, or says that there are not enough free ones.

    The locks are flock's on files in one folder of the machine. Who holds one may hand its descriptor to a process that
    it starts: then the GPU is taken as long as either of them lives.

    Args:
        gpus: Those that may be used.
        folder: Of the locks, the same for all who share the machine. Default: in the folder for temporary files.
    """

    def __init__(self, gpus: Sequence[Gpu], folder: Path | None = None) -> None:
        self.gpus = list(gpus)
        self.folder = folder or Path(tempfile.gettempdir()) / "dtrain-gpus"

    def take(self, count: int) -> "Taken | None":
        """So many of them, all at once; None where fewer are free, and then none is held."""
        taken = Taken([], [])
        for gpu in self.gpus:
            if len(taken.gpus) == count:
                break
            if (descriptor := self._locked(gpu)) is not None:
                taken.gpus.append(gpu.name)
                taken.descriptors.append(descriptor)
        if len(taken.gpus) == count:
            return taken
        taken.release()
        return None

    def _locked(self, gpu: Gpu) -> int | None:
        """The descriptor of its lock; None where another holds it."""
        name = re.sub(r"[^\w-]", "_", gpu.identity)
        descriptor = _opened(self.folder / f"{name}.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        return descriptor


class Taken(NamedTuple):
    """GPUs that are held, by name, and the descriptors of their locks."""

    gpus: list[str]
    descriptors: list[int]

    def release(self) -> None:
        """Frees them, whoever else has the descriptors."""
        for descriptor in self.descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _opened(path: Path) -> int:
    """A lock's file, made where it is not there; other users may have made it, or the folder, and that will do."""
    mask = os.umask(0)
    try:
        path.parent.mkdir(mode=0o1777, parents=True, exist_ok=True)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except FileNotFoundError:  # without O_CREAT above: Linux refuses that on others' files in such a folder
            return os.open(path, flags | os.O_CREAT, 0o644)
    finally:
        os.umask(mask)
