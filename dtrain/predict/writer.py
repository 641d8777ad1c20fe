"""Writes what a rank has predicted of volumes: parts, whole files, and how well they agree with labels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.predict.formats import write
from dtrain.predict.inference import Inference, Result
from dtrain.predict.members import Members
from dtrain.predict.plan import Slab, Task
from dtrain.predict.segmentation import Agreement, instances
from dtrain.predict.source import READING, Source, Volume
from dtrain.predict.stitching import Run
from dtrain.predict.work_folder import explained, read_parts, write_part


class VolumeWriter:
    """Writes volumes of which each rank predicts some slabs; there is a task for each, the same on all ranks."""

    def __init__(self, inference: Inference, source: Source, tasks: Sequence[Task], members: Members) -> None:
        self.inference, self.source, self.tasks, self.members = inference, source, tasks, members
        self.predictor, self.ranks = inference.predictor, inference.ranks
        self.finished = {task.volume for task in tasks if task.is_finished}

    def write_run(self, run: Run, slabs: list[Slab], planes: Iterator[tuple[int, np.ndarray]], member: int = 0) -> None:
        """Write what one member has predicted in one run of slabs, a whole file or parts of one.

        `planes` are positions of the first plane, and logits (K, planes, ...). Of several members the probabilities are
        added up in parts of their own, from which the last one makes the mean.

        Raises:
            PredictionError: A file cannot be written.
        """
        task = self.tasks[run.volume]
        if len(self.members.of(run.volume)) > 1:
            self._add_run(task, slabs, planes, member)
            return
        kept = ((low, self._kept(logits)) for low, logits in planes)
        if len(task.slabs) == 1:
            self._write(task, (chunk for _, chunk in kept))
            return
        with explained(task.file.path):
            for slab, chunks in zip(slabs, cut(kept, slabs), strict=True):
                write_part(task.file.part(*slab), chunks, slab[1] - slab[0])
        if task.missing == slabs:  # no other rank has any of it
            self._write(task, read_parts(task.parts))

    def _kept(self, logits: np.ndarray) -> np.ndarray:
        """What is kept of (K, planes, ...), planes first. A test of whole volumes blends logits as well."""
        return self.predictor.choice.of(self._probabilities(logits))

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        return self.predictor.activated(torch.from_numpy(logits)[None])[0].numpy()

    def _add_run(self, task: Task, slabs: list[Slab], planes: Iterator[tuple[int, np.ndarray]], member: int) -> None:
        """Add a member's probabilities of some slabs to those of the members before it."""
        own = self.members.of(task.volume)
        before, is_last = own[: own.index(member)], member == own[-1]
        probabilities = ((low, np.swapaxes(self._probabilities(logits), 0, 1)) for low, logits in planes)
        with explained(task.file.path):
            for slab, chunks in zip(slabs, cut(probabilities, slabs), strict=True):
                target, earlier = task.file.part(*slab), None
                if before:
                    earlier = task.sum_of(slab, before[-1])
                    chunks = added(chunks, earlier)
                if is_last:
                    chunks = (self.predictor.choice.of(np.swapaxes(sums / len(own), 0, 1)) for sums in chunks)
                else:
                    target = task.sum_of(slab, member)
                write_part(target, chunks, slab[1] - slab[0])
                if earlier is not None:
                    earlier.unlink()
        if is_last and all(part.exists() for part in task.parts) and len(slabs) == len(task.slabs):
            self._write(task, read_parts(task.parts))

    def join_rest(self) -> bool:
        """Join what several ranks have predicted of a volume; true if some is left to the next start. All call it."""
        self._gather_finished()
        whole: list[int] = []
        if self.ranks.is_main:
            unfinished = [task for task in self.tasks if task.volume not in self.finished]
            whole = [task.volume for task in unfinished if all(part.exists() for part in task.parts)]
        for number in self.ranks.broadcast(whole)[self.ranks.rank :: self.ranks.world_size]:
            if self.inference.asked_to_stop():
                break
            self._write(self.tasks[number], read_parts(self.tasks[number].parts))
        self._gather_finished()
        return bool(self.ranks.broadcast(len(self.finished) < len(self.tasks)))

    def _gather_finished(self) -> None:
        """Let the main rank know what all have finished."""
        self.finished = self.finished.union(*(self.ranks.gather(self.finished) or ()))

    def _write(self, task: Task, chunks: Iterator[np.ndarray]) -> None:
        """Write the file of a volume, from all its planes as they are kept."""
        predictor, volume = self.predictor, self.source.volumes[task.volume]
        agreement = None
        if predictor.performance_metric:
            agreement = Agreement(predictor.performance_metric, predictor.choice)
            chunks = self._compared(agreement, volume, chunks)
        if predictor.choice.instances:
            chunks = instances(chunks, predictor.connectivity, predictor.min_size, task.file.scratch)
        spec = predictor.file_spec(task.file.path, volume.shape, not predictor.choice.labels, volume.path)
        spec = spec._replace(space=space_of(volume))
        with task.file.replaced() as temporary:
            write(temporary, task.format, chunks, spec)
            task.file.note(temporary, {"scores": agreement.values()} if agreement else {})
        self.finished.add(task.volume)

    def _compared(self, agreement: Agreement, volume: Volume, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        low = 0
        for chunk in chunks:
            agreement.add(chunk, self._stored_label(volume, low, low + len(chunk)))
            low += len(chunk)
            yield chunk

    def _stored_label(self, volume: Volume, low: int, high: int) -> np.ndarray:
        """The label of planes [low, high), as it is stored."""
        region = (slice(low, high), *(slice(0, extent) for extent in volume.shape[1:]))
        with READING:
            if self.predictor.gt_internal_path:
                import h5py

                with h5py.File(volume.path, "r") as file:
                    return np.asarray(file[self.predictor.gt_internal_path][(..., *region)])
            return volume.read_label(region)

    def result(self, stopped: bool) -> Result:
        """What there is at the end; how many files are new is known to the main rank."""
        files = [task.file for task in self.tasks if task.file.path.exists()]
        scores = {file.path.name: values for file in files if (values := file.record().get("scores"))}
        made = len(self.finished) - sum(task.is_finished for task in self.tasks)
        return Result([file.path for file in files], made, stopped, scores, self.predictor.performance_metric or "")


def space_of(volume: Any) -> list[dict[str, Any]]:
    """Of each axis its name, unit, scale and translation: as an OME-Zarr says, or by an affine to millimetres."""
    if space := getattr(volume, "space", None):
        return list(space)
    affine = getattr(volume, "affine", None)
    if affine is None:
        return []
    lengths = np.sqrt((np.asarray(affine)[:3, : len(volume.shape)] ** 2).sum(0)).tolist()
    return [{"name": name, "unit": "millimeter", "scale": it} for name, it in zip("xyz", lengths, strict=False)]


def added(chunks: Iterator[np.ndarray], earlier: Path) -> Iterator[np.ndarray]:
    """Chunks of planes plus what a part holds of the same planes."""
    low, part = 0, np.load(earlier, mmap_mode="r")
    for chunk in chunks:
        yield chunk + part[low : low + len(chunk)]
        low += len(chunk)


def cut(chunks: Iterator[tuple[int, np.ndarray]], slabs: list[Slab]) -> Iterator[Iterator[np.ndarray]]:
    """Divide a stream of planes, planes first, at the borders of slabs; each slab is to be used up before the next."""
    pending: list[tuple[int, np.ndarray]] = []  # the rest of a chunk that reaches over a border

    def of_slab(end: int) -> Iterator[np.ndarray]:
        high = -1
        while high < end:
            low, chunk = pending.pop() if pending else next(chunks)
            high = min(low + len(chunk), end)
            if high < low + len(chunk):
                pending.append((high, chunk[high - low :]))
            yield chunk[: high - low]

    return (of_slab(end) for _, end in slabs)
