"""The frame of a run: opens it, and closes it with the status that is true; knows nothing of how one trains."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtrain import report
from dtrain.interrupt import end_workers
from dtrain.resume import move_aside
from dtrain.runfiles import write_text
from dtrain.tracking import Journal, Status, ui_command

if TYPE_CHECKING:
    from dtrain.trainer import Trainer


@contextlib.contextmanager
def recorded(trainer: "Trainer") -> Iterator[None]:
    """Open the run, and close it with the status that is true, whatever happens inside."""
    began = time.monotonic()
    if trainer.ranks.is_main:
        _lay_out_folder(trainer)
    trainer.journal.start(**trainer.parts.record)
    trainer.progress.begin(trainer.parts.table)
    status: Status = "FAILED"
    reason, code = "", 1
    try:
        with trainer.stop_request.listening():
            yield
        status, reason, code = ("KILLED", trainer.ended, 75) if trainer.stopped else ("FINISHED", trainer.ended, 0)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            status, code = "KILLED", 130
        raise
    finally:
        _close(trainer, status, reason, code, time.monotonic() - began)


def _lay_out_folder(trainer: "Trainer") -> None:
    start = trainer.parts.start
    if start.moves_aside and (line := move_aside(start.folder)):
        trainer.progress.note(line)
    for name, text in trainer.parts.texts.items():
        path = start.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _close(trainer: "Trainer", status: Status, reason: str, code: int, seconds: float) -> None:
    """Deliver what there is and say where everything is. No collective: the other ranks may be gone."""
    hint = ""
    end_workers()
    folder = trainer.checkpoints.folder
    if trainer.ranks.is_main:
        weights = next((link for link in (folder / "best", folder / "last") if link.exists()), None)
        for file in weights.resolve().glob("*.safetensors") if weights else ():
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
