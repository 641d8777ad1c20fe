"""ForegroundSlices: patches at drawn places, a share of which hold foreground, found once per file."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dtrain.components.datasets.files import version_of
from dtrain.components.datasets.folder_lock import one_at_a_time
from dtrain.components.datasets.slices import Draws, Places, SliceBuilder
from dtrain.components.datasets.statistics import BLOCK, blocks
from dtrain.components.datasets.volumes import Region, Volume

MOST = 10_000  # voxels of a class that are kept, as nnU-Net does
MOST_IN_ALL = 4_000_000  # of all classes together: a label may number its objects
VERSION = 1  # of what is kept beside a file


class ForegroundSlices(SliceBuilder):
    """Patches at places that are drawn anew in each epoch, a share of which hold foreground for certain.

    Such a patch is centred on a voxel of foreground, as far as the volume allows, as in nnU-Net (Isensee et al., Nature
    Methods 2021); the others lie anywhere, with foreground or without. A place is a function of (seed, epoch, index).
    A volume without any foreground has patches of the second kind alone.

    The labels are read once, when the dataset is built. Up to 10,000 voxels of each class, drawn evenly, are kept.

    Args:
        patch_shape: Voxels of a patch, one number per axis.
        patches_per_volume: In an epoch. Default: as many as cover the volume once.
        foreground_share: Of the patches, those that hold foreground for certain: labels other than 0 and
            `ignore_index`, or where a label has channels, in any of them.
        class_balanced: Each class (or channel) of a volume's foreground is as likely as any other, however small it
            is. false: each voxel is.
        ignore_index: A label that is not foreground. Default: the dataset's.
        pad: See SliceBuilder.
        cache: Keep what was found in a hidden file beside the label's. false, or a folder that cannot be written: in
            memory.
        stride_shape: For predictions, see SliceBuilder.
        halo_shape: For predictions, see SliceBuilder.

    Raises:
        ValueError: See SliceBuilder; or a number out of range.
    """

    def __init__(
        self,
        patch_shape: list[int],
        patches_per_volume: int | None = None,
        foreground_share: float = 0.33,
        class_balanced: bool = True,
        ignore_index: int | None = None,
        pad: Literal["reflect", "edge", "constant"] | float | None = None,
        cache: bool = True,
        stride_shape: list[int] | None = None,
        halo_shape: list[int] | None = None,
    ) -> None:
        super().__init__(patch_shape, stride_shape, halo_shape, pad=pad)
        if not 0 <= foreground_share <= 1:
            raise ValueError(f"foreground_share is {foreground_share}; possible: 0 to 1")
        if patches_per_volume is not None and patches_per_volume < 1:
            raise ValueError(f"patches_per_volume is {patches_per_volume}; expected 1 or more")
        self.patches_per_volume, self.foreground_share = patches_per_volume, foreground_share
        self.class_balanced, self.ignore_index, self.cache = class_balanced, ignore_index, cache

    def places(self, volume: Volume) -> "ForegroundDraws":
        """A volume's patches.

        Raises:
            ValueError: See SliceBuilder; or the volume has no label.
        """
        return self._found(volume)[0]

    def places_of(self, volumes: Sequence[Volume]) -> Places:
        """The patches of several volumes, one volume after the other.

        Raises:
            ValueError: See `places`.
        """
        found = [self._found(volume) for volume in volumes]
        notes = []
        if problems := [problem for _, problem in found if problem]:
            notes.append(f"where the foreground lies is kept in memory alone: {problems[0]}")
        empty = [volume.path.name for volume, (part, _) in zip(volumes, found, strict=True) if not part.foreground]
        if empty and self.foreground_share:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            notes.append(f"no foreground in {', '.join(empty[:5])}{more}: patches of these lie anywhere")
        return Places([part for part, _ in found], notes)

    def _found(self, volume: Volume) -> tuple["ForegroundDraws", str]:
        """A volume's patches, and why its foreground could not be kept beside the file."""
        self.check(volume)
        if not volume.has_label:
            raise ValueError(f"ForegroundSlices needs labels, and {volume.path} is read without; use SliceBuilder")
        count = self.patches_per_volume or len(super().places(volume))
        void = self.ignore_index
        if void is None:
            void = getattr(getattr(volume, "checks", None), "ignore_index", None)
        foreground, problem = _kept(volume, void) if self.cache else (find(volume, void), "")
        draws = ForegroundDraws(volume.shape, self.patch_shape, count)
        draws.foreground, draws.share, draws.class_balanced = foreground, self.foreground_share, self.class_balanced
        return draws, problem


