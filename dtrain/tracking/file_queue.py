"""The files and pictures of a run on their way to MLflow, which hold up neither figures nor one another."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.tracking.logged_model import send_entity
from dtrain.tracking.mlflow_store import MlflowRun, describe_error
from dtrain.tracking.retry import Retry
from dtrain.tracking.run_folder import Memory

# After a file has failed, others are tried in a second, and where none is left, it in half a minute; or after ten times
# as long as that took, so that figures have their turn. At the run's end so many failures in a row are the last ones.
_PAUSE_SECONDS, _PAUSE_IF_ALL_FAILED_SECONDS, _TRIES_AT_END = 1.0, 30.0, 5
_log = logging.getLogger(__name__)


class FileQueue:
    """Sends the files of a run folder that wait in a sender's memory, those first that have not failed."""

    def __init__(self, folder: Path, memory: Memory) -> None:
        self._folder = folder
        self._memory = memory
        self._failures: Counter[str] = Counter()  # of each path, in this process
        self._reason = ""  # of the last failure
        self._retry = Retry(_PAUSE_SECONDS, _PAUSE_SECONDS)
        self._run_has_ended = False

    def add(self, files: Sequence[list[Any]]) -> None:
        """Appends what is not in it."""
        self._memory.artifacts += [item for item in files if item not in self._memory.artifacts]

    @property
    def is_given_up(self) -> bool:
        """Whether what is left failed so often after the run's end that it is left to `dtrain sync`."""
        return self._run_has_ended and self._retry.failures >= _TRIES_AT_END

    @property
    def problem(self) -> str:
        """Which files are not sent, and why not; '' where none waits for another try."""
        left = [item[0] for item in self._memory.artifacts if item[0] in self._failures]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        return f"not sent: {', '.join(left[:3])}{more}: {self._reason}" if left else ""

    def send(self, run: MlflowRun, run_has_ended: bool) -> bool:
        """Sends what is due until one file fails; returns whether none did."""
        if run_has_ended != self._run_has_ended:  # what failed before is tried again, at once
            self._run_has_ended, self._retry = run_has_ended, Retry(_PAUSE_SECONDS, _PAUSE_SECONDS)
        if not self._is_due():
            return True
        waiting = sorted(self._memory.artifacts, key=lambda item: self._failures[item[0]])
        for item in waiting:
            try:
                with self._retry.attempt():
                    self._send_one(run, *item)
            except Exception as error:
                self._failures[item[0]] += 1
                self._reason = describe_error(error)
                break
            self._failures.pop(item[0], None)
            self._memory.artifacts.remove(item)
        if len(self._memory.artifacts) < len(waiting):
            self._memory.save()
        return self._retry.failures == 0

    def _is_due(self) -> bool:
        if self._run_has_ended:
            return self._retry.is_due()
        all_failed = all(item[0] in self._failures for item in self._memory.artifacts)
        pause_seconds = _PAUSE_IF_ALL_FAILED_SECONDS if all_failed else _PAUSE_SECONDS
        return self._retry.is_due(max(pause_seconds, 10 * self._retry.took_seconds))

    def _send_one(self, run: MlflowRun, name: str, *where: Any) -> None:
        if isinstance(where[0], dict):
            send_entity(run, self._folder, name, where[0])
            return
        path, is_picture = self._folder / name, len(where) > 1
        if path.exists() and path.resolve().is_relative_to(self._folder.resolve()):
            (run.log_image if is_picture else run.log_file)(path, *where)
            return
        _log.warning("%s is not there, or not in the run folder, and is not sent", name)
        if is_picture:  # the newest pictures are kept, and there were many in the meantime
            self._memory.note = f"pictures were removed before they could be sent, such as {name}"
