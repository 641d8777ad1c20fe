"""Rows of teeth as boxes whose numbers only their neighbours tell."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")
TEETH = 16

# From the third molar to the central incisor, in millimetres, roughly as in an upper jaw: along the row, across it, and
# from root to crown. The left side mirrors the right one.
_ALONG = (8.5, 9.0, 10.0, 6.5, 7.0, 7.5, 6.5, 8.5)
_ACROSS = (10.0, 11.0, 11.0, 9.0, 9.0, 8.0, 6.0, 7.0)
_LENGTH = (17.0, 19.0, 20.0, 21.0, 21.5, 27.0, 22.0, 23.5)
SIZES = np.array([*zip(_ALONG, _ACROSS, _LENGTH, strict=True)])
SIZES = np.concatenate((SIZES, SIZES[::-1]))  # (16, 3)
BEND = 0.05  # of the parabola y = BEND x^2 on which they stand, per millimetre

Item = tuple[tuple[Tensor, Tensor, Tensor], Tensor]


class ToothArch(Dataset[Item]):
    """Synthetic rows of 16 teeth with exact labels: which tooth is it? For models of relations between boxes.

    The teeth stand side by side on a parabola, some are missing, and each row is turned, moved and scaled at random. So
    neither where a box is nor how large it is tells its number. Its features do a little: they are noise with a faint
    trace of the number. All the row's traces and places together tell it nearly always.

    An item is ((features, boxes, mask), label) with K = `max_objects`: float32 (K, feature_dim); float32 (K, 6), each
    box's smallest x, y, z, then its largest, in no particular order; bool (K,), true for a tooth; int64 (K,), the
    number 1 to 16 as it goes round the row, -100 for the padding, whose features and boxes are 0. Item i depends on
    (seed, split, i) alone.

    Args:
        split: "train", "val" or "test": rows that have nothing to do with one another.
        length: How many rows.
        max_objects: K. Of a row with more teeth so many are kept.
        feature_dim: Numbers per tooth.
        signal: Length of the trace in a tooth's features, whose noise has a deviation of 1 in each direction.
        missing: Probability that a tooth is missing, 0 to 1; one always stays.
        jitter: Deviation of a tooth's place in millimetres, and of its size in 5 %.
        rotation: A row is turned by up to so many degrees either way about the vertical, a third of it about the
            other two axes.
        seed: Decides everything that is random.

    Raises:
        ValueError: An unknown split, or a number out of range.
    """

    random = False

    def __init__(
        self,
        split: str,
        *,
        length: int = 2048,
        max_objects: int = 16,
        feature_dim: int = 32,
        signal: float = 2.0,
        missing: float = 0.1,
        jitter: float = 0.5,
        rotation: float = 30.0,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"ToothArch: split is {split!r}; possible: {', '.join(SPLITS)}")
        for name, number in (("length", length), ("max_objects", max_objects), ("feature_dim", feature_dim)):
            if number < 1:
                raise ValueError(f"ToothArch: {name} is {number}; possible: 1 and more")
        if seed < 0:
            raise ValueError(f"ToothArch: seed is {seed}; possible: 0 and more")
        if not 0 <= missing <= 1:
            raise ValueError(f"ToothArch: missing is {missing}; possible: a probability, 0 to 1")
        self.split, self.length, self.max_objects, self.feature_dim = split, length, max_objects, feature_dim
        self.signal, self.missing, self.jitter, self.rotation, self.seed = signal, missing, jitter, rotation, seed
        # What a number looks like is a law of nature: the same for all splits and seeds.
        self.traces = _unit(np.random.RandomState(TEETH).normal(size=(TEETH, feature_dim)))
        self.places, self.frames = _row()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.length:
            raise IndexError(f"ToothArch: row {index} of {self.length}")
        random = self._generator(index)
        teeth = self._present(random)
        features = self.signal * self.traces[teeth] + random.normal(size=(len(teeth), self.feature_dim))
        boxes = self._boxes(random, teeth)
        mask = torch.zeros(self.max_objects, dtype=torch.bool)
        mask[: len(teeth)] = True
        label = torch.full((self.max_objects,), -100)
        label[: len(teeth)] = torch.from_numpy(teeth) + 1
        return (self._padded(features), self._padded(boxes), mask), label

    def _generator(self, index: int) -> np.random.RandomState:
        # RandomState's stream is frozen for good (NEP 19), that of default_rng may change with numpy's version. Philox
        # has a stream for each key, without the time that seeding takes.
        key = (len(SPLITS) * self.seed + SPLITS.index(self.split), index)
        return np.random.RandomState(np.random.Philox(key=key))

    def _present(self, random: np.random.RandomState) -> np.ndarray:
        """The teeth that are there, 0 to 15, in random order."""
        order = random.permutation(TEETH)
        there = random.uniform(size=TEETH) >= self.missing
        return order[there][: self.max_objects] if there.any() else order[:1]

    def _boxes(self, random: np.random.RandomState, teeth: np.ndarray) -> np.ndarray:
        """(teeth, 6): the axis-parallel boxes around the teeth of a turned, moved and scaled row."""
        most = np.radians(self.rotation) * np.array((1 / 3, 1 / 3, 1))
        turned = _rotation(most * random.uniform(-1, 1, size=3))
        places = self.places[teeth] + self.jitter * random.normal(size=(len(teeth), 3))
        sizes = SIZES[teeth] * np.exp(0.05 * self.jitter * random.normal(size=(len(teeth), 3)))
        # An axis-parallel box around a turned one reaches as far as the turned edges do, one after the other.
        reach = (np.abs(turned @ self.frames[teeth]) @ sizes[:, :, None])[:, :, 0] / 2
        centres = places @ turned.T
        boxes = np.concatenate((centres - reach, centres + reach), axis=1)
        scale, shift = 2 ** random.uniform(-1, 1), random.uniform(-100, 100, size=3)
        return scale * boxes + np.tile(shift, 2)

    def _padded(self, rows: np.ndarray) -> Tensor:
        padded = torch.zeros(self.max_objects, rows.shape[1])
        padded[: len(rows)] = torch.from_numpy(rows)
        return padded


def _row() -> tuple[np.ndarray, np.ndarray]:
    """Where the 16 teeth stand (16, 3), and as columns their own axes: along the row, across it, up (16, 3, 3)."""
    ends = np.cumsum(SIZES[:, 0])
    along = ends - SIZES[:, 0] / 2 - ends[-1] / 2  # millimetres on the row from its middle
    x = np.linspace(-60, 60, 12001)
    steps = np.hypot(np.diff(x), np.diff(BEND * x**2))
    length = np.concatenate(([0.0], np.cumsum(steps)))
    x = np.interp(along, length - length[-1] / 2, x)
    places = np.stack((x, BEND * x**2, np.zeros(TEETH)), axis=1)
    tangent = _unit(np.stack((np.ones(TEETH), 2 * BEND * x, np.zeros(TEETH)), axis=1))
    across = np.stack((-tangent[:, 1], tangent[:, 0], np.zeros(TEETH)), axis=1)
    up = np.tile((0.0, 0.0, 1.0), (TEETH, 1))
    return places, np.stack((tangent, across, up), axis=2)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """(3, 3): turn about x, then y, then z, in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array(((1, 0, 0), (0, cx, -sx), (0, sx, cx)))
    about_y = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
    about_z = np.array(((cz, -sz, 0), (sz, cz, 0), (0, 0, 1)))
    return about_z @ about_y @ about_x


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
