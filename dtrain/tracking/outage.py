"""What the sender tells rank 0 of a store that does not answer: one line when it matters, one when that is over."""

import contextlib
import os
import re
import threading
import time

from dtrain.tracking.secrets import redact
from dtrain.tracking.uri import sqlite_file

ANSWER_SECONDS = 5.0  # so long the first answer may take; an address where nobody is may take minutes to fail
MAKING_SECONDS = 60.0  # of a store of files, which fail at once; its tables are made first, on a busy machine slowly
OUTAGE_SECONDS = 30.0  # of a store that has answered before: what is shorter needs nobody's attention
_ANSWER = re.compile(
    r"API request to .* failed with error code (\d+) != \d+\. Response body: '(.*)", re.DOTALL
)  # perhaps its first line alone
_WHO = "; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, say who you are"
_CURES = {"401": _WHO, "403": _WHO, "404": "; this may not be MLflow's address"}


def with_cure(problem: str) -> str:
    """What MLflow's client says of a server that answers otherwise than it should, shorter and with what may help."""
    if answer := _ANSWER.match(problem):
        status, body = answer[1], " ".join(answer[2].split()).removesuffix("'")
        said = f": {body}" if body and not body.startswith("<") else ""  # a page for browsers
        return f"the server answers {status}{said[:200]}{_CURES.get(status, '')}"
    if "WRONG_VERSION_NUMBER" in problem or "RECORD_LAYER_FAILURE" in problem:
        return f"{problem}; does the server speak http rather than https?"
    return problem


class Outage:
    """Follows whether a store answers, for the person at rank 0's console.

    Args:
        uri: The store's address.
        pipe: A file descriptor at whose other end rank 0 listens. None: nobody does.
        service: What the store is called.
        kept: What becomes of what it does not take.
        seconds: How long a store that has answered before may be away without a line.
    """

    def __init__(
        self,
        uri: str,
        pipe: int | None = None,
        service: str = "MLflow",
        kept: str = "what is logged is kept and sent later",
        seconds: float | None = None,
    ) -> None:
        self._given_seconds = seconds
        self._who, self._kept, self._pipe = f"{service} ({redact(uri)})", kept, pipe
        self._began: float | None = time.monotonic() - self._seconds  # at first, any failure is worth a line
        self._is_told = False
        self._lock = threading.Lock()
        seconds = ANSWER_SECONDS if sqlite_file(uri) is None else MAKING_SECONDS
        self._timer = threading.Timer(seconds, self.fails, [f"no answer within {seconds:g} s"])
        if pipe is not None:
            os.set_blocking(pipe, False)  # should nobody listen
            self._timer.daemon = True
            self._timer.start()

    @property
    def _seconds(self) -> float:
        return OUTAGE_SECONDS if self._given_seconds is None else self._given_seconds

    def fails(self, problem: str) -> None:
        """The store does not take what it is sent, and why."""
        self._timer.cancel()
        with self._lock:
            self._began = time.monotonic() if self._began is None else self._began
            if not self._is_told and time.monotonic() - self._began >= self._seconds:
                self._is_told = True
                self.tell(f"{self._who}: {problem}; {self._kept}")

    def is_over(self) -> None:
        """The store has taken something."""
        self._timer.cancel()
        with self._lock:
            if self._is_told:
                self.tell(f"{self._who} answers; what was kept is sent")
            self._is_told, self._began = False, None

    def tell(self, line: str) -> None:
        """Hand rank 0 a line for the person at its console."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # rank 0 has ended
                os.write(self._pipe, " ".join(line.split()).encode() + b"\n")
