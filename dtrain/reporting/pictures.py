"""The pictures of a validation: which samples and batches are looked at and where files go; knows no model, no MLflow.

A dense task (outputs (N, C, H, W) or (N, C, D, H, W)) gets a panel for each of a few samples, always the same ones.
A classification (outputs (N, C) or (N, C, K), integer targets) gets its worst errors and a confusion matrix, of all
samples. Whatever goes wrong here costs one line, never the training.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from dtrain.data.batch import main_output, split
from dtrain.reporting.drawing import Tile, extent, gray, matrix, png, sheet
from dtrain.reporting.sample_panel import panel
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import write_bytes

_MOST_CLASSES = 30  # of a confusion matrix that can be read
_WORST_SIDE, _WORST_COLUMNS = 120, 4


def picture_settings(
    *, samples: int | list[int] = 4, worst: int = 16, every_validations: int = 1, keep_last: int = 100
) -> dict[str, Any]:
    """The keys under `trainer.pictures`.

    Args:
        samples: Of a dense task: how many validation samples are drawn, spread evenly, or their indices.
        worst: Of a classification: how many of the worst errors are drawn.
        every_validations: Draw at every so many validations of a start, the first one included.
        keep_last: Newest validations whose pictures stay in the run folder; MLflow keeps all.
    """
    return dict(locals())


class Error(NamedTuple):
    """A sample that was taken for one of another class. They sort by their loss, the largest first."""

    order: float  # minus the loss
    sample: int
    place: int  # which of several objects in the sample; -1: the sample is one
    truth: int
    guess: int
    sure: float  # the probability given to the guess


class Seen(NamedTuple):
    """What one rank saw of the validation, in plain types."""

    kind: str  # dense, classes or '' (nothing that can be drawn)
    problem: str
    classes: int  # C
    pairs: Mapping[tuple[int, int], int]  # (truth, guess) -> how often
    errors: Sequence[Error]
    ignored: int


class Pictures:
    """Draws for the validations of a training.

    Args:
        loader: The validation's: its dataset is asked for single samples, seeded as the loader seeds them.
        folder: The run folder.
        settings: From `picture_settings`; None: nothing is drawn.
        keys: Of input and target in a batch that is a dict; see `batch.split`.

    Raises:
        ValueError: A number is out of range, or the validation data have no such sample.
    """

    def __init__(
        self,
        loader: Any,
        folder: Path,
        settings: Mapping[str, Any] | None,
        keys: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.loader, self.folder, self.keys = loader, RunFolder(folder).pictures, keys
        self.settings = None if loader is None or settings is None else checked(picture_settings(**settings))
        self.samples = chosen(self.settings["samples"], len(loader.dataset)) if self.settings else []
        self._validations = 0
        self._told: set[type] = set()

    def album(self, step: int, journal: Any, note: Callable[[str], None]) -> "Album | None":
        """What takes in one validation, after so many optimizer steps; None where it is not to be drawn."""
        if self.settings is None:
            return None
        self._validations += 1
        if (self._validations - 1) % self.settings["every_validations"]:
            return None
        return Album(self, step, journal, note)

    def warn(self, kind: type, text: str, note: Callable[[str], None]) -> None:
        """Say what went wrong; of one kind of error once, not at each validation."""
        if kind not in self._told:
            self._told.add(kind)
            note(f"warning: no pictures of the validation: {text} (trainer.pictures=false draws none)")

    def prune(self) -> None:
        """Leave the newest validations' pictures."""
        assert self.settings is not None
        for old in sorted(self.folder.glob("step-*"))[: -self.settings["keep_last"]]:
            shutil.rmtree(old, ignore_errors=True)


