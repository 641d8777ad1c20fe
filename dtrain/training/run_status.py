"""A run's frame: opens it, and closes it with the status that is true."""

import contextlib
import gc
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO, cast

from dtrain.checkpoint.checkpoint_files import step_in
from dtrain.config.errors import ConfigError
from dtrain.data.loader_workers import end_workers
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.distributed.launched_rank import is_written_by_launcher
from dtrain.distributed.stop_request import Interrupted
from dtrain.reporting.own_frames import one_line_of
from dtrain.reporting.summary import summary_table
from dtrain.tracking.journal import Status
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.secrets import Redacted
from dtrain.tracking.uri import where_seen
from dtrain.training.failure_card import first_failure
from dtrain.training.held_folder import keep_whole, lay_out_config, only_training
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
    ending = Ending()
    if parts.start.has_new_scores:
        state.best, state.bad_validations, state.score = None, 0, None
        parts.saver.checkpoints.begins_new_scores = True
    # From here on a request to stop is a flag: a run that is open must be closed, or its end looks like a crash.
    with only_training(parts), parts.stop.listening(), _logged(parts):
        parts.journal.start(**parts.record, from_step=state.step if parts.start.is_branch else None)
        # Done, and not to be done again where `fit` is called again.
        parts.start = parts.start._replace(moves_aside=False, is_branch=False, has_new_scores=False)
        parts.progress.begin(parts.table, parts.monitor)
        try:
            yield ending
            ending.reason = state.ended
            ending.status = "KILLED" if state.stopped else "FINISHED"
            ending.exit_status = STOPPED_EARLY if state.stopped else DONE
        except BaseException as error:
            other = first_failure(parts.start.folder, parts.ranks.rank) if parts.ranks.is_main else ""
            ending.reason = other or one_line_of(error)
            if isinstance(error, Interrupted):
                ending.status, ending.exit_status = "KILLED", INTERRUPTED
            elif isinstance(error, ConfigError):
                ending.exit_status = WRONG_CONFIG
            raise
        finally:
            _close(parts, ending, state, time.monotonic() - began)


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


def _close(parts: Parts, ending: Ending, state: TrainState, seconds: float) -> None:
    """Deliver what there is and say where everything is. No collective: the other ranks may be gone."""
    progress = parts.progress
    if ending.exit_status != INTERRUPTED:
        try:
            parts.saver.wait()
        except Exception as error:
            progress.note(f"warning: the last checkpoint was not written: {error!r}")
    end_workers()
    try:
        keep_whole(parts)
    except RuntimeError as error:
        progress.note(f"warning: {error}")
    hint = _finish_journal(parts, ending) if parts.ranks.is_main else ""
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
    if hint:
        progress.note(hint)
    progress.close()
    gc.unfreeze()  # what the first step froze: in a notebook the next training needs the memory


def _finish_journal(parts: Parts, ending: Ending) -> str:
    """Returns how to send what was not delivered, if anything was not."""
    folder = parts.saver.checkpoints.folder
    weights = next((link for link in (folder / "best", folder / "last") if link.exists()), None)
    # By its name in the run folder, which may itself be a link to another disk. First the averaged weights, if any.
    files = sorted((folder.absolute() / weights.resolve().name).glob("*.safetensors")) if weights else []
    for number, file in enumerate(files):
        parts.journal.artifact(str(file), "model/raw" if number else "model")
    if files and (step := step_in(files[0].parent.name)) is not None:
        is_final = ending.status == "FINISHED"
        parts.journal.model(str(files[0]), step, is_final, signature=parts.signature, **parts.own_code)
    return parts.journal.finish(ending.status, ending.reason, ending.exit_status)
