"""Where one rank writes predictions: parts, whole files, the notes beside them; knows no model and no config.

The unit of work is a slab, a range of planes of a volume. What is in it comes from all patches that touch it, so it
does not depend on who predicts it, or after how many interruptions.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtrain.config.errors import ConfigError
from dtrain.distributed.ranks import Ranks
from dtrain.predict.formats import ENDINGS, Format, Sheet, write
from dtrain.predict.predictor import Predictor
from dtrain.predict.segmentation import Agreement, instances
from dtrain.predict.stitching import READING, Network, Run, Source, Volume
from dtrain.predict.work_folder import Folder, cut, digest, facts_of, read_parts, write_part

SLAB_VOXELS = 1 << 22  # of a part: what an interruption can cost
IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

Slab = tuple[int, int]


class PredictionError(RuntimeError):
    """A file of predictions cannot be written; the message is for a person."""


class Work(NamedTuple):
    """One rank's surroundings.

    Attributes:
        network: What predicts, without its activation.
        ranks: Who shares the work.
        progress: What a person sees.
        stop: Whether to stop; asked after each batch.
        identity: What a prediction depends on besides the predictor's settings and the file that is read: the weights'
            digest and the like.
    """

    network: Network
    ranks: Ranks
    progress: Any
    stop: Callable[[], bool]
    identity: Mapping[str, Any]


class Result(NamedTuple):
    """How a prediction ended.

    Attributes:
        files: All files, those included that were there before.
        made: How many of them this start has made.
        stopped: Whether it was asked to stop; it goes on at the next start.
        scores: Of each file with a label, by the file's name, one figure per class.
        metric: Which figures.
    """

    files: list[Path]
    made: int
    stopped: bool
    scores: dict[str, list[float]]
    metric: str = ""


@dataclass(frozen=True)
class Task:
    """One volume's file and what is still to be predicted of it."""

    volume: int
    file: Path
    stamp: dict[str, Any]
    slabs: list[Slab]
    missing: list[Slab]


