"""From probabilities to classes, masks and numbered instances, plane by plane, and how well they agree with labels.

A chunk of planes has its planes first: (planes, K, ...) for probabilities, (planes, ...) for anything else.
"""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dtrain.config.errors import ConfigError

CHUNK_BYTES = 1 << 22


class Choice(NamedTuple):
    """What of a prediction is kept.

    Classes are the most probable ones, or with one channel whether it is above the threshold. Instances are
    `foreground`: where the class is not 0; or `inverted`: where the (boundary) channel is not above the threshold.
    """

    segmentation: bool = False  # classes instead of probabilities
    instances: Literal["foreground", "inverted"] | None = None
    threshold: float = 0.5  # for one channel
    channel: int | None = None  # keep only this one

    @property
    def labels(self) -> bool:
        """Whether the result has no channels."""
        return self.segmentation or self.instances is not None

    def of(self, planes: np.ndarray) -> np.ndarray:
        """Planes of a prediction, (K, planes, ...), as they are kept, planes first.

        Raises:
            ConfigError: There is no such channel, or several channels where one is needed.
        """
        if self.channel is not None and self.channel >= len(planes):
            text = f"is {self.channel}, but the model has {len(planes)} channel(s); possible: 0 to {len(planes) - 1}"
            raise ConfigError(f"predictor.prediction_channel {text}")
        if self.channel is not None:
            planes = planes[self.channel : self.channel + 1]
        if self.instances == "inverted":
            if len(planes) > 1:
                text = f"inverted needs one boundary channel, the model has {len(planes)}"
                raise ConfigError(f"predictor.instances: {text}; choose one with predictor.prediction_channel")
            return planes[0] <= self.threshold
        if not self.labels:
            return np.swapaxes(planes, 0, 1)
        classes = classes_of(planes, self.threshold)
        return classes != 0 if self.instances else classes


def classes_of(planes: np.ndarray, threshold: float) -> np.ndarray:
    """The most probable class of each voxel; of one channel, 1 where it is above the threshold. (K, ...) -> (...)."""
    if len(planes) == 1:
        return (planes[0] > threshold).astype(np.uint8)
    return planes.argmax(0).astype(np.min_scalar_type(len(planes) - 1))


def instances(chunks: Iterable[np.ndarray], connectivity: int, min_size: int, scratch: Path) -> Iterator[np.ndarray]:
    """Number the connected components of a mask, from 1 on in the order of their first plane; 0 elsewhere.

    Each plane is labelled on its own; what touches between planes is one component. So the numbers do not depend on how
    the volume is cut, and memory is bounded by a plane and by the number of components in all planes. The labels
    wait in a scratch file, 4 bytes per voxel, until all planes have been seen.

    The mask's chunks are (planes, ...) each. `connectivity` is how many axes two neighbouring voxels may differ in, by
    one each: 1 up to the dimensions. Components with fewer voxels than `min_size` become background.

    Yields:
        The numbers, (planes, ...) each, in the smallest unsigned type that holds them.
    """
    from scipy import ndimage

    scratch.parent.mkdir(parents=True, exist_ok=True)
    sizes, pairs = [np.zeros(1, np.int64)], [np.zeros((2, 0), np.int64)]
    count, previous = 0, np.zeros(0, np.uint32)
    with contextlib.ExitStack() as cleanup, scratch.open("w+b") as labels:  # a mapped file would count as memory
        cleanup.callback(scratch.unlink, missing_ok=True)
        for plane in (plane for chunk in chunks for plane in chunk):
            structure = ndimage.generate_binary_structure(plane.ndim, min(connectivity, plane.ndim))
            labelled, components = ndimage.label(plane, structure, output=np.uint32)
            sizes.append(np.bincount(labelled.ravel(), minlength=components + 1)[1:])
            labelled[labelled > 0] += np.uint32(count)
            if previous.size:
                pairs.append(_touching(previous, labelled, connectivity))
            labels.write(labelled.data)
            count, previous = count + components, labelled
        number = _numbers(np.concatenate(sizes), np.concatenate(pairs, axis=1), min_size)
        labels.seek(0)
        step = max(1, CHUNK_BYTES // (4 * previous.size))
        while chunk := labels.read(4 * previous.size * step):
            yield number[np.frombuffer(chunk, np.uint32).reshape(-1, *previous.shape)]


def _touching(previous: np.ndarray, plane: np.ndarray, connectivity: int) -> np.ndarray:
    """The pairs of labels that touch between two planes, (2, pairs)."""
    found = []
    for offset in product((-1, 0, 1), repeat=plane.ndim):
        if 1 + sum(map(abs, offset)) > connectivity:
            continue
        above = previous[tuple(slice(max(0, step), min(0, step) or None) for step in offset)]
        below = plane[tuple(slice(max(0, -step), min(0, -step) or None) for step in offset)]
        touch = (above > 0) & (below > 0)
        found.append(above[touch].astype(np.uint64) << np.uint64(32) | below[touch])
    pairs = np.concatenate(found)
    pairs = np.unique(pairs[np.flatnonzero(np.diff(pairs, prepend=~pairs[:1]))])  # few are left to be sorted
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)]).astype(np.int64)


