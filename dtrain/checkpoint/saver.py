"""When a training is saved and by whom: copied by the loop, written by a thread; knows no file of a checkpoint."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtrain.checkpoint.contents import CheckpointError, Snapshot, take_snapshot
from dtrain.checkpoint.store import Checkpoints
from dtrain.data import rng
from dtrain.distributed.launched_rank import is_closed_for_another
from dtrain.distributed.ranks import is_lost_rank, lost_rank
from dtrain.distributed.stop import StopWaiting
from dtrain.tracking.run_folder import update_run
from dtrain.training.state import state_of

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

FAILED_STEP = "failed-step"  # a folder of checkpoints in the run folder
WRITER = "checkpoint"  # the thread's name
POST_SECONDS = 5.0  # so long a rank waits for the others' last notes


class Saver:
    """Saves a training: the loop waits for the copy to host memory, and for the one before where that is not done.

    Args:
        checkpoints: What writes.
        every_minutes: Minutes between checkpoints that `is_due` asks for; None: it never does.
        say: Told what could not be written.
    """

    def __init__(self, checkpoints: Checkpoints, every_minutes: float | None, say: Callable[[str], None]) -> None:
        self.checkpoints, self._say = checkpoints, say
        self._every_seconds = None if every_minutes is None else 60 * every_minutes
        self._under_way: tuple[int, Future[Path]] | None = None
        self._failure = ""  # of the last write
        self._began = time.monotonic()
        self._at: tuple[int, int, int] | None = None  # step, epoch and last validation of the last checkpoint
        self._generators: dict[str, Any] = {}  # as they were after the last step
        self._sums: dict[str, torch.Tensor] = {}
        self._copies: dict[str, torch.Tensor] = {}  # the last checkpoint's, whose memory the next one takes

    @property
    def is_due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self._every_seconds is not None and time.monotonic() - self._began >= self._every_seconds

    def save(self, trainer: "Trainer") -> None:
        """Save all that a training is, unless nothing happened since the last time. All ranks call it.

        Raises:
            RuntimeError: The ranks' weights are no longer the same.
        """
        self._began = time.monotonic()
        if self._at == (at := place_of(trainer)):
            return
        trainer.ranks.agree_on_buffers(trainer.module)
        state = state_of(trainer)  # which also finds ranks that drifted apart
        weights, averaged = _weights_of(trainer)
        self._at = at
        if trainer.ranks.is_main:
            self._write(trainer, state, weights, averaged)

    def is_saved(self, trainer: "Trainer") -> None:
        """What the trainer is now, lies on the disk: it was just read from there."""
        self._at = place_of(trainer)

    def check(self, trainer: "Trainer") -> None:
        """A full disk, or a state that could not be loaded again, should show now rather than after the first epoch.

        Raises:
            CheckpointError: It would not work.
            RuntimeError: The ranks' weights are not the same.
        """
        state = state_of(trainer)
        weights, averaged = _weights_of(trainer)
        if trainer.ranks.is_main:
            self.checkpoints.check(weights, state, ema=averaged)

    def mark(self, trainer: "Trainer") -> None:
        """Note what a step that is then abandoned halfway must not have changed; say so if a write has failed."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()
        self._generators = rng.torch_state()
        # With one batch per step, the loss is added up after the last moment at which a step can get stuck.
        several = trainer.train_loader.accumulate > 1
        self._sums = {name: value.clone() for name, value in trainer.sums.items()} if several else trainer.sums

    @contextlib.contextmanager
    def abandoning(self, trainer: "Trainer") -> Iterator[None]:
        """Where a rank is asked to stop while it waits for data that do not come: save the last whole step, and end."""
        try:
            yield
        except (StopWaiting, Exception) as error:
            if is_closed_for_another():
                raise error if isinstance(error, Exception) else lost_rank() from None
            others_left = trainer.stop_request and is_lost_rank(error)
            if not (isinstance(error, StopWaiting) or others_left) or not self._abandon(trainer):
                raise
            trainer.stop()
            trainer.ranks.are_lost = trainer.ranks.world_size > 1

    def keep_failed_step(self, trainer: "Trainer", exact: bool, timeout_seconds: float) -> None:
        """Keep what repeating the step at work takes; every rank leaves its random numbers, rank 0 writes.

        Args:
            trainer: Its weights are those of before the step.
            exact: Unless this is False.
            timeout_seconds: How long to wait for the others' random numbers.
        """
        if trainer.ranks.shards:
            self._say("the failed step cannot be replayed: of a model that is shared out, no rank has the weights")
            return
        mailbox, shard = trainer.ranks.mailbox, trainer.train_loader.shard
        mailbox.post("failed step", rng.get_state() | self._generators)
        if not trainer.ranks.is_main:
            return
        state = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "position": trainer.position,
            "accumulate": trainer.train_loader.accumulate,
            "batch_size": shard.batch_size,
            "world_size": shard.world_size,
            "exact": exact,
            "rng": mailbox.notes("failed step", timeout_seconds),
        }
        kept = Checkpoints(self.checkpoints.folder.parent / FAILED_STEP, keep_last=1, keep_best=0)
        try:
            kept.save(trainer.step, trainer.module.state_dict(), state)
        except CheckpointError as error:
            self._say(f"warning: the failed step cannot be replayed: {error}")

    def _abandon(self, trainer: "Trainer") -> bool:
        """Save the last whole step without the other ranks' help: they, or this one, are stuck in the next.

        Each rank leaves what only it knows in the mailbox; rank 0 writes. Where a note is missing, what follows is the
        same training, but with other random numbers. Of a model that is shared out, no rank has the weights: there, the
        last checkpoint is what the next start goes on from.

        Returns:
            Whether this rank has done what it could.
        """
        if trainer.ranks.shards:
            self._say(f"warning: step {trainer.step} is not saved: ranks that wait cannot give their shards of it")
            self.wait()
            return not self._failure
        mailbox = trainer.ranks.mailbox
        sums = {name: float(value) for name, value in self._sums.items()}
        mailbox.post("abandoned", (rng.get_state() | self._generators, sums))
        if not trainer.ranks.is_main:
            return True
        notes = mailbox.notes("abandoned", POST_SECONDS)
        state = state_of(trainer, {rank: generators for rank, (generators, _) in notes.items()})
        state["sums"] = {name: sum(each.get(name, 0.0) for _, each in notes.values()) for name in sums}
        if self._at != place_of(trainer):
            self._at = place_of(trainer)
            self._write(trainer, state, *_weights_of(trainer))
        self.wait()
        return not self._failure

    def wait(self) -> None:
        """Wait until what is under way is written; say so if the disk, or the lack of memory, did not let it."""
        if self._under_way is None:
            return
        (step, future), self._under_way = self._under_way, None
        try:
            future.result()
            self._failure = ""
        except (CheckpointError, MemoryError) as error:
            self._failure = f"no checkpoint of step {step}: {str(error) or 'out of memory'}"
            self._say(f"warning: {self._failure}")

    def finish(self, trainer: "Trainer") -> None:
        """Wait for the last checkpoint. All ranks call it.

        Raises:
            CheckpointError: It could not be written, so that what was trained since the one before is lost.
        """
        self.wait()
        if failure := trainer.ranks.broadcast(self._failure):
            raise CheckpointError(failure)

    def _write(
        self,
        trainer: "Trainer",
        state: dict[str, Any],
        weights: dict[str, Any],
        averaged: dict[str, Any] | None,
    ) -> None:
        score = trainer.score if trainer.validated_step == trainer.step else None
        self.wait()  # its copies are about to be written over
        future: Future[Path] = Future()
        try:
            # What was gathered from shards is nobody else's.
            snapshot = take_snapshot(weights, state, averaged, self._copies if trainer.ranks.shards is None else None)
        except CheckpointError as error:
            future.set_exception(error)
        else:
            work = (future, trainer.step, snapshot, score)
            # A daemon: an end at once does not wait for it, every other end does.
            threading.Thread(target=self._write_now, args=work, name=WRITER, daemon=True).start()
        self._under_way = trainer.step, future  # at last: after any other error there is nothing to wait for

    def _write_now(self, future: "Future[Path]", step: int, snapshot: Snapshot, score: float | None) -> None:
        """The thread's part."""
        began = time.monotonic()
        try:
            path = self.checkpoints.write(step, snapshot, score)
            with contextlib.suppress(OSError):  # so long a launcher waits when it ends this training
                update_run(self.checkpoints.folder.parent, save_seconds=round(time.monotonic() - began, 3))
            future.set_result(path)  # at last: whoever waited for it may end, and nothing may change a run that ended
        except BaseException as error:
            future.set_exception(error)


def place_of(trainer: "Trainer") -> tuple[int, int, int]:
    """What tells two checkpoints of one training apart."""
    return trainer.step, trainer.epoch, trainer.validated_step


def _weights_of(trainer: "Trainer") -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model's weights and their averages; on the main rank whole. All ranks call it where they are shared out."""
    averaged = trainer.ranks.whole(trainer.ema.module.state_dict()) if trainer.ema else None
    return trainer.ranks.whole(trainer.module.state_dict()), averaged
