"""The pictures of a validation: of which validations, samples and batches they are, and where the files go.

A dense task (outputs (N, C, H, W) or (N, C, D, H, W)) gets a panel for each of a few samples, always the same ones.
A classification (outputs (N, C) or (N, C, K), integer targets) gets its worst errors and a confusion matrix, of all
samples. Whatever goes wrong here costs one line, never the training.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from dtrain.data.batch import TargetKey, main_output, split
from dtrain.data.heads import main_pair
from dtrain.reporting import png_drawing
from dtrain.reporting.classification_errors import Error, Errors, confusion_matrix, errors_of, read, together
from dtrain.reporting.picture_time import PictureTime
from dtrain.reporting.png_drawing import Tile, extent, gray, matrix, png, sheet
from dtrain.reporting.sample_panel import enlarged, panel
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import write_bytes

_TILE_SIDE, _TILE_COLUMNS = 120, 4  # of the worst errors


def picture_settings(
    *, samples: int | list[int] = 4, worst: int = 16, every_validations: int | None = None, keep_last: int = 100
) -> dict[str, Any]:
    """The keys under `trainer.pictures`.

    Args:
        samples: Of a dense task: how many validation samples are drawn, spread evenly, or their indices.
        worst: Of a classification: how many of the worst errors are drawn.
        every_validations: Draw at every so many validations of a start, the first one included. Default: chosen by
            time, so that pictures take at most 2 % of it; the first one and a training's last one are drawn.
        keep_last: Newest validations whose pictures stay in the run folder; MLflow keeps all.
    """
    return dict(locals())


class Seen(NamedTuple):
    """What one rank saw of the validation, in plain types."""

    kind: str  # dense, classes or '' (nothing that can be drawn)
    problem: str
    classes: int  # C
    errors: Errors


class Pictures:
    """Draws for the validations of a training: nothing where `settings` are None.

    The loader is the validation's: its dataset is asked for single samples, seeded as the loader seeds them. `keys` are
    those of input and target in a batch that is a dict; see `batch.split`. `name` is that of the data set: of one of
    several, `val/near`, the files' names begin with its label. `time` decides which validations are drawn, where the
    settings do not; all sets have the same.

    Raises:
        ValueError: A number is out of range, or the validation data have no such sample.
    """

    def __init__(
        self,
        loader: Any,
        folder: Path,
        settings: Mapping[str, Any] | None,
        keys: tuple[str | None, TargetKey] = (None, None),
        name: str = "val",
        time: PictureTime | None = None,
    ) -> None:
        self.loader, self.folder, self.keys, self.name = loader, RunFolder(folder).pictures, keys, name
        self.time = time or PictureTime()
        self._validations, self.is_drawn = 0, False  # the last one
        self._warned_of: set[type] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._drawing: Future[None] | None = None  # of the last validation
        self.settings = {} if loader is None or settings is None else picture_settings(**settings)
        if self.settings:
            for key, least in {"worst": 0, "every_validations": 1, "keep_last": 1}.items():
                if self.settings[key] is not None and self.settings[key] < least:
                    raise ValueError(f"{key} must be at least {least}, found {self.settings[key]}")
            self.samples = chosen(self.settings["samples"], len(loader.dataset))

    def album(self, step: int, journal: Any, note: Callable[[str], None], is_last: bool = False) -> "Album | None":
        """What takes in one validation, after so many optimizer steps; None where it is not to be drawn.

        `is_last`: the training ends with it. All ranks call it, and get the same.
        """
        if not self.settings:
            return None
        self._validations += 1
        if every := self.settings["every_validations"]:
            self.is_drawn = (self._validations - 1) % every == 0
        else:
            was_told = self.time.left_out
            self.is_drawn = self.time.allows(step, is_last)
            if self.time.left_out != was_told:
                note(self.time.left_out)
        return Album(self, step, journal, note) if self.is_drawn else None

    def draw(self, pictures: Callable[[], None]) -> None:
        """Have the pictures of one validation drawn beside what follows, once those of the one before are."""
        self.finish()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._drawing = self._thread.submit(self.time.in_thread(pictures))

    def finish(self) -> None:
        """Wait for what is being drawn."""
        if self._drawing is not None:
            self._drawing.result()
            self._drawing = None

    def warn(self, error: Exception, note: Callable[[str], None]) -> None:
        """Say what went wrong; of one kind of error once, not at each validation."""
        if type(error) not in self._warned_of:
            self._warned_of.add(type(error))
            text = " ".join(str(error).split()) or type(error).__name__
            note(f"warning: no pictures of the validation: {text[:300]} (trainer.pictures=false draws none)")


class Album:
    """The pictures of one validation: `see` each batch, bring all ranks' `seen` together, `draw` on the main rank."""

    def __init__(self, pictures: Pictures, step: int, journal: Any, note: Callable[[str], None]) -> None:
        self._pictures, self._step, self._journal, self._note = pictures, step, journal, note
        self._most_errors = pictures.settings["worst"]
        self._kind, self._problem = "", ""
        self._classes = 0
        # First sample (-1: rows and samples are not the same), from `read`.
        self._batches: list[tuple[int, tuple[torch.Tensor, torch.Tensor]]] = []

    def see(self, outcome: Any, number: int, samples: int) -> None:
        """Take in what the model made of one batch of so many samples, numbered over all ranks.

        Nothing waits for the device. Where the output has other rows than the samples that were dealt, they are counted
        as they are, and no row is taken for one of the samples.
        """
        if self._problem or self._kind == "dense":
            return
        with self._pictures.time.spent_by_loop():
            self._see(outcome, number, samples)

    def _see(self, outcome: Any, number: int, samples: int) -> None:
        try:
            output, target = pair_to_draw(outcome)
            self._kind = kind_of(output, target)
            loader = self._pictures.loader
            first = number * loader.batch_sampler.batch_size
            dealt = min(loader.batch_sampler.batch_size, len(loader.dataset) - first)
            if self._kind == "dense" and len(output) != samples:  # its first axis is another
                self._kind = ""
            if self._kind == "classes":
                self._classes = output.shape[1]
                known = len(output) == samples == dealt
                self._batches.append((first if known else -1, read(output, target)))
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"

    def seen(self) -> Seen:
        """What this rank saw, for the main rank; without waiting for any other."""
        with self._pictures.time.spent_by_loop():
            return self._seen()

    def _seen(self) -> Seen:
        errors: list[Errors] = []
        try:
            counts = [self._most_errors if first >= 0 else 0 for first, _ in self._batches]
            errors = [
                errors_of(batch, first, self._classes, most)
                for (first, batch), most in zip(self._batches, counts, strict=True)
            ]
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
        return Seen(self._kind, self._problem, self._classes, together(errors, self._most_errors))

    def draw(self, seen: Sequence[Seen], module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        """Draw, write and journal the pictures of what every rank has seen; on the main rank alone.

        The module is in its evaluation mode; `forward(module, batch)[2]` is the outcome. They are done when
        `Pictures.finish` returns.
        """
        with self._pictures.time.spent_by_loop():
            self._pictures.draw(partial(self._draw_all, self._works(seen, module, forward)))

    def _works(
        self, seen: Sequence[Seen], module: torch.nn.Module, forward: Callable[..., Any]
    ) -> list[Callable[[], None]]:
        """What draws each picture, with all that it needs."""
        works: list[Callable[[], None]] = []
        try:
            if problem := next((rank.problem for rank in seen if rank.problem), ""):
                raise RuntimeError(problem)
            png_drawing.prepare()  # a loader worker may be forked while the thread draws: nothing is imported then
            if seen[0].kind == "dense":  # the main rank has the first batch
                works = self._panels(getattr(module, "_orig_mod", module), forward)  # compiling for a sample takes long
            elif seen[0].kind == "classes":
                errors = together([rank.errors for rank in seen], self._most_errors)
                works = [partial(self._draw_confusion, errors, max(rank.classes for rank in seen))]
                if self._most_errors and (errors.worst or not _wrong(errors)):
                    works.append(self._worst(errors))
        except Exception as error:
            self._pictures.warn(error, self._note)
        return works

    def _draw_all(self, works: list[Callable[[], None]]) -> None:
        try:
            while works:
                works.pop(0)()  # what it held is free again
            for old in sorted(self._pictures.folder.glob("step-*"))[: -self._pictures.settings["keep_last"]]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            self._pictures.warn(error, self._note)

    def _panels(self, module: torch.nn.Module, forward: Callable[..., Any]) -> list[Callable[[], None]]:
        """What draws a panel of each sample."""
        works: list[Callable[[], None]] = []
        for index in self._pictures.samples:
            if (batch := self._batch_of(index)) is not None:
                outcome = forward(module, batch)[2]
                output, target = map(_first_of, pair_to_draw(outcome))
                assert output is not None and target is not None
                works.append(partial(self._draw_panel, index, _first_of(outcome.inputs), target, output))
        return works

    def _draw_panel(self, index: int, image: np.ndarray | None, target: np.ndarray, output: np.ndarray) -> None:
        shown = panel(image, target, output)
        source = source_of(self._pictures.loader.dataset.dataset, index)
        title = "   ".join((f"sample {index}", f"step {self._step}", source)).rstrip()
        self._keep(f"sample-{index}", sheet(title, shown.rows, shown.legend, shown.notes), {"sample": str(index)})

    def _draw_confusion(self, errors: Errors, classes: int) -> None:
        counts, names, note = confusion_matrix(errors.pairs, classes)
        total, wrong = sum(errors.pairs.values()), _wrong(errors)
        title = f"step {self._step}   {total - wrong} of {total} right"
        title += f" ({(total - wrong) / total:.1%})" if total else ""
        notes = [note, f"{errors.ignored} ignored" if errors.ignored else ""]
        facts = {"counts": str(counts.tolist()), "classes": " ".join(names)}
        self._keep("confusion", matrix(title, counts, names, [*filter(None, notes)]), facts)

    def _worst(self, errors: Errors) -> Callable[[], None]:
        """What draws the worst errors."""
        tiles = [Tile(_caption(error), self._small_image(error)) for error in errors.worst]
        rows = [tiles[first : first + _TILE_COLUMNS] for first in range(0, len(tiles), _TILE_COLUMNS)]
        title = f"step {self._step}"
        title += f"   the worst {len(tiles)} of {_wrong(errors)} errors" if tiles else ""
        facts = {"samples": str([error.sample for error in errors.worst])}
        return lambda: self._keep("worst", sheet(title, rows, notes=[] if tiles else ["no errors"]), facts)

    def _small_image(self, error: Error) -> np.ndarray | None:
        """The sample's image in a tile's size; None where it is none, or one of several objects."""
        image = _first_of(split(self._batch_of(error.sample), *self._pictures.keys)[0])
        if image is None or image.ndim not in (3, 4) or len(image) > 4 or error.place >= 0:
            return None
        if image.ndim == 4:
            image = image[:, image.shape[1] // 2]
        image = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
        step = -(-max(image.shape[:2]) // _TILE_SIDE)
        image = image[::step, ::step]
        return enlarged(gray(image, *extent(image)), max(1, _TILE_SIDE // max(image.shape[:2])))

    def _batch_of(self, index: int) -> Any:
        """One sample, collated and seeded as in the validation; None where the collate function leaves it out."""
        return self._pictures.loader.dataset.batch(0, index)

    def _keep(self, name: str, image: Any, facts: Mapping[str, str]) -> None:
        label = self._pictures.name.removeprefix("val").removeprefix("/")
        path = self._pictures.folder / f"step-{self._step:08d}" / f"{label}{'-' if label else ''}{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, png(image, {"step": str(self._step), **facts}), durable=True)
        self._journal.image(
            str(path.relative_to(self._pictures.folder.parent)), f"{self._pictures.name}/{name}", self._step
        )


def chosen(samples: int | list[int], size: int) -> list[int]:
    """The indices to draw: those given, or so many, spread evenly; a ValueError names one that is not there."""
    if isinstance(samples, int):
        if samples < 0:
            raise ValueError(f"samples must be at least 0, found {samples}")
        count = min(samples, size)
        return [(2 * number + 1) * size // (2 * count) for number in range(count)]
    if wrong := [index for index in samples if not 0 <= index < size]:
        raise ValueError(f"samples: the validation data have no sample {wrong[0]}; possible: 0 to {size - 1}")
    return list(samples)


def kind_of(output: Any, target: Any) -> str:
    """dense, classes, or '' for what has no picture."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return ""
    if output.ndim in (4, 5) and target.ndim >= 3:
        return "dense"
    if output.ndim not in (2, 3) or output.shape[1] < 2 or target.is_floating_point() or target.is_complex():
        return ""
    objects = output.shape[2:]
    return "classes" if target.shape in ((len(output), *objects), (len(output), 1, *objects)) else ""


def pair_to_draw(outcome: Any) -> tuple[Any, Any]:
    """The output and the target that belong together; of several heads the first that has a picture."""
    try:
        return main_pair(outcome.output, outcome.target)
    except ValueError:
        for key in outcome.output if isinstance(outcome.output, Mapping) else ():
            if isinstance(outcome.target, Mapping) and key in outcome.target:
                pair = main_pair(outcome.output, outcome.target, key)
                if kind_of(*pair):
                    return pair
        raise


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


def _wrong(errors: Errors) -> int:
    return sum(count for (truth, guess), count in errors.pairs.items() if truth != guess)


def _caption(error: Error) -> str:
    place = f", object {error.place}" if error.place >= 0 else ""
    labels = f"true {error.truth}, predicted {error.guess}"
    return f"sample {error.sample}{place}\n{labels}\np {error.probability:.2f}"


def _first_of(value: Any) -> np.ndarray | None:
    """The main tensor of an input, output or target, of its first sample; None where there is none."""
    value = main_output(value)
    if not isinstance(value, torch.Tensor):
        return None
    value = value.detach()[0]
    value = value.float() if value.is_floating_point() else value
    return value.to("cpu", copy=True).numpy()  # the next step may write into what a dataset or a model keeps
