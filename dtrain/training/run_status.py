"""The frame of a run: opens it, and closes it with the status that is true; knows nothing of how one trains."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

from dtrain.checkpoint.resume import move_aside
from dtrain.data.loader_workers import end_workers
from dtrain.distributed.exit_status import INTERRUPTED, STOPPED_EARLY
from dtrain.distributed.process import is_written_by_launcher
from dtrain.reporting import summary as report
from dtrain.reporting.lines import LineProgress
from dtrain.tracking.journal import Journal, Status
from dtrain.tracking.secrets import Redacted
from dtrain.tracking.uri import ui_command
from dtrain.tracking.whole_file import write_text
from dtrain.training import failure

if TYPE_CHECKING:
    from dtrain.trainer import Trainer


@contextlib.contextmanager
def recorded(trainer: "Trainer") -> Iterator[None]:
    """Open the run, and close it with the status that is true, whatever happens inside."""
    began = time.monotonic()
    # From here on a request to stop is a flag: a run that is open must be closed, or its end would look like a crash.
    with trainer.stop_request.listening(), _logged(trainer):
        trainer.journal.start(**trainer.parts.record)
        trainer.progress.begin(trainer.parts.table)
        yield from _watched(trainer, began)


def _watched(trainer: "Trainer", began: float) -> Iterator[None]:
    status: Status = "FAILED"
    reason, code = "", 1
    try:
        yield
        reason = trainer.ended
        status, code = ("KILLED", STOPPED_EARLY) if trainer.stopped else ("FINISHED", 0)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            status, code = "KILLED", INTERRUPTED
        else:
            for line in failure.report(trainer, error):
                trainer.progress.note(line)
        raise
    finally:
        _close(trainer, status, reason, code, time.monotonic() - began)


@contextlib.contextmanager
def _logged(trainer: "Trainer") -> Iterator[None]:
    """Have all that is said written to logs/rank-0.log of the run folder, too, and what an error leaves behind."""
    if not trainer.ranks.is_main:
        yield
        return
    _lay_out_folder(trainer)
    path = trainer.parts.start.folder / "logs" / "rank-0.log"
    if is_written_by_launcher(path):
        yield
        return
    path.parent.mkdir(exist_ok=True)
    shown = trainer.progress
    with path.open("a", encoding="utf-8") as log:
        trainer.progress = _Both(shown, LineProgress(cast(TextIO, Redacted(log))))
        try:
            yield
        except BaseException:
            traceback.print_exc(file=cast(TextIO, Redacted(log)))
            raise
        finally:
            trainer.progress = shown


class _Both:
    """Tells two progresses the same."""

    def __init__(self, shown: Any, logged: Any) -> None:
        self._parts = (shown, logged)
        self.step_shown, self.step_logged = shown.step, logged.step

    def step(self) -> None:
        """The one call of every step, spelt out."""
        self.step_shown()
        self.step_logged()

    def __getattr__(self, name: str) -> Callable[..., None]:
        methods = [getattr(part, name) for part in self._parts]

        def tell(*args: Any, **kwargs: Any) -> None:
            for method in methods:
                method(*args, **kwargs)

        return tell


def _lay_out_folder(trainer: "Trainer") -> None:
    start = trainer.parts.start
    if start.moves_aside and (aside := move_aside(start.folder)):
        trainer.progress.note(f"the old training was moved to {aside}")
        trainer.journal.deliver_later(aside)
    failure.forget(start.folder)
    for name, text in trainer.parts.texts.items():
        path = start.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _close(trainer: "Trainer", status: Status, reason: str, code: int, seconds: float) -> None:
    """Deliver what there is and say where everything is. No collective: the other ranks may be gone."""
    hint = ""
    if code != INTERRUPTED:
        try:
            trainer.saver.wait()
        except Exception as error:
            trainer.progress.note(f"warning: the last checkpoint was not written: {error!r}")
    end_workers()
    folder = trainer.checkpoints.folder
    if trainer.ranks.is_main:
        weights = next((link for link in (folder / "best", folder / "last") if link.exists()), None)
        # By its name in the run folder, which may itself be a link to another disk.
        for file in (folder.absolute() / weights.resolve().name).glob("*.safetensors") if weights else ():
            trainer.journal.artifact(str(file), "model")
        hint = trainer.journal.finish(status, reason, code)
    best = "" if trainer.best is None else f"{trainer.monitor} {trainer.best:.4g}"
    table = report.summary(status, reason, best, trainer.test_figures, seconds, trainer.step, folder.parent)
    if isinstance(trainer.journal, Journal):
        table |= {"MLflow": ui_command(trainer.journal.tracking_uri)}
    trainer.progress.summary(table)
    if hint:
        trainer.progress.note(hint)
    trainer.progress.close()
