"""Scikit-learn's handwritten digits, split by a seed."""

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")
IMAGES = 1797
BRIGHTEST = 16.0  # the file counts the dark pixels of 4 x 4 blocks
FILE = Path("sklearn", "datasets", "data", "digits.csv.gz")


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """1,797 real digits of 8 x 8 pixels in 10 classes (174 to 183 of each), cut into train, val and test.

    Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as scikit-learn bundles it: nothing is
    downloaded. The three splits are disjoint and together hold every image; with the same seed and fractions they are
    the same on every machine. An item is (image, label): float32 (1, 8, 8), (64,) if flat, from 0 to 1, and int64 ().

    Args:
        split: "train", "val" or "test"; train is what the other two leave.
        seed: Decides which image falls into which split, and nothing else.
        val_fraction: Share of all images that is held back for validation, 0 to 1.
        test_fraction: Share of all images that is held back for the test, 0 to 1.
        flat: Items of shape (64,) instead of (1, 8, 8), for models without convolution or patches.
        standardize: Subtract the training pixels' mean and divide by their deviation (for all three splits).
        shift: In training, move each image by up to so many pixels up or down and left or right; background moves in.
            Draws from torch's global generator. (It does not help on these images: the digits fill their height.)

    Attributes:
        random: Whether an item needs random numbers, that is, whether somebody has to seed them per sample.

    Raises:
        ValueError: An unknown split, fractions that leave a split empty, or a shift outside training.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    random = False

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        flat: bool = False,
        standardize: bool = False,
        shift: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Digits: split is {split!r}; possible: {', '.join(SPLITS)}")
        if not 0 <= shift < 8 or (shift and split != "train"):
            raise ValueError(f"Digits: shift is {shift} in split {split}; possible: 0 to 7 in train, 0 in val and test")
        pixels, labels = read_digits()
        parts = split_indices(len(pixels), seed, val_fraction, test_fraction)
        images = torch.from_numpy(pixels / np.float32(BRIGHTEST)).reshape(-1, 1, 8, 8)
        seen = images[parts["train"]]
        # A margin of background once, so that moving an image is nothing but cutting a window out.
        images = torch.nn.functional.pad(images[parts[split]], (shift,) * 4)
        self.images = (images - seen.mean()) / seen.std() if standardize else images
        self.labels = torch.from_numpy(labels)[parts[split]]
        self.indices = parts[split]
        self.flat, self.shift = flat, shift
        self.random = shift > 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.shift:
            top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            image = image[:, top : top + 8, left : left + 8]
        return image.reshape(64) if self.flat else image, self.labels[index]


DigitsClassification = Digits  # the name that older configs use


def split_indices(images: int, seed: int, val_fraction: float, test_fraction: float) -> dict[str, Tensor]:
    """Who is in which split.

    Args:
        images: How many there are.
        seed: Decides the order from which the splits are cut.
        val_fraction: Share of the images for validation, rounded to whole images.
        test_fraction: Share of the images for the test, rounded to whole images.

    Returns:
        For each split its image numbers, int64 (n,), in rising order; together every number once.

    Raises:
        ValueError: A split would be empty.
    """
    val, test = round(images * val_fraction), round(images * test_fraction)
    if min(val, test, images - val - test) < 1:
        raise ValueError(
            f"Digits: val_fraction {val_fraction} and test_fraction {test_fraction} leave train {images - val - test}, "
            f"val {val} and test {test} of {images} images; each needs at least one"
        )
    # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version.
    order = torch.from_numpy(np.random.RandomState(seed).permutation(images))
    test_part, val_part, train_part = order.split([test, val, images - val - test])
    return {name: part.sort().values for name, part in zip(SPLITS, (train_part, val_part, test_part), strict=True)}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The whole set as scikit-learn bundles it.

    Returns:
        Pixels float32 (1797, 64), 0 to 16, and labels int64 (1797,).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    # The file is read without importing scikit-learn: that import alone takes 1.2 s and 136 MB in every rank.
    for folder in sys.path:
        file = Path(folder, FILE)
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as lines:
                table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
            break
    else:
        table = _read_through_sklearn()
    if table.shape != (IMAGES, 65):
        raise ValueError(f"Digits: scikit-learn's digits have the shape {table.shape}, expected ({IMAGES}, 65)")
    return table[:, :64], table[:, 64].astype(np.int64)


def _read_through_sklearn() -> np.ndarray:
    """The same table where sys.path does not show the file (a zip, an editable install)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Digits needs scikit-learn for its images: pip install scikit-learn") from error
    data = load_digits()
    return np.column_stack((data.data, data.target)).astype(np.float32)
