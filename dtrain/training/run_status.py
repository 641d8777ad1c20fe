"""A run's frame: opens it, and closes it with the status that is true."""

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from dtrain.checkpoint.resume import Start, move_aside
from dtrain.checkpoint.saver import Saver
from dtrain.data.loader_workers import end_workers
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY
from dtrain.distributed.launched_rank import is_written_by_launcher
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.stop import StopRequest
from dtrain.reporting.progress import Progress
from dtrain.reporting.summary import summary_table
from dtrain.tracking.journal import Journal, NoJournal, Status
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.secrets import Redacted
from dtrain.tracking.uri import ui_command
from dtrain.tracking.whole_file import write_text
from dtrain.training.failure_card import forget
from dtrain.training.state import TrainState


class Run(NamedTuple):
    """What is known of a run before its first step.

    Attributes:
        start: Its folder, and where in the training it begins.
        seed: Of the training.
        monitor: The figure that 'best' means.
        table: What is shown before the first step.
        places: Where each section of the config stands, as file:line.
        record: What the journal is given at the start.
        texts: What goes into the run folder as it is: the config, resolved and as written.
    """

    start: Start
    seed: int
    monitor: str
    table: Mapping[str, str]
    places: Mapping[str, str]
    record: Mapping[str, Any]
    texts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.start.folder


@dataclass
class Ending:
    """How a run ends, filled in while it does."""

    status: Status = "FAILED"
    reason: str = ""
    exit_status: int = FAILED
    test_figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Recorder:
    """What a run is recorded with: its journal, what is shown, and what writes its checkpoints."""

    run: Run
    journal: Journal | NoJournal
    progress: Progress
    saver: Saver
    stop: StopRequest
    ranks: Ranks

    @contextlib.contextmanager
    def session(self, state: TrainState) -> Iterator[Ending]:
        """Open the run, and close it with the status that is true, whatever happens inside."""
        began = time.monotonic()
        ending = Ending()
        # From here on a request to stop is a flag: a run that is open must be closed, or its end looks like a crash.
        with self.stop.listening(), self._logged():
            self.journal.start(**self.run.record)
            self.progress.begin(self.run.table)
            try:
                yield ending
                ending.reason = state.ended
                ending.status = "KILLED" if state.stopped else "FINISHED"
                ending.exit_status = STOPPED_EARLY if state.stopped else DONE
            except BaseException as error:
                ending.reason = f"{type(error).__name__}: {error}"
                if isinstance(error, KeyboardInterrupt):
                    ending.status, ending.exit_status = "KILLED", INTERRUPTED
                raise
            finally:
                self._close(ending, state, time.monotonic() - began)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Have all that is said written to logs/rank-0.log of the run folder, too, and what an error leaves behind."""
        if not self.ranks.is_main:
            yield
            return
        self._lay_out_folder()
        path = RunFolder(self.run.folder).rank_log(0)
        if is_written_by_launcher(path):
            yield
            return
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            log = cast(TextIO, Redacted(file))
            try:
                with self.progress.copied_to(log):
                    yield
            except BaseException:
                traceback.print_exc(file=log)
                raise

    def _lay_out_folder(self) -> None:
        folder = self.run.folder
        if self.run.start.moves_aside and (aside := move_aside(folder)):
            self.progress.note(f"the old training was moved to {aside}")
            self.journal.deliver_later(aside)
        forget(folder)
        for name, text in self.run.texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    def _close(self, ending: Ending, state: TrainState, seconds: float) -> None:
        """Deliver what there is and say where everything is. No collective: the other ranks may be gone."""
        if ending.exit_status != INTERRUPTED:
            try:
                self.saver.wait()
            except Exception as error:
                self.progress.note(f"warning: the last checkpoint was not written: {error!r}")
        end_workers()
        hint = self._finish_journal(ending) if self.ranks.is_main else ""
        best = "" if state.best is None else f"{self.run.monitor} {state.best:.4g}"
        table = summary_table(
            ending.status, ending.reason, best, ending.test_figures, seconds, state.step, self.run.folder
        )
        if self.journal.tracking_uri:
            table |= {"MLflow": ui_command(self.journal.tracking_uri)}
        self.progress.summary(table)
        if hint:
            self.progress.note(hint)
        self.progress.close()

    def _finish_journal(self, ending: Ending) -> str:
        """Returns how to send what was not delivered, if anything was not."""
        folder = self.saver.checkpoints.folder
        weights = next((link for link in (folder / "best", folder / "last") if link.exists()), None)
        # By its name in the run folder, which may itself be a link to another disk.
        for file in (folder.absolute() / weights.resolve().name).glob("*.safetensors") if weights else ():
            self.journal.artifact(str(file), "model")
        return self.journal.finish(ending.status, ending.reason, ending.exit_status)
