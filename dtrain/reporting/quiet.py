"""What --quiet leaves: the result alone, and what is said after it. A run folder's log has everything."""

import sys
from collections.abc import Mapping

from dtrain.reporting.progress import Progress, SafeStream


class QuietProgress(Progress):
    """Shows a training's summary, or else what was tested, or the files of a prediction."""

    def __init__(self) -> None:
        super().__init__()
        self._stdout = SafeStream(sys.stdout)
        self._has_begun = self._is_over = False

    def begin(self, facts: Mapping[str, str], monitor: str = "") -> None:
        """A training, whose result is its summary."""
        self._has_begun = True
        super().begin(facts, monitor)

    def evaluation(self, phase: str, step: int | None, figures: Mapping[str, float], best: bool = False) -> None:
        """Shown where it is the result."""
        self._is_over = not self._has_begun
        super().evaluation(phase, step, figures, best)

    def summary(self, facts: Mapping[str, str]) -> None:
        """Shown."""
        self._is_over = True
        super().summary(facts)

    def close(self) -> None:
        """What is noted afterwards, such as the files of a prediction, is shown."""
        self._is_over = True

    def _write(self, *texts: str) -> None:
        super()._write(*texts)
        for line in "  ".join(filter(None, texts)).splitlines() if self._is_over else ():
            self._stdout.write(f"{line}\n")
            self._stdout.flush()
