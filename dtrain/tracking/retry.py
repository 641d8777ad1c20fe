"""When to try again what has failed, and when to give up."""

import contextlib
import time
from collections.abc import Iterator

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 10.0  # after a failure; doubled each time
PATIENCE_SECONDS = 30.0  # without any success, once no rank 0 is there any more


class Retry:
    """Counts failures in a row, which double the pause up to the longest; tells when to try again, when to give up."""

    def __init__(self, first_pause_seconds: float | None = None, longest_pause_seconds: float | None = None) -> None:
        self.failures = 0  # since the last success
        self.took_seconds = 0.0  # by the last try that failed
        self._first_pause_seconds = first_pause_seconds or FIRST_PAUSE_SECONDS
        self._longest_pause_seconds = longest_pause_seconds or LONGEST_PAUSE_SECONDS
        self._pause_seconds = self._first_pause_seconds
        self._failed_at = float("-inf")
        self._give_up_at = float("inf")

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """One try, which has failed if the block raises; the error passes through."""
        began = time.monotonic()
        try:
            yield
        except Exception:
            if self.failures:
                self._pause_seconds = min(2 * self._pause_seconds, self._longest_pause_seconds)
            self.failures += 1
            self._failed_at = time.monotonic()
            self.took_seconds = self._failed_at - began
            raise
        self.failures = 0
        self._failed_at = float("-inf")
        self._pause_seconds = self._first_pause_seconds

    def is_due(self, pause_seconds: float | None = None) -> bool:
        """Whether the pause after the last failure is over, or another pause than the doubled one."""
        return time.monotonic() >= self._failed_at + (self._pause_seconds if pause_seconds is None else pause_seconds)

    def give_up_after(self, seconds: float) -> None:
        """Sets how long from now a try still makes sense; without this, always."""
        self._give_up_at = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the next try would come too late."""
        return max(time.monotonic(), self._failed_at + self._pause_seconds) > self._give_up_at
