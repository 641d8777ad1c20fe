"""A run's progress as plain lines, for a pipe or a log file."""

import time
from collections.abc import Mapping
from time import perf_counter
from typing import TextIO

from dtrain.reporting.epoch_clock import EpochClock
from dtrain.reporting.number_text import figure_texts, without_phase
from dtrain.reporting.safe_stream import SafeStream

LINE_SECONDS = 30.0  # between two lines of a prediction


class LogLines:
    """Lines with a time stamp, one per log step, evaluation and note; each is flushed, so a kill loses none."""

    def __init__(self, stream: TextIO, clock: EpochClock) -> None:
        self._stream, self._clock = SafeStream(stream), clock
        self._next_line = 0.0

    def begin(self, facts: Mapping[str, str]) -> None:
        """One line per fact."""
        for name, value in facts.items():
            self.note(f"{name}: {value}")

    def start(self) -> None:
        """Writes nothing; the first line about patches comes after a while."""
        self._next_line = perf_counter() + LINE_SECONDS

    def refresh(self) -> None:
        """Of a prediction, a line now and then."""
        clock = self._clock
        if clock.of_patches and perf_counter() >= self._next_line:
            self._next_line = perf_counter() + LINE_SECONDS
            self._write(f"{clock.done:,} of {clock.steps:,} patches", clock.left_text())

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: where the training is, its figures, how long it will take."""
        clock = self._clock
        self._write(f"epoch {clock.epoch_text()}", f"step {step:,}", *figure_texts(figures), clock.left_text())

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool) -> None:
        """One line: the phase, the step, its figures."""
        texts = figure_texts(without_phase(phase, figures))
        self._write(phase, f"step {step:,}", *texts, "best so far" if best else "")

    def note(self, text: str) -> None:
        """The text, with a time stamp before each of its lines."""
        for line in text.splitlines():
            self._write(line)

    def end_epoch(self) -> None:
        """Writes nothing: the epoch's last figures have been written."""

    def summary(self, facts: Mapping[str, str]) -> None:
        """One line per fact."""
        self.begin(facts)

    def close(self) -> None:
        """Nothing is held open."""

    def _write(self, *texts: str) -> None:
        self._stream.write("  ".join([time.strftime("%Y-%m-%d %H:%M:%S"), *filter(None, texts)]) + "\n")
        self._stream.flush()
