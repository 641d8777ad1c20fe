"""Synthetic tissue in 3-D, stained at its walls, seen through a microscope."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")
LLOYD_STEPS = 2  # each moves a seed to the middle of its cell, which makes cells rounder and more alike
DIM = 0.1  # brightness between the walls, as a share of a wall's greatest

Labels = Literal["boundary", "instance", "semantic"]


class Cells(NamedTuple):
    """One volume: raw float32 (D, H, W), and the number of each voxel's cell (0: none), uint16 (D, H, W)."""

    raw: np.ndarray
    instance: np.ndarray


class CellVolume(Dataset[tuple[Tensor, Tensor]]):
    """Volumes of cells whose walls alone are bright, as a confocal microscope shows plant tissue; labels are exact.

    Cells are a Voronoi partition of seeds that were evened out (Lloyd 1982), with a smooth warp that bends their walls,
    within an ellipsoid. The walls are stained unevenly, blurred more along z than across it, and read with shot noise
    and a camera's noise. Voxels are longer along z (`spacing`), so a cell has fewer slices than rows.

    An item is (image, label): float32 (1, D, H, W), about 0 to 1, and int64 (D, H, W). Item i depends on
    (seed, split, i) alone. Making one takes about a second for a million voxels; it is then kept in memory, 6 bytes per
    voxel.

    Args:
        split: "train", "val" or "test": volumes that have nothing to do with one another.
        length: How many volumes.
        shape: D, H and W in voxels.
        labels: "boundary": 1 on a wall, else 0. "instance": the number of the cell, from 1; 0 outside the tissue.
            "semantic": 0 outside, 1 within a cell, 2 on a wall. A wall is each voxel with a face to a voxel of another
            cell, or between a cell and the outside; so it is two voxels thick.
        cell_size: Side of a cube as large as the mean cell, in pixels of a slice.
        spacing: Distance of two slices in pixels of a slice.
        warp: Deviation of the warp as a share of cell_size, 0 to 0.2.
        blur: Deviation of the Gaussian blur in voxels, along z and across it.
        photons: How many the brightest wall gives per voxel; the fewer, the noisier.
        noise: Deviation of the camera's noise as a share of the brightest wall.
        seed: Decides everything that is random.

    Raises:
        ValueError: An unknown split or kind of labels, or a number out of range.
        ModuleNotFoundError: scipy is not installed.
    """

    random = False

    def __init__(
        self,
        split: str,
        *,
        length: int = 8,
        shape: Sequence[int] = (16, 64, 64),
        labels: Labels = "boundary",
        cell_size: float = 18.0,
        spacing: float = 2.0,
        warp: float = 0.15,
        blur: Sequence[float] = (0.6, 0.9),
        photons: float = 20.0,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"CellVolume: split is {split!r}; possible: {', '.join(SPLITS)}")
        if labels not in get_args(Labels):
            raise ValueError(f"CellVolume: labels is {labels!r}; possible: {', '.join(get_args(Labels))}")
        if len(shape) != 3 or min(shape) < 4:
            raise ValueError(f"CellVolume: shape is {[*shape]}; expected three sides, each 4 or more")
        if len(blur) != 2 or min(blur) < 0:
            raise ValueError(f"CellVolume: blur is {[*blur]}; expected two numbers, along z and across it, 0 or more")
        least = dict(length=1, cell_size=4, spacing=0.5, photons=1, noise=0, seed=0)
        given = dict(length=length, cell_size=cell_size, spacing=spacing, photons=photons, noise=noise, seed=seed)
        for name, number in given.items():
            if number < least[name]:
                raise ValueError(f"CellVolume: {name} is {number}; possible: {least[name]} and more")
        if not 0 <= warp <= 0.2:
            raise ValueError(f"CellVolume: warp is {warp}; possible: 0 to 0.2")  # beyond, walls would fold over
        _scipy()
        self.split, self.length, self.labels, self.seed = split, length, labels, seed
        self.shape: tuple[int, ...] = tuple(shape)
        self.cell_size, self.spacing, self.warp = cell_size, spacing, warp
        self.blur, self.photons, self.noise = (blur[0], blur[1], blur[1]), photons, noise
        self._made: dict[int, Cells] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        cells = self.cells(index)
        return torch.from_numpy(cells.raw[None].copy()), torch.from_numpy(self.label(cells.instance).astype(np.int64))

    def cells(self, index: int) -> Cells:
        """Volume number `index`, made when it is asked for the first time.

        Raises:
            IndexError: There is no such volume.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"CellVolume: volume {index} of {self.length}")
        if index not in self._made:
            # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version.
            key = (len(SPLITS) * self.seed + SPLITS.index(self.split), index)
            random = np.random.RandomState(np.random.Philox(key=key))
            instance = self._instances(random)
            self._made[index] = Cells(self._seen(random, walls(instance)), instance)
        return self._made[index]

    def label(self, instance: np.ndarray) -> np.ndarray:
        """The labels that this dataset gives for cells: uint16 (instance) or uint8, of the same shape (D, H, W)."""
        if self.labels == "instance":
            return instance
        wall = walls(instance)
        if self.labels == "boundary":
            return wall.astype(np.uint8)
        return np.where(wall, 2, instance > 0).astype(np.uint8)

    def _instances(self, random: np.random.RandomState) -> np.ndarray:
        """The number of each voxel's cell, uint16 (D, H, W), 0 outside the tissue, the rest without a gap."""
        _, spatial = _scipy()
        steps = np.array((self.spacing, 1.0, 1.0))
        sides = steps * self.shape  # in pixels of a slice, as everything here
        voxels = (np.indices(self.shape).reshape(3, -1).T + 0.5) * steps
        seeds = sides * random.uniform(size=(max(2, round(sides.prod() / self.cell_size**3)), 3))
        for _ in range(LLOYD_STEPS):
            nearest = spatial.cKDTree(seeds).query(voxels)[1]
            members = np.bincount(nearest, minlength=len(seeds))[:, None]
            sums = np.stack([np.bincount(nearest, axis, minlength=len(seeds)) for axis in voxels.T], axis=1)
            seeds = np.where(members, sums / np.maximum(members, 1), seeds)
        moves = [self.cell_size * self.warp * self._smooth(random).ravel() for _ in range(3)]
        places = voxels + np.stack(moves, axis=1)
        cell = spatial.cKDTree(seeds).query(places)[1]
        middle, reach = sides * random.uniform(0.45, 0.55, size=3), sides * random.uniform(0.42, 0.55, size=3)
        outside = (((places - middle) / reach) ** 2).sum(1) > 1
        return _joined(np.where(outside, 0, cell + 1).reshape(self.shape))

    def _seen(self, random: np.random.RandomState, wall: np.ndarray) -> np.ndarray:
        """The walls (D, H, W) through the microscope, float32 (D, H, W)."""
        ndimage, _ = _scipy()
        stain = np.clip(0.75 + 0.15 * self._smooth(random), 0.4, 1)
        light = ndimage.gaussian_filter(np.where(wall, stain, DIM), self.blur, mode="nearest")
        seen = random.poisson(self.photons * light) / self.photons + self.noise * random.normal(size=self.shape)
        return seen.astype(np.float32)

    def _smooth(self, random: np.random.RandomState) -> np.ndarray:
        """A random field (D, H, W) of mean 0 and deviation 1 that changes over half a cell."""
        ndimage, _ = _scipy()
        width = self.cell_size / 2
        field = ndimage.gaussian_filter(random.normal(size=self.shape), (width / self.spacing, width, width))
        return (field - field.mean()) / field.std()


