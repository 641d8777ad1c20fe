"""Any images with labels, and the boundaries that PIDNet learns beside them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

BOUNDARY = {"width": 4, "margin": 0}


class PIDNetDatasetWrapper(Dataset[tuple[Tensor, tuple[Tensor, Tensor]]]):
    """Another dataset's (image, label) as (image, (label, boundary)).

    Xu et al., "PIDNet", CVPR 2023, arXiv:2206.02066: the boundary is made of the label, see `boundary_target`. An item
    is the image as the source gives it, the label int64 (H, W), and the boundary float32 (H, W), 0 or 1. Transforms
    belong into the source; the authors draw the boundaries first, which differs where a label is enlarged or reduced.

    Args:
        source: A dataset whose items are (image, label), the label (H, W) or (1, H, W), classes as integers.
        boundary: `width`: how many pixels a boundary is wide. `margin`: no boundary begins within so many pixels of
            the image's border (the authors take 6 for Cityscapes, whose frames are labelled badly).

    Attributes:
        random: Whether an item needs random numbers; the source's own word for it.

    Raises:
        ValueError: An unknown key under `boundary`, or a number out of range.
    """

    def __init__(self, source: Dataset, boundary: Mapping[str, int] | None = None) -> None:
        given = {key: boundary[key] for key in boundary} if boundary is not None else {}
        if unknown := [key for key in given if key not in BOUNDARY]:
            raise ValueError(
                f"PIDNetDatasetWrapper: unknown under boundary: {', '.join(unknown)}; possible: {', '.join(BOUNDARY)}"
            )
        self.width, self.margin = (BOUNDARY | given).values()
        _check(self.width, self.margin)
        self.source: Any = source
        self.random = getattr(source, "random", True)

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """Where the source has an item, if it says so."""
        where = getattr(self.source, "where", None)
        return where(index) if callable(where) else f"item {index} of {type(self.source).__name__}"

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        item = self.source[index]
        if not isinstance(item, list | tuple) or len(item) != 2:
            name = type(self.source).__name__
            found = f"{len(item)} parts" if isinstance(item, list | tuple) else f"a {type(item).__name__}"
            raise TypeError(f"PIDNetDatasetWrapper: an item of {name} is {found}; expected (image, label)")
        image, label = item
        label = torch.as_tensor(label)
        if label.dim() == 3 and len(label) == 1:
            label = label[0]
        if label.dim() != 2 or label.is_floating_point():
            raise TypeError(
                f"PIDNetDatasetWrapper: a label of shape {tuple(label.shape)} and type {label.dtype} from "
                f"{type(self.source).__name__}; expected (H, W) or (1, H, W), the classes as integers"
            )
        return torch.as_tensor(image), (label.long(), boundary_target(label, self.width, self.margin))


def boundary_target(label: Tensor, width: int = 4, margin: int = 0) -> Tensor:
    """Where a label changes, as a band of pixels.

    A pixel begins a boundary where it differs from its right or its lower neighbour. That is what an edge detector
    (Canny, in PIDNet's code) finds in a label, to an overlap of 0.92 with 4 pixels, and it needs no OpenCV. Each such
    pixel is widened to `width` x `width`, from (width - 1) // 2 before it to width // 2 behind it: a step between
    columns 15 and 16 gives columns 14 to 17. Pixels to be ignored are a class like any other: their border counts.

    Args:
        label: (H, W) or (N, H, W), integers.
        width: How many pixels a boundary is wide, 1 and more.
        margin: No boundary begins within so many pixels of the image's border.

    Returns:
        The same shape, float32: 1 on a boundary, 0 elsewhere.

    Raises:
        ValueError: `width` or `margin` is out of range.
    """
    _check(width, margin)
    begins = torch.zeros_like(label, dtype=torch.bool)
    begins[..., :, :-1] |= label[..., :, 1:] != label[..., :, :-1]
    begins[..., :-1, :] |= label[..., 1:, :] != label[..., :-1, :]
    if margin:
        inside = torch.zeros_like(begins)
        inside[..., margin:-margin, margin:-margin] = True
        begins &= inside
    height, columns = label.shape[-2:]
    before, behind = width // 2, (width - 1) // 2  # of each pixel lie those that reach it
    marks = F.pad(begins.float().reshape(-1, 1, height, columns), (before, behind, before, behind))
    return F.max_pool2d(marks, width, stride=1).reshape(label.shape)


def _check(width: int, margin: int) -> None:
    for name, value, least in (("width", width, 1), ("margin", margin, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"PIDNetDatasetWrapper: {name} is {value!r}; possible: {least} and more, in whole pixels")
