"""Saver: the training loop makes a copy, a thread writes it."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.checkpoint.checkpoint_folder import Checkpoints, trial_snapshot, write_share
from dtrain.checkpoint.contents import CheckpointError, HostMemory, Snapshot, take_snapshot
from dtrain.checkpoint.written_together import NotSharedError, SharedWrite, Writers
from dtrain.tracking.run_folder import update_run

WRITER = "checkpoint"  # the thread's name
Place = tuple[int, int, int]  # step, epoch, step of the last validation: what tells two checkpoints apart


class Saver:
    """Saves a training: the loop waits for the copy to host memory, and for the last write where that is not done.

    Args:
        every_minutes: Minutes between checkpoints that `is_due` asks for; None: it never does.
        say: Is given a line for what could not be written.
        saved: Is given step and folder of what was.
        memory: For a checkpoint's copies, which go where those of the last one were; None: tensors of the CPU are
            not copied, since nobody else has them.
        writers: The ranks, where each writes its shards; None: the main rank writes all.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every_minutes: float | None,
        say: Callable[[str], None],
        memory: HostMemory | None = HostMemory(),  # noqa: B008  (it has no state)
        saved: Callable[[int, Path], object] = lambda step, path: None,
        writers: Writers | None = None,
    ) -> None:
        self.checkpoints, self._say, self._memory = checkpoints, say, memory
        self._saved, self.writers = saved, writers
        self._every_seconds = None if every_minutes is None else 60 * every_minutes
        self._began = time.monotonic()
        self._place: Place | None = None  # of the last checkpoint
        self._in_progress: tuple[int, Future[Path | None]] | None = None
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

    @property
    def _share(self) -> Literal["all", "main", "shards"]:
        """What this rank gives to a checkpoint."""
        return "all" if self.writers is None else "main" if self.writers.rank == 0 else "shards"

    def check(
        self,
        state: dict[str, Any],
        weights: dict[str, Any],
        ema: dict[str, Any] | None,
        others: dict[str, dict[str, Any]],
    ) -> str:
        """Raise, before the first step, what prevents a checkpoint; of ranks that write together all call it.

        Returns why they cannot do so, on the main rank, where they do not see the same folder; else ''.
        """
        if self.writers is None:
            self.checkpoints.check(weights, state, ema=ema, others=others)
            return ""
        together = self.writers.next()
        if not together.is_main:
            with contextlib.suppress(CheckpointError):  # which the main rank raises
                self._try_share(together, weights, state, ema)
            return ""
        try:
            snapshot = take_snapshot(weights, state, ema, others=others, share="main")
            self.checkpoints.try_out(snapshot.need_bytes, together)
        except CheckpointError as error:
            together.cancel(str(error))
            if isinstance(error.__cause__, NotSharedError):
                return str(error.__cause__.strerror)
            raise
        return ""

    def _try_share(
        self, together: SharedWrite, weights: dict[str, Any], state: dict[str, Any], ema: dict[str, Any] | None
    ) -> None:
        try:
            take_snapshot(weights, state, ema, share="shards")
        except CheckpointError as error:
            together.fail(0, str(error))
            raise
        write_share(trial_snapshot("shards"), together)

    def save(
        self,
        place: Place,
        state: dict[str, Any],
        weights: dict[str, Any],
        ema: dict[str, Any] | None,
        others: dict[str, dict[str, Any]],
        score: float | None,
    ) -> None:
        """Copy plain values and state_dicts and have them written; the score is this step's.

        The main rank calls it with whole state_dicts, or every rank, where each writes its shards.
        """
        self.mark_saved(place)
        self.wait()  # its copies are about to be overwritten
        future: Future[Path | None] = Future()
        together = None if self.writers is None else self.writers.next()
        copies = self._copies if self._memory else None
        try:
            snapshot = take_snapshot(weights, state, ema, copies, others, self._share, self._memory)
        except CheckpointError as error:
            future.set_exception(error)
            if together is not None:
                together.cancel(str(error)) if together.is_main else together.fail(0, str(error))
        else:
            work = (future, place[0], snapshot, score, together)
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
                if (path := future.result()) is not None:
                    self._saved(step, path)
                self._failure = ""
            except (CheckpointError, MemoryError) as error:
                self._failure = f"no checkpoint of step {step}: {str(error) or 'out of memory'}"
                self._say(f"warning: {self._failure}")
        return not self._failure

    def finish(self) -> None:
        """Wait for the last checkpoint, on the main rank; CheckpointError where it is lost."""
        if not self.wait():
            raise CheckpointError(self._failure)

    def gather_from_now_on(self) -> None:
        """The main rank writes all, which is gathered for that, and needs no copy."""
        self.writers, self._memory = None, None

    def hurry(self, one_is_lost: bool) -> None:
        """The training has failed: other ranks, whose shards are waited for, may be gone, or one certainly is."""
        if self.writers is not None:
            self.writers.hurry(one_is_lost)

    def _write(
        self,
        future: "Future[Path | None]",
        step: int,
        snapshot: Snapshot,
        score: float | None,
        together: SharedWrite | None,
    ) -> None:
        """The thread's part."""
        began = time.monotonic()
        try:
            if snapshot.until_there is not None:
                snapshot.until_there()
            if together is not None and not together.is_main:
                write_share(snapshot, together)
                future.set_result(None)
                return
            path = self.checkpoints.write(step, snapshot, score, together)
            with contextlib.suppress(OSError):  # so long a launcher waits when it ends this training
                update_run(self.checkpoints.folder.parent, save_seconds=round(time.monotonic() - began, 3))
            future.set_result(path)  # at last: whoever waited for it may end, and nothing may change a run that ended
        except BaseException as error:
            future.set_exception(error)
