"""Images strewn with real handwritten digits, each pixel labelled."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dtrain.components.datasets.digits import BRIGHTEST, SPLITS, read_digits, split_indices

SIDE = 8  # pixels of a digit as scikit-learn has it
THRESHOLD = 0.25  # a digit's pixel is ink above this share of the brightest
TRIES = 50  # places that are tried for a digit until one is free


class DigitsScene(Dataset[tuple[Tensor, Tensor]]):
    """Segmentation of images in which a few real digits stand on a dark ground, with exact labels.

    The digits are scikit-learn's 1,797 (see `Digits`), divided into the three splits first: no image of val or test
    holds a digit that train has seen. Each is enlarged by a whole number, dimmed or tinted, and put where no other
    one is; then noise is added. A pixel's label is its digit's class where the digit has more than a quarter of the
    greatest brightness before it is dimmed, else 0.

    An item is (image, label): float32 (channels, H, W) from 0 to 1, and int64 (H, W), 0 for the ground, 1 to
    `num_classes` - 1 for the digits. Item i depends on (seed, split, i) alone, unless `fresh`.

    Args:
        split: "train", "val" or "test"; train is what the other two leave.
        length: How many images.
        size: H and W in pixels.
        channels: 1 for grey; with more, each digit has a colour of its own, which tells nothing about it.
        per_image: How many digits an image has, at least and at most. One that finds no space is left out.
        zoom: Side of a digit's pixel in the image's pixels, at least and at most.
        digits: Which digits there are; the class is the place in this list, counted from 1.
        binary: One class for all digits.
        gain: Factor of a digit's brightness in each channel, at least and at most.
        noise: Deviation of the noise, in shares of the greatest brightness.
        fresh: In training, new images in each epoch; draws from torch's global generator.
        seed: Decides who is in which split, and the images.
        val_fraction: Share of the digits that is held back for validation, 0 to 1.
        test_fraction: Share of the digits that is held back for the test, 0 to 1.

    Attributes:
        random: Whether an item needs random numbers, that is, whether somebody has to seed them per sample.
        num_classes: Number of labels, the ground included.
        indices: Which of the 1,797 digits this split has; int64 (n,).

    Raises:
        ValueError: An unknown split, or a number out of range.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    random = False

    def __init__(
        self,
        split: str,
        *,
        length: int = 512,
        size: Sequence[int] = (64, 64),
        channels: int = 1,
        per_image: Sequence[int] = (3, 6),
        zoom: Sequence[int] = (2, 3),
        digits: Sequence[int] = tuple(range(10)),
        binary: bool = False,
        gain: Sequence[float] = (0.5, 1.0),
        noise: float = 0.1,
        fresh: bool = False,
        seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"DigitsScene: split is {split!r}; possible: {', '.join(SPLITS)}")
        _check_numbers(length, channels, noise, seed)
        if fresh and split != "train":
            raise ValueError(f"DigitsScene: fresh is true in split {split}; possible: in train alone")
        self.size, self.zoom = _pair("size", size, 1), _pair("zoom", zoom, 1)
        self.per_image, self.gain = _pair("per_image", per_image, 1), _pair("gain", gain, 0)
        for name, (low, high) in (("zoom", self.zoom), ("per_image", self.per_image), ("gain", self.gain)):
            if low > high:
                raise ValueError(f"DigitsScene: {name} is {[low, high]}; expected the least, then the greatest")
        if min(self.size) < SIDE * self.zoom[1]:
            raise ValueError(
                f"DigitsScene: size is {list(self.size)}; a digit enlarged by {self.zoom[1]} needs "
                f"{SIDE * self.zoom[1]} pixels"
            )
        classes = {digit: 1 if binary else place for place, digit in enumerate(_checked_digits(digits), 1)}
        pixels, labels = read_digits()
        part = split_indices(len(pixels), seed, val_fraction, test_fraction)[split]
        self.indices = part[torch.isin(part, torch.from_numpy(np.flatnonzero(np.isin(labels, [*classes]))))]
        self.pixels = (pixels[self.indices] / np.float32(BRIGHTEST)).reshape(-1, SIDE, SIDE)
        self.classes = np.array([classes[digit] for digit in labels[self.indices].tolist()])
        self.num_classes = 1 + max(classes.values())
        self.split, self.length, self.channels, self.noise, self.seed = split, length, channels, noise, seed
        self.fresh = self.random = fresh

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"DigitsScene: image {index} of {self.length}")
        random = self._generator(index)
        image = np.zeros((self.channels, *self.size), np.float32)
        label = np.zeros(self.size, np.int64)
        taken = np.zeros(self.size, bool)
        for _ in range(random.randint(self.per_image[0], self.per_image[1] + 1)):
            self._add_digit(random, image, label, taken)
        seen = (image + self.noise * random.normal(size=image.shape)).clip(0, 1)
        return torch.from_numpy(seen).float(), torch.from_numpy(label)

    def _generator(self, index: int) -> np.random.RandomState:
        # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version. Philox
        # has a stream for each key, without the time that seeding takes.
        key = (len(SPLITS) * self.seed + SPLITS.index(self.split), index)
        if self.fresh:
            key = tuple(torch.randint(2**62, (2,)).tolist())
        return np.random.RandomState(np.random.Philox(key=key))

    def _add_digit(
        self, random: np.random.RandomState, image: np.ndarray, label: np.ndarray, taken: np.ndarray
    ) -> None:
        """Puts one digit where no other one is, in all three arrays."""
        which = random.randint(len(self.pixels))
        zoom = random.randint(self.zoom[0], self.zoom[1] + 1)
        gain = random.uniform(self.gain[0], self.gain[1], (self.channels, 1, 1)).astype(np.float32)
        digit = self.pixels[which].repeat(zoom, 0).repeat(zoom, 1)
        for _ in range(TRIES):
            top, left = (random.randint(side - len(digit) + 1) for side in self.size)
            place = slice(top, top + len(digit)), slice(left, left + len(digit))
            if not taken[place].any():
                taken[place] = True
                image[:, *place] = gain * digit
                label[place] = np.where(digit > THRESHOLD, self.classes[which], 0)
                return


def _check_numbers(length: int, channels: int, noise: float, seed: int) -> None:
    for name, number, least in (
        ("length", length, 1),
        ("channels", channels, 1),
        ("noise", noise, 0),
        ("seed", seed, 0),
    ):
        if number < least:
            raise ValueError(f"DigitsScene: {name} is {number}; possible: {least} and more")


def _pair(name: str, numbers: Sequence, least: int) -> tuple:
    if len(numbers) != 2 or min(numbers) < least:
        raise ValueError(f"DigitsScene: {name} is {[*numbers]}; expected two numbers, each {least} or more")
    return tuple(numbers)


def _checked_digits(digits: Sequence[int]) -> Sequence[int]:
    if not digits or len({*digits}) != len(digits) or not {*digits} <= {*range(10)}:
        raise ValueError(f"DigitsScene: digits is {[*digits]}; expected different digits from 0 to 9")
    return digits
