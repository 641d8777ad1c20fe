"""The panel of one sample of a dense task: input, target, prediction and error as tiles, from numpy arrays."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from dtrain.reporting.png_drawing import ERROR, IGNORED, Key, Tile, colour_of, coloured, extent, gray, reddened

_SIDES = {2: 320, 3: 208}  # the longest side of a tile, in pixels, that small images are enlarged to
_LONGEST = 512  # larger images are made smaller
_MOST_CHANNELS = 4  # of a target, that are drawn
_MOST_CLASSES = 24  # in a legend
_WHITE = (255, 255, 255)
_CONTRAST = 0.35  # how much of the input's is left under the errors
_ERROR_PIXEL, _LIGHT_GRAY = np.array(ERROR, dtype=np.uint8), np.uint8(245)


class View(NamedTuple):
    """A target and its prediction, both (*spatial), as they are compared."""

    name: str  # of the channel; '' where there is one alone
    target: np.ndarray
    prediction: np.ndarray
    error: np.ndarray  # bool: wrong; float: the absolute difference
    ignored: np.ndarray | None  # bool, of classes; None: these are values

    def at(self, index: tuple[int | slice, ...]) -> "View":
        """The same of one plane."""
        ignored = None if self.ignored is None else self.ignored[index]
        return View(self.name, self.target[index], self.prediction[index], self.error[index], ignored)

    def error_text(self) -> str:
        """How wrong it is, in a few characters."""
        if self.ignored is None:
            known = self.error[np.isfinite(self.error)]
            return f"mean {known.mean():.3g}" if len(known) else "not finite"
        return f"{self.error.sum() / max(1, (~self.ignored).sum()):.2%}"


class Panel(NamedTuple):
    """What a sheet needs."""

    rows: list[list[Tile]]
    legend: list[Key]
    notes: list[str]


def panel(image: np.ndarray | None, target: np.ndarray, output: np.ndarray) -> Panel:
    """Rows of input, target, prediction and error; of a volume three planes, of several channels each.

    Classes are the output's largest channel, or of one channel its sign. Other targets are values, drawn in gray.

    Args:
        image: (C, *spatial), whose first channel is drawn, of three all as colours; None: no input is drawn.
        target: (*spatial), (1, *spatial) or (K, *spatial); negative classes and those beyond the last are ignored.
        output: Logits or values, (C, *spatial); a smaller or larger one is brought to the target's size.

    Raises:
        ValueError: Target and output do not fit together.
    """
    views = compared(target, output)
    drawn, planes = views[:_MOST_CHANNELS], _planes(views)
    rows = [_row(name, image, view, index) for view in drawn for name, index in planes]
    notes = [f"channels 0 to {len(drawn) - 1} of {len(views)}"] if len(drawn) < len(views) else []
    return Panel(rows, _legend(drawn), notes)


def compared(target: np.ndarray, output: np.ndarray) -> list[View]:
    """Target and prediction as they are compared, channel by channel; arguments and errors as of `panel`."""
    shapes = f"a target of shape {target.shape} and an output of shape {output.shape}"
    if output.ndim - 1 not in _SIDES:
        raise ValueError(f"{shapes}: an image has two dimensions, a volume three")
    target = target[None] if target.ndim == output.ndim - 1 else target
    if target.ndim != output.ndim:
        raise ValueError(f"{shapes} do not fit together")
    output = _resized(output, target.shape[1:])
    if len(target) == len(output) + 1:  # a label that rides along behind the targets, for metrics
        target = target[:-1]
    several = len(output) > 1
    if several and len(target) == len(output) and np.isin(target, (0, 1)).all() and (target.sum(axis=0) == 1).all():
        target = target.argmax(axis=0)[None]  # it was one-hot
    if several and len(target) == 1 and _are_integers(target):
        return [_of_classes("", target[0], _largest(output), len(output))]
    if len(target) != len(output):
        raise ValueError(f"{shapes} do not fit together")
    channels = enumerate(zip(target, output, strict=True))
    return [_of_channel(f"channel {number}" if several else "", *channel) for number, channel in channels]


def _largest(output: np.ndarray) -> np.ndarray:
    """`output.argmax(axis=0)`, which takes three times as long: (C, *spatial) -> (*spatial)."""
    labels, best = np.zeros(output.shape[1:], dtype=np.int64), output[0].copy()
    for number in range(1, len(output)):
        better = ~(output[number] <= best) & (best == best)  # the first nan is the largest
        np.putmask(labels, better, number)
        np.maximum(best, output[number], out=best)
    return labels


def _are_integers(values: np.ndarray) -> bool:
    return not np.issubdtype(values.dtype, np.floating) or np.array_equal(values, np.round(values))


def _of_classes(name: str, target: np.ndarray, prediction: np.ndarray, classes: int) -> View:
    ignored = (target < 0) | (target >= classes)
    target = np.where(ignored, 0, target).astype(np.int64)
    return View(name, target, prediction.astype(np.int64), (target != prediction) & ~ignored, ignored)


def _of_channel(name: str, target: np.ndarray, output: np.ndarray) -> View:
    if np.isin(target, (-1, 0, 1)).all():
        return _of_classes(name, target, output > 0, 2)  # sigmoid(x) > 0.5
    return View(name, target, output, np.abs(output - target), None)


def _resized(output: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """Nearest neighbours; heads of a network may have a fraction of the target's size."""
    if output.shape[1:] == spatial:
        return output
    index = [np.arange(new) * old // new for new, old in zip(spatial, output.shape[1:], strict=True)]
    return output[np.ix_(np.arange(len(output)), *index)]


def _planes(views: Sequence[View]) -> list[tuple[str, tuple[int | slice, ...]]]:
    """The whole of an image; of a volume one plane across each axis: that with most foreground, else the middle."""
    shape = views[0].target.shape
    if len(shape) == 2:
        return [("", (slice(None), slice(None)))]
    labels = (view.target > 0 for view in views if view.ignored is not None)
    foreground = reduce(np.logical_or, labels, np.zeros(shape, dtype=bool))
    planes = []
    for axis, name in enumerate("zyx"):
        voxels = np.moveaxis(foreground, axis, 0).sum(axis=(1, 2))
        fullest = np.flatnonzero(voxels == voxels.max())
        chosen = int(fullest[np.abs(fullest - shape[axis] // 2).argmin()])
        index: tuple[int | slice, ...] = (*[slice(None)] * axis, chosen, *[slice(None)] * (2 - axis))
        planes.append((f"{name} {chosen} of {shape[axis]}", index))
    return planes


def _row(name: str, image: np.ndarray | None, view: View, index: tuple[int | slice, ...]) -> list[Tile]:
    """The tiles of one plane of one channel."""
    shape = view.target.shape
    input_tiles, ground = _input(name, image, shape, index)
    title = ", ".join(filter(None, ("target", view.name, "" if input_tiles else name)))
    plane = view.at(index)
    if plane.ignored is None:
        return [*input_tiles, *_value_tiles(title, plane, shape, *extent(view.target))]
    return [*input_tiles, *_class_tiles(title, plane, ground, shape)]


def _value_tiles(title: str, plane: View, shape: tuple[int, ...], low: float, high: float) -> list[Tile]:
    highest = float(np.max(plane.error, initial=0.0, where=np.isfinite(plane.error)))
    return [
        Tile(f"{title} [{low:.3g}, {high:.3g}]", gray(_fitted(plane.target, shape), low, high)),
        Tile("prediction", gray(_fitted(plane.prediction, shape), low, high)),
        Tile(f"error [0, {highest:.3g}], {plane.error_text()}", reddened(_fitted(plane.error, shape), highest)),
    ]


def _class_tiles(title: str, plane: View, ground: np.ndarray | None, shape: tuple[int, ...]) -> list[Tile]:
    """As `_value_tiles`, of classes; the errors stand on the ground, or else on light gray."""
    assert plane.ignored is not None
    wrong = _fitted(plane.error, shape, np.max)[..., None]
    ignored = _fitted(plane.ignored, shape, None)
    return [
        Tile(title, coloured(_fitted(plane.target, shape, None), ignored)),
        Tile("prediction", coloured(_fitted(plane.prediction, shape, None), np.zeros_like(ignored))),
        Tile(f"error {plane.error_text()}", np.where(wrong, _ERROR_PIXEL, _LIGHT_GRAY if ground is None else ground)),
    ]


def _input(
    name: str, image: np.ndarray | None, shape: tuple[int, ...], index: tuple[int | slice, ...]
) -> tuple[list[Tile], np.ndarray | None]:
    """The input's tile, and the input as the light ground of the errors, where it has the target's size."""
    if image is None or image.ndim != len(shape) + 1:
        return [], None
    own_shape = image.shape[1:]
    if own_shape != shape:  # the plane at the same relative height
        index = tuple(
            part if isinstance(part, slice) else part * own // other
            for part, own, other in zip(index, own_shape, shape, strict=True)
        )
    drawn = image if len(image) == 3 else image[:1]
    low, high = extent(drawn)
    channels = [_fitted(channel[index], own_shape) for channel in drawn]
    pixels = gray(np.stack(channels, axis=-1) if len(channels) == 3 else channels[0], low, high)
    text = "input" if len(image) in (1, 3) else f"input, channel 0 of {len(image)}"
    tile = Tile(", ".join(filter(None, (text, name))) + f" [{low:.3g}, {high:.3g}]", pixels)
    if own_shape != shape:
        return [tile], None
    ground = 255 - (255 - pixels.mean(axis=-1, keepdims=True)) * _CONTRAST
    return [tile], np.repeat(ground, 3, axis=-1).astype(np.uint8)


def _fitted(plane: np.ndarray, shape: tuple[int, ...], pooled: Callable | None = np.mean) -> np.ndarray:
    """A plane (H, W) in its size on the sheet: by a whole factor, the same for all planes of a volume of this shape.

    `pooled` makes one pixel of several: np.mean, np.max; None: takes the first of them.
    """
    step = -(-max(shape) // _LONGEST)
    if pooled is None:
        plane = plane[::step, ::step]
    elif step > 1:
        padded = np.pad(plane, [(0, -size % step) for size in plane.shape], mode="edge")
        blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
        plane = pooled(blocks, axis=(1, 3))
    return enlarged(plane, max(1, _SIDES[len(shape)] // max(shape)))


def enlarged(pixels: np.ndarray, times: int) -> np.ndarray:
    """Pixels (H, W, ...), each repeated so many times in both directions."""
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _legend(views: Sequence[View]) -> list[Key]:
    """The classes that occur in target or prediction, and what else has a colour."""
    of_classes = [view for view in views if view.ignored is not None]
    labels = [values for view in of_classes for values in (view.target, view.prediction)]
    classes = sorted({int(number) for values in labels for number in np.flatnonzero(np.bincount(values.ravel()))})
    keys = [Key(colour_of(number), f"class {number}") for number in classes[:_MOST_CLASSES]]
    if len(classes) > _MOST_CLASSES:
        keys.append(Key(_WHITE, f"and {len(classes) - _MOST_CLASSES} more"))
    if any(view.ignored.any() for view in of_classes if view.ignored is not None):
        keys.append(Key(IGNORED, "ignored"))
    if of_classes:
        keys.append(Key(ERROR, "wrong"))
    if len(of_classes) < len(views):
        keys += [Key(_WHITE, "no error"), Key(ERROR, "largest error")]
    return keys
