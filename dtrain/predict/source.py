"""Where patches come from: a dataset's volumes, read region by region and transformed for the model."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dtrain.predict.patch_grid import Grid, Region

READING = Lock()  # files are read by one thread at a time: not every kind of volume allows more


class Volume(Protocol):
    """What is predicted; dtrain's own datasets have a list of them, `volumes`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    has_label: bool

    def read(self, region: Region) -> np.ndarray:
        """The image, float32 (C, *region); what lies outside is reflected."""

    def read_label(self, region: Region) -> np.ndarray:
        """The label, (*region) or (K, *region)."""


class Source(NamedTuple):
    """A dataset's volumes and their patches.

    The dataset has `volumes`. It may have `sample`, which adds, say, a volume's statistics for its transforms, and
    `prepared`, which applies these to a sample.
    """

    dataset: Any
    grids: Sequence[Grid]  # the patches of each volume
    halos: Sequence[Sequence[int]]  # how many voxels are read around each patch, along each axis, by volume

    @property
    def volumes(self) -> Sequence[Volume]:
        """The volumes, in the dataset's order."""
        return self.dataset.volumes

    @property
    def axis(self) -> int | None:
        """The axis of volumes that the model does not see, where it is a 2-D one that gets slices."""
        return getattr(self.dataset, "axis", None)

    def flat(self, images: Tensor) -> Tensor:
        """Patches (N, C, *spatial) as the model takes them: slices without their axis."""
        return images if self.axis is None else images.squeeze(2 + self.axis)

    def deep(self, output: Tensor) -> Tensor:
        """The model's output (N, K, *spatial) with that axis."""
        return output if self.axis is None else output.unsqueeze(2 + self.axis)

    def patch(self, number: int, index: int) -> np.ndarray:
        """One patch of a volume with its halo, (C, *spatial).

        Raises:
            ValueError: The transforms changed its extent.
        """
        region = self.grids[number].region(index, self.halos[number])
        image = np.asarray(self._sample(number, region, only_image=True)["image"], np.float32)
        image = image if self.axis is None else np.expand_dims(image, 1 + self.axis)
        extent = tuple(side.stop - side.start for side in region)
        if image.shape[1:] != extent:
            text = f"{self.volumes[number].path}: the transforms changed a patch of {extent} to {image.shape[1:]}"
            raise ValueError(f"{text}; prediction needs transforms that keep the shape")
        return image

    def target(self, number: int) -> Any:
        """A volume's whole label, as the dataset's transforms make it, (1, *spatial) or (1, K, *spatial).

        With weights, (label, weight), as a batch of patches has it.

        Raises:
            ValueError: It has none.
        """
        volume = self.volumes[number]
        if not volume.has_label:
            raise ValueError(f"{volume.path} has no label, so nothing can be measured on it")
        region = tuple(slice(0, extent) for extent in volume.shape)
        sample = self._sample(number, region, only_image=False)
        values = np.asarray(sample["label"])
        label = torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False))[None]
        if "weight" not in sample:
            return label
        return label, torch.from_numpy(np.asarray(sample["weight"], np.float32))[None]

    def _sample(self, number: int, region: Region, only_image: bool) -> dict[str, Any]:
        """What stands in a region of a volume, as the dataset's transforms make it; slices are made one by one."""
        if (at := self.axis) is not None and region[at].stop - region[at].start > 1:
            slices = [
                self._sample(number, (*region[:at], slice(low, low + 1), *region[at + 1 :]), only_image)
                for low in range(region[at].start, region[at].stop)
            ]
            names = [name for name in ("image", "label", "weight") if name in slices[0]]
            return {name: np.stack([each[name] for each in slices], at - 3) for name in names}
        with READING:
            if hasattr(self.dataset, "sample"):
                sample = self.dataset.sample(number, region, only_image=only_image)
            else:
                sample = {"image": self.volumes[number].read(region)}
                if not only_image:
                    sample["label"] = self.volumes[number].read_label(region)
            return self.dataset.prepared(sample) if hasattr(self.dataset, "prepared") else sample