class Desk:
    """Where one rank writes: parts, whole files, and the notes beside them."""

    def __init__(self, predictor: Predictor, source: Source, folder: Folder, work: Work, overwrite: bool) -> None:
        self.predictor, self.source = predictor, source
        self.folder, self.work, self.overwrite = folder, work, overwrite
        self.done: set[int] = set()  # volumes whose files are finished
        self.before = 0  # how many of them were before

    def open(self, held: contextlib.ExitStack) -> list[Task]:
        """Lock the folder and see what is to be done; the main rank alone.

        Raises:
            ConfigError: A file was made with something else, or the folder cannot be written.
        """
        held.enter_context(self.folder.opened())
        tasks, foreign = [], []
        for number, volume in enumerate(self.source.volumes):
            self._check_label(volume)
            file = self.folder.file(volume.name.replace(os.sep, "-"), ENDINGS[self._format(volume)])
            stamp = self._stamp(number)
            grid = self.source.grids[number]
            plane = max(1, prod(volume.shape[1:]))
            slabs = grid.slabs(self.predictor.slab_planes or max(1, SLAB_VOXELS // plane))
            differs = self.folder.difference(file, stamp)
            if differs and not self.overwrite:
                foreign.append(f"{file.name} ({differs})")
            self.folder.clear_foreign_parts(file, stamp)
            missing = [slab for slab in slabs if not self.folder.part(file, stamp, *slab).exists()]
            tasks.append(Task(number, file, stamp, slabs, [] if differs == "" else missing))
            if differs == "":
                self.done.add(number)
        self.before = len(self.done)
        if foreign:
            names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise ConfigError(
                f"{self.folder.path} holds predictions made otherwise: {names}; --overwrite makes them anew, "
                "--output-dir writes elsewhere"
            )
        return tasks

    def _format(self, volume: Volume) -> Format:
        labels, wish = self.predictor.choice.labels, self.predictor.format
        name = volume.path.name.lower()
        if wish is None:
            wish = "nifti" if name.endswith((".nii", ".nii.gz")) else "hdf5"
            wish = "png" if labels and len(volume.shape) == 2 and name.endswith(IMAGES) else wish
        if wish == "csv":
            raise ConfigError(f"predictor.format: csv is for single predictions, {volume.path} is a volume")
        if wish == "png" and prod(volume.shape) != prod(volume.shape[-2:]):
            raise ConfigError(
                f"predictor.format: png holds one plane, {volume.path} is {volume.shape}; possible: hdf5, tiff, npy"
            )
        return wish

    def _check_label(self, volume: Volume) -> None:
        if self.predictor.performance_metric and not self.predictor.gt_internal_path and not volume.has_label:
            raise ConfigError(
                f"predictor.performance_metric: {volume.path} is read without labels; "
                "name their dataset: predictor.gt_internal_path"
            )

    def _stamp(self, number: int) -> dict[str, Any]:
        """What a volume's prediction depends on; two alike give the same file."""
        predictor, volume, grid = self.predictor, self.source.volumes[number], self.source.grids[number]
        settings = {
            "input": [volume.name, facts_of(volume.path)],
            "patches": [grid.shape, grid.patch, grid.starts, self.source.halos[number], predictor.blend],
            "activation": predictor.activation,
            "what is kept": list(predictor.choice),
            "instances": [predictor.connectivity, predictor.min_size] if predictor.choice.instances else None,
            "file": [predictor.output_dataset, predictor.compression, predictor.dtype],
            "performance_metric": [predictor.performance_metric, predictor.gt_internal_path],
        }
        return {**self.work.identity, **{key: digest(value) for key, value in settings.items()}}

    def take(
        self, tasks: Sequence[Task], run: Run, slabs: list[Slab], planes: Iterator[tuple[int, np.ndarray]]
    ) -> None:
        """Write what was predicted in one run: a whole file, or parts of one."""
        task = tasks[run.volume]
        kept = ((low, self.predictor.choice.of(chunk)) for low, chunk in planes)
        with told(task.file):
            if len(task.slabs) == 1:
                self._write(task, (chunk for _, chunk in kept))
                return
            for slab, chunks in zip(slabs, cut(kept, slabs), strict=True):
                write_part(self.folder.part(task.file, task.stamp, *slab), chunks, slab[1] - slab[0])
            if task.missing == slabs:  # nobody else has any of it
                self._join(task)

    def join_rest(self, tasks: Sequence[Task], stopped: bool) -> bool:
        """Put together what several ranks have predicted; whether any of them was stopped."""
        ranks = self.work.ranks
        everybody = ranks.gather((stopped, self.done))
        waiting: list[int] | None = None
        if everybody is not None:
            stopped = any(rank[0] for rank in everybody)
            self.done = set().union(*(rank[1] for rank in everybody))
            waiting = [task.volume for task in tasks if task.volume not in self.done and self._is_whole(task)]
        stopped, waiting = ranks.broadcast((stopped, waiting))
        assert waiting is not None
        for number in waiting[ranks.rank :: ranks.world_size]:
            if self.work.stop():
                break
            with told(tasks[number].file):
                self._join(tasks[number])
        everybody = ranks.gather((self.work.stop(), self.done))
        if everybody is not None:
            self.done = set().union(*(rank[1] for rank in everybody))
            stopped = len(self.done) < len(tasks)
        return bool(ranks.broadcast(stopped))

    def _parts(self, task: Task) -> list[Path]:
        return [self.folder.part(task.file, task.stamp, *slab) for slab in task.slabs]

    def _is_whole(self, task: Task) -> bool:
        return len(task.slabs) > 1 and all(part.exists() for part in self._parts(task))

    def _join(self, task: Task) -> None:
        self._write(task, read_parts(self._parts(task)))
        self.folder.clear_parts(task.file)

    def _write(self, task: Task, chunks: Iterator[np.ndarray]) -> None:
        """The file of a volume, from all its planes."""
        predictor, volume = self.predictor, self.source.volumes[task.volume]
        agreement = None
        if predictor.performance_metric:
            agreement = Agreement(predictor.performance_metric, predictor.choice)
            chunks = self._compared(agreement, volume, chunks)
        if predictor.choice.instances:
            scratch = self.folder.scratch(task.file)
            chunks = instances(chunks, volume.shape[0], predictor.connectivity, predictor.min_size, scratch)
        labels = predictor.choice.labels
        sheet = Sheet(
            volume.shape, not labels, predictor.dtype, predictor.output_dataset, predictor.compression, volume.path
        )

        def written(file: Path) -> None:
            scores = {"scores": agreement.values()} if agreement else {}
            self.folder.note(task.file, file, task.stamp, scores)

        write(task.file, self._format(volume), chunks, sheet, written)
        self.done.add(task.volume)

    def _compared(self, agreement: Agreement, volume: Volume, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        low = 0
        for chunk in chunks:
            agreement.add(chunk, self._truth(volume, low, low + len(chunk)))
            low += len(chunk)
            yield chunk

    def _truth(self, volume: Volume, low: int, high: int) -> np.ndarray:
        """The label of some planes, as it is stored."""
        region = (slice(low, high), *(slice(0, extent) for extent in volume.shape[1:]))
        with READING:
            if self.predictor.gt_internal_path:
                import h5py

                with h5py.File(volume.path, "r") as file:
                    truth = file[self.predictor.gt_internal_path]
                    return np.asarray(truth[(..., *region)])
            return volume.read_label(region)

    def result(self, tasks: Sequence[Task], stopped: bool) -> Result:
        """What there is at the end."""
        facts = {task.file: self.folder.facts(task.file) for task in tasks if task.file.exists()}
        scores = {file.name: fact["scores"] for file, fact in facts.items() if fact.get("scores")}
        return Result(
            list(facts), len(self.done) - self.before, stopped, scores, self.predictor.performance_metric or ""
        )


def agreed(ranks: Ranks, decide: Callable[[], Any]) -> Any:
    """What the main rank decides, told to all; its refusal, too."""
    found: Any = None
    if ranks.is_main:
        try:
            found = decide()
        except ConfigError as error:
            found = str(error)
    found = ranks.broadcast(found)
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def dealt(tasks: Sequence[Task], source: Source, ranks: Ranks) -> dict[Run, list[Slab]]:
    """This rank's runs with their slabs: a contiguous share of all that is missing, about as costly as the others'."""
    cells = []
    for task in tasks:
        grid, halo = source.grids[task.volume], source.halos[task.volume]
        each = prod(length + 2 * around for length, around in zip(grid.patch, halo, strict=True))
        cells += [(task.volume, slab, len(grid.touching(*slab)) * each) for slab in task.missing]
    total, before = sum(cost for *_, cost in cells), 0
    own = []
    for volume, slab, cost in cells:
        if (2 * before + cost) * ranks.world_size // (2 * total) == ranks.rank:
            own.append((volume, slab))
        before += cost
    runs: dict[Run, list[Slab]] = {}
    for volume, items in groupby(own, key=lambda item: item[0]):
        together: list[Slab] = []
        for _, slab in items:
            if together and together[-1][1] != slab[0]:
                runs[Run(volume, together[0][0], together[-1][1])] = together
                together = []
            together.append(slab)
        runs[Run(volume, together[0][0], together[-1][1])] = together
    return runs


@contextlib.contextmanager
def told(file: Path) -> Iterator[None]:
    """A failed write as one sentence."""
    try:
        yield
    except OSError as error:
        raise PredictionError(
            f"{file} was not written: {error.strerror or error}; nothing of it is left. "
            "What is finished stays, and the next start goes on from there."
        ) from error