def _joined(cell: np.ndarray) -> np.ndarray:
    """The same cells (D, H, W), each in one piece and numbered without a gap, uint16.

    Where cells meet at a sharp angle, or the tissue's surface cuts one, voxels are too coarse for the tip: what is cut
    off goes to the nearest of the larger pieces.
    """
    ndimage, _ = _scipy()
    result = np.zeros(cell.shape, np.uint16)
    number = 0
    for value, place in enumerate(ndimage.find_objects(cell), 1):
        if place is not None:
            number += 1
            pieces = ndimage.label(cell[place] == value)[0]
            result[place][pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()] = number
    if (rest := (cell > 0) & (result == 0)).any():
        nearest = ndimage.distance_transform_edt(result == 0, return_distances=False, return_indices=True)
        result[rest] = result[tuple(nearest[:, rest])]
    return result


def walls(instance: np.ndarray) -> np.ndarray:
    """Where a voxel has a face to a voxel of another cell or of the outside.

    Args:
        instance: Numbers of cells (D, H, W), or an image (H, W).

    Returns:
        bool, the same shape; at a change of the number the voxels on both sides are true.
    """
    wall = np.zeros(instance.shape, bool)
    for axis in range(instance.ndim):
        here, there = np.moveaxis(instance, axis, 0), np.moveaxis(wall, axis, 0)
        changes = here[1:] != here[:-1]
        there[1:] |= changes
        there[:-1] |= changes
    return wall


def _scipy() -> tuple:
    # Imported where it is used: half a second that other datasets need not wait for.
    try:
        from scipy import ndimage, spatial
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CellVolume needs scipy to make its cells: pip install scipy") from error
    return ndimage, spatial
