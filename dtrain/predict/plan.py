"""What there is to predict: a task for each volume, and each rank's share of all that is missing.

The unit of work is a slab, a range of planes of a volume. What is in it comes from all patches that touch it, so it
does not depend on who predicts it, or after how many interruptions.
"""

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.errors import ConfigError
from dtrain.distributed.ranks import Ranks
from dtrain.predict.formats import ENDINGS, Format
from dtrain.predict.inference import Inference
from dtrain.predict.members import Members
from dtrain.predict.predictor import Predictor
from dtrain.predict.source import Source, Volume
from dtrain.predict.stitching import Run
from dtrain.predict.work_folder import PredictionFile, are_finished, digest

SLAB_VOXELS = 1 << 22  # of a part: what an interruption can cost
IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

Slab = tuple[int, int]


class Task(NamedTuple):
    """One volume's file and what is still to be predicted of it."""

    volume: int  # its number
    file: PredictionFile
    format: Format
    is_finished: bool  # whether the file is there, as it would be made now
    slabs: list[Slab]
    missing: list[Slab]  # those that are to be predicted

    @property
    def parts(self) -> list[Path]:
        """Where the slabs are until the file is finished."""
        return [self.file.part(*slab) for slab in self.slabs]

    def sum_of(self, slab: Slab, member: int) -> Path:
        """Where the sum of a slab's predictions by this member and those before it is, while others are missing."""
        part = self.file.part(*slab)
        return part.with_name(f"{part.stem}.sum-{member}.npy")


def plan(inference: Inference, source: Source, folder: Path, overwrite: bool, members: Members) -> list[Task]:
    """A task for each volume; the main rank alone calls it.

    Raises:
        ConfigError: A setting does not fit a volume, or a file was made with something else.
    """
    predictor = inference.predictor
    formats = [_format(predictor, volume) for volume in source.volumes]
    files = []
    for number, volume in enumerate(source.volumes):
        if predictor.performance_metric and not predictor.gt_internal_path and not volume.has_label:
            text = f"{volume.path} is read without labels; name their dataset: predictor.gt_internal_path"
            raise ConfigError(f"predictor.performance_metric: {text}")
        name = volume.name.replace(os.sep, "-") + "_predictions" + ENDINGS[formats[number]]
        files.append(PredictionFile(folder / name, _stamp(inference, source, number, members)))
    tasks = []
    for number, is_finished in enumerate(are_finished(files, overwrite)):
        plane_voxels = max(1, prod(source.volumes[number].shape[1:]))
        slabs = source.grids[number].slabs(predictor.slab_planes or max(1, SLAB_VOXELS // plane_voxels))
        missing = [slab for slab in slabs if not is_finished and not files[number].part(*slab).exists()]
        tasks.append(Task(number, files[number], formats[number], is_finished, slabs, missing))
    return tasks


def _format(predictor: Predictor, volume: Volume) -> Format:
    name, file_format = volume.path.name.lower(), predictor.format
    if file_format is None and name.endswith((".nii", ".nii.gz")):
        file_format = "nifti"
    if file_format is None and predictor.choice.labels and len(volume.shape) == 2 and name.endswith(IMAGES):
        file_format = "png"
    if file_format is None and name.endswith(".zarr"):
        file_format = "ome-zarr" if any("scale" in axis for axis in getattr(volume, "space", ())) else "zarr"
    if file_format == "nifti" and predictor.dtype == "float16":
        raise ConfigError("predictor.dtype: NIfTI has no float16; possible: float32, and uint8 for probabilities")
    if file_format == "csv":
        raise ConfigError(f"predictor.format: csv is for datasets without volumes, and {volume.path} is a volume")
    if file_format == "png" and prod(volume.shape) != prod(volume.shape[-2:]):
        text = f"png holds one plane, {volume.path} is {volume.shape}; possible: hdf5, tiff, npy"
        raise ConfigError(f"predictor.format: {text}")
    return file_format or "hdf5"


def _stamp(inference: Inference, source: Source, number: int, members: Members) -> dict[str, Any]:
    """What a volume's prediction depends on."""
    predictor, volume, grid = inference.predictor, source.volumes[number], source.grids[number]
    settings: dict[str, Any] = {
        "input": [volume.name, _version_of(volume.path)],
        "patches": [grid.shape, grid.patch, grid.starts, source.halos[number], predictor.blend],
        "activation": predictor.activation,
        "blending": "of logits" if grid.is_averaged else None,  # once it was of probabilities
        "what is kept": list(predictor.choice),
        "instances": [predictor.connectivity, predictor.min_size] if predictor.choice.instances else None,
        "file": [predictor.output_dataset, predictor.compression, predictor.dtype],
        "performance_metric": [predictor.performance_metric, predictor.gt_internal_path],
    }
    if predictor.mirror:  # what is there of before has no such entry
        settings["mirror"] = sorted(predictor.mirror)
    weights = {"weights": members.identity(number)} if any(members.weights) else {}
    return {**inference.identity, **weights, **{key: digest(value) for key, value in settings.items()}}


def left_at(tasks: Sequence[Task], member: int, members: Members) -> list[Task]:
    """What one of several members has to predict: the slabs of which there is neither its sum nor a later one."""
    result = []
    for task in tasks:
        own = members.of(task.volume)
        later = own[own.index(member) :] if member in own else []
        missing = [
            slab
            for slab in task.slabs
            if later and not task.is_finished and not task.file.part(*slab).exists()
            and not any(task.sum_of(slab, each).exists() for each in later[:-1])
        ]  # fmt: skip
        result.append(task._replace(missing=missing))
    return result


def _version_of(path: Path) -> dict[str, Any]:
    """What tells one version of an input file, or of a store's files, from another without reading it."""
    try:
        status = path.stat()
        if path.is_dir():
            of_files = [entry.stat() for entry in path.rglob("*") if entry.is_file()]
            newest = max((its.st_mtime_ns for its in of_files), default=0)
            return {"bytes": sum(its.st_size for its in of_files), "files": len(of_files), "modified": newest}
    except OSError:
        return {}
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def share_of(tasks: Sequence[Task], source: Source, ranks: Ranks) -> dict[Run, list[Slab]]:
    """This rank's runs with their slabs: a contiguous share of all that is missing, about as costly as the others'."""
    slabs = [(task.volume, slab) for task in tasks for slab in task.missing]
    costs = [_cost(source, volume, slab) for volume, slab in slabs]
    total, before = sum(costs), 0
    runs: list[tuple[int, list[Slab]]] = []  # each of one volume's consecutive slabs
    for (volume, slab), cost in zip(slabs, costs, strict=True):
        rank = (2 * before + cost) * ranks.world_size // (2 * total)  # by where the middle of its cost lies
        before += cost
        if rank != ranks.rank:
            continue
        if runs and runs[-1][0] == volume and runs[-1][1][-1][1] == slab[0]:
            runs[-1][1].append(slab)
        else:
            runs.append((volume, [slab]))
    return {Run(volume, own[0][0], own[-1][1]): own for volume, own in runs}


def _cost(source: Source, volume: int, slab: Slab) -> int:
    """The voxels that the model sees of a slab."""
    grid = source.grids[volume]
    sides = zip(grid.patch, source.halos[volume], strict=True)
    return len(grid.touching(*slab)) * prod(length + 2 * halo for length, halo in sides)