@dataclass
class Foreground:
    """Where a volume's foreground lies.

    Attributes:
        classes: The labels that there are, or the channels; int64 (K,).
        counts: How many voxels each has in the volume; int64 (K,).
        ends: Where each one's part of `voxels` ends; int64 (K,).
        voxels: Some voxels of each class, counted through the volume, the last axis fastest; int64.
    """

    classes: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    voxels: np.ndarray

    def __bool__(self) -> bool:
        return len(self.classes) > 0

    def draw(self, rng: np.random.Generator, class_balanced: bool) -> int:
        """A voxel of foreground."""
        if class_balanced:
            number = int(rng.integers(len(self.classes)))
        else:
            number = int(np.searchsorted(np.cumsum(self.counts), rng.integers(self.counts.sum()), side="right"))
        begin = int(self.ends[number - 1]) if number else 0
        return int(self.voxels[rng.integers(begin, self.ends[number])])


class ForegroundDraws(Draws):
    """Patches of a volume, a share of which are drawn around foreground; see ForegroundSlices for the attributes."""

    foreground: Foreground
    share: float
    class_balanced: bool

    def draw(self, rng: np.random.Generator) -> Region:
        """A patch's region."""
        if not self.foreground or rng.random() >= self.share:
            return super().draw(rng)
        voxel = np.unravel_index(self.foreground.draw(rng, self.class_balanced), self.shape)
        return self.beginning([int(at) - patch // 2 for at, patch in zip(voxel, self.patch, strict=True)])


def find(volume: Volume, ignore_index: int | None) -> Foreground:
    """Read a volume's whole label, block by block, for where its foreground lies; always the same voxels."""
    # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version.
    draw = np.random.RandomState(0)
    counts: dict[int, int] = {}
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of each class some voxels, with the numbers drawn for them
    for region in blocks(volume.shape, BLOCK):
        label = volume.read_label(region)
        counted = label != 0 if ignore_index is None else (label != 0) & (label != ignore_index)
        inside = np.nonzero(counted)
        spatial = inside[-len(volume.shape) :]
        voxels = np.ravel_multi_index([at + part.start for at, part in zip(spatial, region, strict=True)], volume.shape)
        classes = inside[0] if label.ndim > len(volume.shape) else _as_classes(label[inside])
        keys = draw.random_sample(len(voxels))
        order = np.argsort(classes, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1) if len(order) else ():
            name = int(classes[part[0]])
            counts[name] = counts.get(name, 0) + len(part)
            before = kept.get(name, (voxels[:0], keys[:0]))
            kept[name] = _least(np.append(before[0], voxels[part]), np.append(before[1], keys[part]), MOST)
    names = sorted(kept)
    most = max(MOST_IN_ALL // max(len(names), 1), 1)
    chosen = [np.sort(_least(*kept[name], min(most, MOST))[0]) for name in names]
    return Foreground(
        np.array(names, np.int64),
        np.array([counts[name] for name in names], np.int64),
        np.cumsum([len(voxels) for voxels in chosen], dtype=np.int64),
        np.concatenate([np.zeros(0, np.int64), *chosen]),
    )


def _as_classes(values: np.ndarray) -> np.ndarray:
    """Labels as whole numbers; fractions are one class."""
    if values.dtype.kind != "f":
        return values.astype(np.int64, copy=False)
    return values.astype(np.int64) if (values == np.rint(values)).all() else np.ones(len(values), np.int64)


def _least(voxels: np.ndarray, keys: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The voxels with the smallest of the numbers drawn for them: as likely to be any."""
    if len(keys) <= most:
        return voxels, keys
    least = np.argpartition(keys, most)[:most]
    return voxels[least], keys[least]


def _kept(volume: Volume, ignore_index: int | None) -> tuple[Foreground, str]:
    """A volume's foreground, as it is kept beside the label's file or else found; and why it cannot be kept there."""
    label: tuple[Path, str] | None = getattr(volume, "label_file", None)
    if label is None or not label[0].is_file():  # of a store's folder nothing tells one version from another
        return find(volume, ignore_index), ""
    file, part = label
    name = hashlib.sha256(json.dumps([part, ignore_index]).encode()).hexdigest()[:8]
    path = file.with_name(f".{file.name}.{name}.foreground.npz")
    with one_at_a_time(file.parent):
        identity = json.dumps([VERSION, part, ignore_index, volume.shape, *version_of(file)])
        if (foreground := _read(path, identity)) is not None:
            return foreground, ""
        foreground = find(volume, ignore_index)
        try:
            _write(path, identity, foreground)
        except OSError as error:
            return foreground, f"{path.parent} cannot be written ({error.strerror})"
    return foreground, ""


def _read(path: Path, identity: str) -> Foreground | None:
    """What is kept of this very version of a file; None where there is nothing of the kind, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["identity"]) != identity:
                return None
            return Foreground(*(kept[name] for name in ("classes", "counts", "ends", "voxels")))
    except Exception:  # zipfile and numpy raise many kinds; it is found anew
        return None


def _write(path: Path, identity: str, foreground: Foreground) -> None:
    """Whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, identity=np.array(identity), **vars(foreground))
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
