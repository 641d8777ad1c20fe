"""What one sample of a dense task shows: input, target, prediction, error; knows numpy arrays, no model, no torch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dtrain.reporting.drawing import ERROR, IGNORED, Key, Tile, colour_of, coloured, extent, gray, reddened

_SIDES = {2: 320, 3: 208}  # the longest side of a tile, in pixels, that small images are enlarged to
_LONGEST = 512  # larger images are made smaller
_MOST_CHANNELS = 4  # of a target, that are drawn
_MOST_CLASSES = 24  # in a legend
_AXES = {3: ("z", "y", "x")}
_WHITE = (255, 255, 255)
_LIGHT = 0.35  # how much of the input's contrast is left under the errors


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

    def told(self) -> str:
        """How wrong it is, in a few characters."""
        if self.ignored is None:
            known = self.error[np.isfinite(self.error)]
            return f"mean {known.mean():.3g}" if len(known) else "no number"
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
    planes = _planes(views)
    rows = []
    for view in views[:_MOST_CHANNELS]:
        for name, index in planes:
            rows.append(_row(name, image, view, index))
    notes = []
    if len(views) > _MOST_CHANNELS:
        notes.append(f"channels 0 to {_MOST_CHANNELS - 1} of {len(views)}")
    return Panel(rows, _legend(views[:_MOST_CHANNELS]), notes)


def compared(target: np.ndarray, output: np.ndarray) -> list[View]:
    """Target and prediction as they are compared, channel by channel; arguments and errors as in `panel`."""
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
    if several and len(target) == len(output) and _one_hot(target):
        target = target.argmax(axis=0)[None]
    if several and len(target) == 1 and _whole(target):
        return [_of_classes("", target[0], output.argmax(axis=0), len(output))]
    if len(target) != len(output):
        raise ValueError(f"{shapes} do not fit together")
    names = [f"channel {number}" if several else "" for number in range(len(output))]
    return [_of_channel(*parts) for parts in zip(names, target, output, strict=True)]


def _whole(values: np.ndarray) -> bool:
    return not np.issubdtype(values.dtype, np.floating) or np.array_equal(values, np.round(values))


def _one_hot(target: np.ndarray) -> bool:
    return bool(np.isin(target, (0, 1)).all() and (target.sum(axis=0) == 1).all())


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
    foreground = np.zeros(shape, dtype=bool)
    for view in views:
        if view.ignored is not None:
            foreground |= view.target > 0
    planes = []
    for axis, name in enumerate(_AXES[len(shape)]):
        found = foreground.sum(axis=tuple(other for other in range(len(shape)) if other != axis))
        best = np.flatnonzero(found == found.max())
        chosen = int(best[np.abs(best - shape[axis] // 2).argmin()])
        index = tuple(chosen if other == axis else slice(None) for other in range(len(shape)))
        planes.append((f"{name} {chosen} of {shape[axis]}", index))
    return planes


def _row(name: str, image: np.ndarray | None, view: View, index: tuple[int | slice, ...]) -> list[Tile]:
    """The tiles of one plane of one channel."""
    fit = _fit(view.target.shape)
    plane = view.at(index)
    tiles, ground = _input(name, image, view.target.shape, index)
    target = ", ".join(filter(None, ("target", view.name, "" if tiles else name)))
    if plane.ignored is None:
        low, high = extent(view.target)
        most = float(np.max(plane.error, initial=0.0, where=np.isfinite(plane.error)))
        parts = [
            (target, gray(fit(plane.target), low, high), f" [{low:.3g}, {high:.3g}]"),
            ("prediction", gray(fit(plane.prediction), low, high), ""),
            ("error", reddened(fit(plane.error), most), f" [0, {most:.3g}], {plane.told()}"),
        ]
    else:
        wrong = fit(plane.error, np.max)
        error = np.full((*wrong.shape, 3), 245, dtype=np.uint8) if ground is None else ground
        error = np.where(wrong[..., None], np.array(ERROR, dtype=np.uint8), error)
        ignored = fit(plane.ignored, None)
        nothing = np.zeros_like(ignored)
        parts = [
            (target, coloured(fit(plane.target, None), ignored), ""),
            ("prediction", coloured(fit(plane.prediction, None), nothing), ""),
            ("error", error, f" {plane.told()}"),
        ]
    return [*tiles, *(Tile(f"{title}{more}", pixels) for title, pixels, more in parts)]


def _input(
    name: str, image: np.ndarray | None, shape: tuple[int, ...], index: tuple[int | slice, ...]
) -> tuple[list[Tile], np.ndarray | None]:
    """The input's tile, and the input as the light ground of the errors, where it has the target's size."""
    if image is None or image.ndim != len(shape) + 1:
        return [], None
    colours = len(image) == 3
    low, high = extent(image if colours else image[0])
    fit = _fit(image.shape[1:])
    same = image.shape[1:] == shape
    if not same:  # the plane at the same relative height
        index = tuple(
            part if isinstance(part, slice) else part * own // other
            for part, own, other in zip(index, image.shape[1:], shape, strict=True)
        )
    channels = [fit(image[(number, *index)]) for number in (range(3) if colours else (0,))]
    pixels = gray(np.stack(channels, axis=-1) if colours else channels[0], low, high)
    text = "input" if len(image) in (1, 3) else f"input, channel 0 of {len(image)}"
    tile = Tile(", ".join(filter(None, (text, name))) + f" [{low:.3g}, {high:.3g}]", pixels)
    ground = 255 - (255 - pixels.mean(axis=-1, keepdims=True)) * _LIGHT
    return [tile], np.repeat(ground, 3, axis=-1).astype(np.uint8) if same else None


def _fit(spatial: tuple[int, ...]) -> Callable[..., np.ndarray]:
    """How a plane comes to its size on the sheet, by a whole number of pixels; alike for all planes of a volume."""
    longest = max(spatial)
    times = max(1, _SIDES[len(spatial)] // longest)
    step = -(-longest // _LONGEST)

    def fit(plane: np.ndarray, reduce: Callable | None = np.mean) -> np.ndarray:
        """`reduce` makes one pixel of several: np.mean, np.max; None: takes the first of them."""
        if reduce is None:
            plane = plane[::step, ::step]
        elif step > 1:
            padded = np.pad(plane, [(0, -size % step) for size in plane.shape], mode="edge")
            blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
            plane = reduce(blocks, axis=(1, 3))
        return plane.repeat(times, axis=0).repeat(times, axis=1)

    return fit


def _legend(views: Sequence[View]) -> list[Key]:
    """The classes that occur in target or prediction, and what else has a colour."""
    classes: set[int] = set()
    for view in views:
        if view.ignored is not None:
            for labels in (view.target, view.prediction):
                classes |= {*np.flatnonzero(np.bincount(labels.reshape(-1))).tolist()}
    shown = sorted(classes)
    keys = [Key(colour_of(number), f"class {number}") for number in shown[:_MOST_CLASSES]]
    if len(shown) > _MOST_CLASSES:
        keys.append(Key(_WHITE, f"and {len(shown) - _MOST_CLASSES} more"))
    if any(view.ignored is not None and view.ignored.any() for view in views):
        keys.append(Key(IGNORED, "ignored"))
    if classes:
        keys.append(Key(ERROR, "wrong"))
    if any(view.ignored is None for view in views):
        keys += [Key(_WHITE, "no error"), Key(ERROR, "largest error")]
    return keys
