"""How the volumes of each phase lie in space, as their files say, and in one line how phases differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np

ALIKE = 1.01  # largest ratio of two lengths of a voxel that count as the same
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # where an axis of the world begins and ends, as NIfTI has it

Space = dict[str, Any]
"""`orientations`: each, as RAS, with a file's name; `least`, `most`: a voxel's lengths along the file's axes, mm."""


def space_of(dataset: Any) -> Space | None:
    """The space of a dataset's `volumes`; None unless each has an `affine` (4, 4), from voxels to millimetres."""
    volumes = getattr(dataset, "volumes", ())
    affines = [getattr(volume, "affine", None) for volume in volumes]
    if not affines or any(affine is None for affine in affines):
        return None
    axes = [np.asarray(affine)[:3, : len(volume.shape)] for affine, volume in zip(affines, volumes, strict=True)]
    lengths = [np.sqrt((own**2).sum(0)) for own in axes]
    orientations: dict[str, str] = {}
    for own, volume in zip(axes, volumes, strict=True):
        orientations.setdefault(_orientation(own), volume.path.name)
    least, most = np.min(lengths, axis=0), np.max(lengths, axis=0)
    return {"orientations": orientations, "least": least.tolist(), "most": most.tolist()}


def _orientation(axes: np.ndarray) -> str:
    """The end of the world towards which each axis of a file runs, one letter each."""
    mains = np.abs(axes).argmax(0)
    return "".join(ENDS[main][int(axis[main] > 0)] for main, axis in zip(mains, axes.T, strict=True))


def difference(spaces: Mapping[str, Space | None]) -> str:
    """A line that says how the spaces of phases, or the files of one, differ; '' where they do not."""
    known = {phase: space for phase, space in spaces.items() if space}
    if not known:
        return ""
    orientations = {orientation for space in known.values() for orientation in space["orientations"]}
    dims = {len(space["least"]) for space in known.values()}
    if len(orientations) == len(dims) == 1:
        least = np.min([space["least"] for space in known.values()], axis=0)
        most = np.max([space["most"] for space in known.values()], axis=0)
        if (most <= ALIKE * least).all():
            return ""
    phases = "; ".join(f"{phase} {_text(space)}" for phase, space in known.items())
    return f"files lie differently in space, and nothing is turned or resampled unless a transform does it: {phases}"


def _text(space: Space) -> str:
    several = len(space["orientations"]) > 1
    names = [f"{one} ({file})" if several else one for one, file in sorted(space["orientations"].items())]
    least, most = (" x ".join(f"{length:.3g}" for length in space[key]) for key in ("least", "most"))
    return f"{' and '.join(names)}, voxels of {least}{'' if least == most else f' to {most}'} mm"
