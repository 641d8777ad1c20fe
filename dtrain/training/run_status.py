"""A run's frame: opens it, and closes it with the status that is true."""

import contextlib
import gc
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO, cast

from dtrain.checkpoint.checkpoint_files import is_sharded, step_in
from dtrain.config.errors import ConfigError
from dtrain.data.loader_workers import end_workers
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.distributed.launched_rank import is_written_by_launcher, leaves_to_launcher, reason_to_stop
from dtrain.distributed.ranks import is_lost_rank
from dtrain.distributed.stop_request import Interrupted
from dtrain.reporting.own_frames import one_line_of
from dtrain.reporting.summary import summary_table
from dtrain.tracking.journal import Status
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.secrets import Redacted
from dtrain.tracking.uri import where_seen
from dtrain.training.failure_card import first_failure
from dtrain.training.held_folder import keep_whole, lay_out_config, only_training
from dtrain.training.saving import gathered_weights
from dtrain.training.setup import Parts
from dtrain.training.state import TrainState


@dataclass
class Ending:
    """How a run ends, filled in while it does."""

    status: Status = "FAILED"
    reason: str = ""
    exit_status: int = FAILED
    test_figures: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def session(parts: Parts, state: TrainState) -> Iterator[Ending]:
    """Open the run, and close it with the status that is true, whatever happens inside."""
    began = time.monotonic()
    ending, is_reformed = Ending(), False
    if parts.start.has_new_scores:
        state.best, state.bad_validations, state.score = None, 0, None
        parts.saver.checkpoints.begins_new_scores = True
    # From here on a request to stop is a flag: a run that is open must be closed, or its end looks like a crash.
    with only_training(parts), parts.stop.listening(), _logged(parts):
        parts.journal.start(**parts.record, from_step=state.step if parts.start.is_branch else None)
        if parts.mirror is not None:
            parts.mirror.start(parts.start.folder)
        if parts.node_metrics is not None:
            parts.node_metrics.start()
        # Done, and not to be done again where `fit` is called again.
        parts.start = parts.start._replace(moves_aside=False, is_branch=False, has_new_scores=False, kept=None)
        if parts.spare:
            facts = read_run(parts.start.folder) if parts.ranks.is_main else {}
            parts.spare.open(facts.get("id", ""), facts.get("attempt", 0))
        parts.progress.begin(parts.table, parts.monitor)
        try:
            yield ending
            ending.reason = state.ended
            ending.status = "KILLED" if state.stopped else "FINISHED"
            ending.exit_status = STOPPED_EARLY if state.stopped else DONE
            is_reformed = state.stopped and bool(reason_to_stop())
        except BaseException as error:
            parts.saver.hurry(is_lost_rank(error))
            other = first_failure(parts.start.folder, parts.ranks.rank) if parts.ranks.is_main else ""
            ending.reason = other or one_line_of(error)
            is_reformed = leaves_to_launcher() and is_lost_rank(error) and not getattr(error, "failure_card", [])
            if isinstance(error, Interrupted):
                ending.status, ending.exit_status = "KILLED", INTERRUPTED
            elif isinstance(error, ConfigError):
                ending.exit_status = WRONG_CONFIG
            raise
        finally:
            _close(parts, ending, state, None if is_reformed else time.monotonic() - began)


@contextlib.contextmanager
def _logged(parts: Parts) -> Iterator[None]:
    """Have all that is said written to logs/rank-0.log of the run folder, too, and what an error leaves behind."""
    if parts.ranks.is_main:
        _lay_out_folder(parts)
    path = RunFolder(parts.start.folder).rank_log(0)
    if not parts.ranks.is_main or is_written_by_launcher(path):
        yield
        return
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        log = cast(TextIO, Redacted(file))
        try:
            with parts.progress.copied_to(log):
                yield
        except BaseException:
            traceback.print_exc(file=log)
            raise


def _lay_out_folder(parts: Parts) -> None:
    RunFolder(parts.start.folder).failure.unlink(missing_ok=True)  # a new start begins without the old failure
    lay_out_config(parts)


def _wait_for_files(parts: Parts) -> None:
    """Let threads end what they write."""
    for pictures in parts.pictures.values():
        pictures.finish()
    try:
        parts.saver.wait()
    except Exception as error:
        parts.progress.note(f"warning: the last checkpoint was not written: {error!r}")


def _close(parts: Parts, ending: Ending, state: TrainState, seconds: float | None) -> None:
    """Deliver what there is and say where everything is. No collective: the other ranks may be gone.

    `seconds` is how long it took; None where the launcher is about to start again, and there is nothing to say.
    """
    progress = parts.progress
    if ending.exit_status != INTERRUPTED:
        _wait_for_files(parts)
    end_workers()
    if parts.node_metrics is not None:
        parts.node_metrics.finish()
    if parts.spare:
        parts.spare.close(is_saved=ending.exit_status in (DONE, STOPPED_EARLY) and not parts.ranks.are_lost)
    try:
        keep_whole(parts)
    except RuntimeError as error:
        progress.note(f"warning: {error}")
    closing_at = time.monotonic()  # MLflow and the mirror are waited for together
    hint = _finish_journal(parts, ending) if parts.ranks.is_main else ""
    gc.unfreeze()  # what the first step froze: in a notebook the next training needs the memory
    if seconds is None:
        progress.close()
        return
    best = "" if state.best is None else f"{parts.monitor} {state.best:.4g}"
    table = summary_table(
        ending.status, ending.reason, best, ending.test_figures, seconds, state.step, parts.start.folder
    )
    if parts.journal.tracking_uri:
        table |= {"MLflow": where_seen(parts.journal.tracking_uri, read_run(parts.start.folder))}
    progress.summary(table)
    progress.ended(
        status=ending.status, reason=ending.reason, run_folder=str(parts.start.folder), steps=state.step,
        seconds=round(seconds, 3), monitor=parts.monitor,
        best={} if state.best is None else {parts.monitor: state.best}, test=ending.test_figures,
    )  # fmt: skip
    if parts.mirror is not None:  # last of all, so that it has the log, too
        left = parts.mirror.exit_timeout_seconds - (time.monotonic() - closing_at)
        hint = "; ".join(filter(None, [hint, parts.mirror.finish(max(1.0, left))]))
    if hint:
        progress.note(hint)
    progress.close()


def _finish_journal(parts: Parts, ending: Ending) -> str:
    """Returns how to send what was not delivered, if anything was not."""
    folder = parts.saver.checkpoints.folder
    weights = next((link for link in (folder / "best", folder / "last") if link.exists()), None)
    # By its name in the run folder, which may itself be a link to another disk. First the averaged weights, if any.
    files = sorted((folder.absolute() / weights.resolve().name).glob("*.safetensors")) if weights else []
    if weights and is_sharded(weights):
        files = gathered_weights(parts, weights) if ending.status == "FINISHED" else []
    for number, file in enumerate(files):
        parts.journal.artifact(str(file), "model/raw" if number else "model")
    if weights and files and (step := step_in(weights.resolve().name)) is not None:
        is_final = ending.status == "FINISHED"
        parts.journal.model(str(files[0]), step, is_final, signature=parts.signature, **parts.own_code)
    return parts.journal.finish(ending.status, ending.reason, ending.exit_status)