class Album:
    """The pictures of one validation: `see` each batch, bring all ranks' `seen` together, `draw` on the main rank."""

    def __init__(self, pictures: Pictures, step: int, journal: Any, note: Callable[[str], None]) -> None:
        self._pictures, self._step, self._journal, self._note = pictures, step, journal, note
        self._kind, self._problem = "", ""
        self._classes = 0
        self._readings: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def see(self, outcome: Any, number: int) -> None:
        """Take in one batch; nothing waits for the device.

        Args:
            outcome: The batch and what the model made of it.
            number: Which batch of the whole validation it is, counted over all ranks.
        """
        if self._problem or self._kind == "dense":
            return
        try:
            output, target = main_output(outcome.output), main_output(outcome.target)
            self._kind = kind_of(output, target)
            if self._kind == "classes":
                first = number * self._pictures.loader.batch_sampler.batch_size
                self._classes = output.shape[1]
                self._readings.append((first, *_reading(output, target)))
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"

    def seen(self) -> Seen:
        """What this rank saw, for the main rank; without waiting for any other."""
        try:
            return self._seen()
        except Exception as error:
            return Seen(self._kind, f"{type(error).__name__}: {error}", self._classes, {}, (), 0)

    def _seen(self) -> Seen:
        pairs: dict[tuple[int, int], int] = {}
        errors: list[Error] = []
        ignored = 0
        worst = self._pictures.settings["worst"] if self._pictures.settings else 0
        for first, labels, figures in self._readings:
            truth, guess = labels.cpu().numpy()
            order, sure = figures.cpu().double().numpy()
            known = (truth >= 0) & (truth < self._classes)
            ignored += int((~known).sum())
            found, counts = np.unique(np.stack((truth[known], guess[known])), axis=1, return_counts=True)
            for pair, count in zip(found.T.tolist(), counts.tolist(), strict=True):
                pairs[pair[0], pair[1]] = pairs.get((pair[0], pair[1]), 0) + count
            wrong = np.argwhere(known & (truth != guess))
            worst_first = np.argsort(order[tuple(wrong.T)], kind="stable")
            for sample, place in wrong[worst_first[:worst]].tolist():
                at = (sample, place)
                labels_at = int(truth[at]), int(guess[at])
                which = place if truth.shape[1] > 1 else -1
                errors.append(Error(float(order[at]), first + sample, which, *labels_at, float(sure[at])))
            errors = sorted(errors)[:worst]
        return Seen(self._kind, self._problem, self._classes, pairs, errors, ignored)

    def draw(self, seen: Sequence[Seen], module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        """Draw, write and journal the pictures; on the main rank alone, without any other.

        Args:
            seen: Of every rank.
            module: The model in its evaluation mode.
            forward: `forward(module, batch)[2]` is the outcome.
        """
        try:
            if problem := next((rank.problem for rank in seen if rank.problem), ""):
                raise RuntimeError(problem)
            if seen[0].kind == "dense":  # the main rank has the first batch
                self._draw_panels(getattr(module, "_orig_mod", module), forward)  # compiling for one sample takes long
            elif seen[0].kind == "classes":
                self._draw_classes(seen)
            self._pictures.prune()
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self._pictures.warn(type(error), text[:300], self._note)

    def _draw_panels(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        for index in self._pictures.samples:
            outcome = forward(module, self._batch_of(index))[2]
            image, output, target = (_array(part) for part in (outcome.inputs, outcome.output, outcome.target))
            assert output is not None and target is not None
            found = panel(image, target, output)
            title = "   ".join((f"sample {index}", f"step {self._step}", source_of(self._dataset, index)))
            drawn = sheet(title.rstrip(), found.rows, found.legend, found.notes)
            self._keep(f"sample-{index}", drawn, {"sample": str(index)})

    def _draw_classes(self, seen: Sequence[Seen]) -> None:
        settings = self._pictures.settings
        assert settings is not None
        pairs: dict[tuple[int, int], int] = {}
        for rank in seen:
            for pair, count in rank.pairs.items():
                pairs[pair] = pairs.get(pair, 0) + count
        classes = max(rank.classes for rank in seen)
        counts, names, note = counted(pairs, classes)
        total = sum(pairs.values())
        right = sum(count for (truth, guess), count in pairs.items() if truth == guess)
        ignored = sum(rank.ignored for rank in seen)
        notes = [note, f"{ignored} ignored" if ignored else ""]
        title = f"step {self._step}   {right} of {total} right" + (f" ({right / total:.1%})" if total else "")
        facts = {"counts": str(counts.tolist()), "classes": " ".join(names)}
        self._keep("confusion", matrix(title, counts, names, [*filter(None, notes)]), facts)
        if settings["worst"]:
            errors = sorted(error for rank in seen for error in rank.errors)[: settings["worst"]]
            self._keep(
                "worst", self._worst(errors, total - right), {"samples": str([error.sample for error in errors])}
            )

    def _worst(self, errors: Sequence[Error], wrong: int) -> Any:
        tiles = [Tile(_caption(error), self._small_image(error)) for error in errors]
        rows = [tiles[first : first + _WORST_COLUMNS] for first in range(0, len(tiles), _WORST_COLUMNS)]
        title = f"step {self._step}   the worst {len(errors)} of {wrong} errors" if errors else f"step {self._step}"
        return sheet(title, rows, notes=[] if errors else ["no errors"])

    def _small_image(self, error: Error) -> np.ndarray | None:
        """The sample's image in a tile's size; None where it is none, or one of several objects."""
        image = _array(self._input_of(error.sample))
        if image is None or image.ndim not in (3, 4) or len(image) > 4 or error.place >= 0:
            return None
        if image.ndim == 4:
            image = image[:, image.shape[1] // 2]
        image = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
        step = -(-max(image.shape[:2]) // _WORST_SIDE)
        image = image[::step, ::step]
        times = max(1, _WORST_SIDE // max(image.shape[:2]))
        return gray(image, *extent(image)).repeat(times, axis=0).repeat(times, axis=1)

    @property
    def _dataset(self) -> Any:
        return self._pictures.loader.dataset.dataset

    def _batch_of(self, index: int) -> Any:
        """One sample, collated and seeded as in the validation: (epoch, index) is what the loader asks for."""
        return self._pictures.loader.dataset.__getitems__([0, index])

    def _input_of(self, index: int) -> Any:
        return split(self._batch_of(index), *self._pictures.keys)[0]

    def _keep(self, name: str, image: Any, facts: Mapping[str, str]) -> None:
        path = self._pictures.folder / f"step-{self._step:08d}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, png(image, {"step": str(self._step), **facts}), durable=True)
        self._journal.image(str(path.relative_to(self._pictures.folder.parent)), f"val/{name}", self._step)


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are.

    Raises:
        ValueError: A number is out of range.
    """
    for key, least in {"worst": 0, "every_validations": 1, "keep_last": 1}.items():
        if settings[key] < least:
            raise ValueError(f"{key} must be at least {least}, found {settings[key]}")
    return settings


def chosen(samples: int | list[int], size: int) -> list[int]:
    """The indices of the samples that are drawn: those given, or so many, spread evenly.

    Raises:
        ValueError: There is no such sample.
    """
    if isinstance(samples, int):
        if samples < 0:
            raise ValueError(f"samples must be at least 0, found {samples}")
        count = min(samples, size)
        return [(2 * number + 1) * size // (2 * count) for number in range(count)]
    if wrong := [index for index in samples if not 0 <= index < size]:
        raise ValueError(f"samples: there is no {wrong[0]} in the validation data; possible: 0 to {size - 1}")
    return list(samples)


def kind_of(output: Any, target: Any) -> str:
    """dense, classes, or '' for what has no picture."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return ""
    if output.ndim in (4, 5) and target.ndim >= 3:
        return "dense"
    whole = not (target.is_floating_point() or target.is_complex())
    places = output.shape[2:]
    fits = target.shape in ((len(output), *places), (len(output), 1, *places))
    return "classes" if whole and output.ndim in (2, 3) and output.shape[1] > 1 and fits else ""


def _reading(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one batch (truth, guess) and (minus the loss, the guess's probability): each (2, N, K) on the device."""
    scores = output.detach().float().reshape(len(output), output.shape[1], -1).log_softmax(1)
    truth = target.reshape(len(target), -1).long()
    highest, guess = scores.max(1)
    of_truth = scores.gather(1, truth.clamp(0, output.shape[1] - 1)[:, None])[:, 0]
    order = of_truth.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    return torch.stack((truth, guess)), torch.stack((order, highest.exp()))


def counted(pairs: Mapping[tuple[int, int], int], classes: int) -> tuple[np.ndarray, list[str], str]:
    """A matrix (K, K) of counts, names of its rows, and a note.

    Of more classes than can be read, those with the most errors have a row of their own, the others one together.
    """
    if classes <= _MOST_CLASSES:
        shown, note = list(range(classes)), ""
    else:
        errors = [0] * classes
        for (truth, guess), count in pairs.items():
            if truth != guess:
                errors[truth] += count
                errors[guess] += count
        worst = sorted(range(classes), key=lambda number: (-errors[number], number))
        shown = sorted(worst[: _MOST_CLASSES - 1])
        note = f"the {len(shown)} classes with the most errors; the other {classes - len(shown)} as one class"
    row = {number: place for place, number in enumerate(shown)}
    counts = np.zeros((len(shown) + bool(note),) * 2, dtype=np.int64)
    for (truth, guess), count in pairs.items():
        counts[row.get(truth, len(shown)), row.get(guess, len(shown))] += count
    return counts, [*map(str, shown), *(["other"] if note else [])], note


def source_of(dataset: Any, index: int) -> str:
    """The file that a sample is of, and the region in it; '' where the dataset does not say."""
    while not (hasattr(dataset, "places") and hasattr(dataset, "volumes")):
        if isinstance(dataset, Subset):
            index = int(dataset.indices[index])
        inner = getattr(dataset, "source", getattr(dataset, "dataset", None))
        if inner is None or inner is dataset:
            return ""
        dataset = inner
    number, region = dataset.places[index]
    ranges = ", ".join(f"{part.start}:{part.stop}" for part in region)
    return f"{dataset.volumes[number].path.name} [{ranges}]"


def _caption(error: Error) -> str:
    place = f", object {error.place}" if error.place >= 0 else ""
    return f"sample {error.sample}{place}\ntrue {error.truth}, predicted {error.guess}\np {error.sure:.2f}"


def _array(value: Any) -> np.ndarray | None:
    """The main tensor of an input, output or target, of its first sample; None where there is none."""
    value = main_output(value)
    if not isinstance(value, torch.Tensor):
        return None
    value = value.detach()[0]
    return (value.float() if value.is_floating_point() else value).cpu().numpy()