def _numbers(sizes: np.ndarray, pairs: np.ndarray, min_size: int) -> np.ndarray:
    """The final number of each provisional label; `sizes[0]` is the background's place."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(len(sizes), len(sizes)))
    _, component = connected_components(links, directed=False)
    voxels = np.bincount(component, weights=sizes)
    firsts = np.unique(component, return_index=True)[1]  # a component's first label, by component
    kept = (voxels >= max(min_size, 1)) & (np.arange(len(voxels)) != component[0])
    order = np.flatnonzero(kept)[np.argsort(firsts[kept], kind="stable")]
    number = np.zeros(len(voxels), np.min_scalar_type(len(order)))
    number[order] = np.arange(1, len(order) + 1)
    return number[component]


class Agreement:
    """How well a segmentation agrees with its label, counted chunk by chunk: Dice or IoU per class, class 0 left out.

    Dice is 2 |A and B| / (|A| + |B|), IoU |A and B| / |A or B|, of the voxels A of a class in the prediction and B in
    the label. A class that is in neither has none. Where the label has channels, they are the classes, and each
    channel of the prediction is taken where it is above the threshold.
    """

    def __init__(self, metric: Literal["dice", "mean_iou"], choice: Choice) -> None:
        self.metric, self.choice = metric, choice
        self._counts = np.zeros((3, 0), np.int64)  # by class: voxels of the intersection, the prediction, the label

    def add(self, kept: np.ndarray, label: np.ndarray) -> None:
        """Count a chunk: what `Choice.of` gave, and its label, (planes, ...) or (K, planes, ...), negative: ignored.

        Raises:
            ValueError: The label has channels and the prediction has none, or others.
        """
        if label.ndim < kept.ndim or (self.choice.labels and label.ndim == kept.ndim):
            classes = kept if self.choice.labels else classes_of(np.swapaxes(kept, 0, 1), self.choice.threshold)
            counts = _counts_of_classes(classes, label)
        elif self.choice.labels or kept.shape[1] != len(label):
            raise ValueError(f"a label of shape {label.shape} does not fit a prediction of {kept.shape} (planes first)")
        else:
            counts = _counts_of_masks(np.swapaxes(kept, 0, 1) > self.choice.threshold, label > 0)
        missing = counts.shape[1] - self._counts.shape[1]
        self._counts = np.pad(self._counts, ((0, 0), (0, max(0, missing))))
        self._counts[:, : counts.shape[1]] += counts

    def values(self) -> list[float]:
        """One figure per class, nan for a class that is in neither."""
        intersection, predicted, labelled = self._counts
        with np.errstate(invalid="ignore"):
            dice = 2 * intersection / (predicted + labelled)
            return (dice if self.metric == "dice" else intersection / (predicted + labelled - intersection)).tolist()


def _counts_of_classes(classes: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Voxels of the intersection, the prediction and the label, by class but for class 0, (3, classes)."""
    counts = label >= 0
    predicted, labelled = classes[counts].astype(np.int64), label[counts].astype(np.int64)
    length = 1 + max(predicted.max(initial=0), labelled.max(initial=0))
    sets = predicted[predicted == labelled], predicted, labelled
    return np.stack([np.bincount(voxels, minlength=length)[1:] for voxels in sets])


def _counts_of_masks(predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """The same where each channel is a class of its own: masks of (K, planes, ...)."""
    axes = tuple(range(1, labelled.ndim))
    return np.stack([mask.sum(axes) for mask in (predicted & labelled, predicted, labelled)])
