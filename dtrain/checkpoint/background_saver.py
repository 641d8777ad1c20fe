"""Saver: the training loop makes a copy, a thread writes it."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError, Snapshot, take_snapshot
from dtrain.tracking.run_folder import update_run

WRITER = "checkpoint"  # the thread's name
Place = tuple[int, int, int]  # step, epoch, step of the last validation: what tells two checkpoints apart


class Saver:
    """Saves a training: the loop waits for the copy to host memory, and for the last write where that is not done.

    Args:
        every_minutes: Minutes between checkpoints that `is_due` asks for; None: it never does.
        say: Is given a line for what could not be written.
        saved: Is given step and folder of what was.
        reuses_memory: A checkpoint's copies go where those of the last one were: not for tensors that nobody else has.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every_minutes: float | None,
        say: Callable[[str], None],
        reuses_memory: bool = True,
        saved: Callable[[int, Path], object] = lambda step, path: None,
    ) -> None:
        self.checkpoints, self._say, self._reuses_memory = checkpoints, say, reuses_memory
        self._saved = saved
        self._every_seconds = None if every_minutes is None else 60 * every_minutes
        self._began = time.monotonic()
        self._place: Place | None = None  # of the last checkpoint
        self._in_progress: tuple[int, Future[Path]] | None = None
        self._failure = ""  # of the last write
        self._copies: dict[str, torch.Tensor] = {}  # the last checkpoint's, whose memory the next one takes

    @property
    def is_due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self._every_seconds is not None and time.monotonic() - self._began >= self._every_seconds

    def is_saved(self, place: Place) -> bool:
        """Whether nothing happened since the last checkpoint; asked before each, it also restarts the clock."""
        self._began = time.monotonic()
        return self._place == place

    def mark_saved(self, place: Place) -> None:
        """What the training is now, lies on the disk: on the main rank it is being written, or was just read."""
        self._place = place

    def save(
        self,
        place: Place,
        state: dict[str, Any],
        weights: dict[str, Any],
        ema: dict[str, Any] | None,
        others: dict[str, dict[str, Any]],
        score: float | None,
    ) -> None:
        """Copy plain values and whole state_dicts and have them written, on the main rank; the score is this step's."""
        self.mark_saved(place)
        self.wait()  # its copies are about to be overwritten
        future: Future[Path] = Future()
        try:
            snapshot = take_snapshot(weights, state, ema, self._copies if self._reuses_memory else None, others)
        except CheckpointError as error:
            future.set_exception(error)
        else:
            work = (future, place[0], snapshot, score)
            # A daemon: an end at once does not wait for it, every other end does.
            threading.Thread(target=self._write, args=work, name=WRITER, daemon=True).start()
        self._in_progress = place[0], future  # at last: after any other error there is nothing to wait for

    def poll(self) -> None:
        """Report a write that has failed, without waiting for one."""
        if self._in_progress is not None and self._in_progress[1].done():
            self.wait()

    def wait(self) -> bool:
        """Wait for the write in progress and report what prevented it; whether the last one succeeded."""
        if self._in_progress is not None:
            (step, future), self._in_progress = self._in_progress, None
            try:
                self._saved(step, future.result())
                self._failure = ""
            except (CheckpointError, MemoryError) as error:
                self._failure = f"no checkpoint of step {step}: {str(error) or 'out of memory'}"
                self._say(f"warning: {self._failure}")
        return not self._failure

    def finish(self) -> None:
        """Wait for the last checkpoint, on the main rank; CheckpointError where it is lost."""
        if not self.wait():
            raise CheckpointError(self._failure)

    def _write(self, future: "Future[Path]", step: int, snapshot: Snapshot, score: float | None) -> None:
        """The thread's part."""
        began = time.monotonic()
        try:
            path = self.checkpoints.write(step, snapshot, score)
            with contextlib.suppress(OSError):  # so long a launcher waits when it ends this training
                update_run(self.checkpoints.folder.parent, save_seconds=round(time.monotonic() - began, 3))
            future.set_result(path)  # at last: whoever waited for it may end, and nothing may change a run that ended
        except BaseException as error:
            future.set_exception(error)
