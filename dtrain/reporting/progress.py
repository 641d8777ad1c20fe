"""What a person is told of a run while it lasts: a bar on a terminal, lines elsewhere, silence on other ranks."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TextIO

from dtrain.reporting.epoch_clock import EpochClock
from dtrain.reporting.log_lines import LogLines
from dtrain.reporting.terminal import REDRAW_SECONDS, TerminalDisplay


class Progress:
    """Counts the steps, and passes what happens on to its sinks.

    Args:
        stream: What the first sink writes to; None: there is none, and all is silent.
        on_terminal: Whether the stream is a terminal that can redraw a line.
    """

    def __init__(self, stream: TextIO | None = None, on_terminal: bool = False) -> None:
        self._clock = EpochClock()
        self._sinks: list[LogLines | TerminalDisplay] = []
        self._next_refresh = 0.0
        if stream is not None:
            self._sinks.append((TerminalDisplay if on_terminal else LogLines)(stream, self._clock))

    @contextlib.contextmanager
    def copied_to(self, stream: TextIO) -> Iterator[None]:
        """While the context lasts, write plain lines to this stream, too."""
        copy = LogLines(stream, self._clock)
        self._sinks.append(copy)
        try:
            yield
        finally:
            self._sinks.remove(copy)

    def begin(self, facts: Mapping[str, str]) -> None:
        """The table before the first step.

        Args:
            facts: What is going to run, name -> value, shown in this order. Long values are folded.
        """
        for sink in self._sinks:
            sink.begin(facts)

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """A new bar.

        Args:
            epoch: Which one, from 1 on.
            epochs: How many there will be; None if something else ends the training.
            steps: Optimizer steps in this epoch.
            done: How many of them an earlier run has done already.
        """
        for sink in self._sinks:
            sink.start()
        self._clock.start_epoch(epoch, epochs, steps, done)

    def start_patches(self, patches: int) -> None:
        """A bar for a prediction of so many patches rather than a training; `step` counts one patch."""
        for sink in self._sinks:
            sink.start()
        self._clock.start_patches(patches)

    def step(self) -> None:
        """One optimizer step is done: counts (0.1 us), and has the sinks look at the count at most twice a second."""
        self._clock.done += 1
        if perf_counter() >= self._next_refresh:
            for sink in self._sinks:
                sink.refresh()
            self._next_refresh = perf_counter() + REDRAW_SECONDS

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The training's figures at a log step.

        Args:
            step: Optimizer steps done since the training began.
            figures: Such as train/loss, lr, samples_per_second.
        """
        for sink in self._sinks:
            sink.figures(step, figures)

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
        """The figures of an evaluation.

        Args:
            phase: val, test ...
            step: Optimizer steps done since the training began.
            figures: Loss and metrics; the phase may stand before their names.
            best: Whether this is the best evaluation so far.
        """
        for sink in self._sinks:
            sink.evaluation(phase, step, figures, best)

    def note(self, text: str) -> None:
        """A text of one line or several."""
        for sink in self._sinks:
            sink.note(text)

    def end_epoch(self) -> None:
        """The epoch is over."""
        for sink in self._sinks:
            sink.end_epoch()

    def summary(self, facts: Mapping[str, str]) -> None:
        """The table after the last step: how it went and where things are, name -> value."""
        for sink in self._sinks:
            sink.summary(facts)

    def close(self) -> None:
        """Takes the bar away and gives sys.stdout back; may be called again, and notes may follow."""
        for sink in self._sinks:
            sink.close()


def get_progress(is_main: bool, stream: TextIO | None = None) -> Progress:
    """The right one for this rank and this stream.

    Args:
        is_main: Whether this is the rank that speaks.
        stream: Where to write; sys.stdout if None.

    Returns:
        Bars and tables on a terminal that can redraw a line, plain lines elsewhere, silence on the other ranks.
    """
    if not is_main:
        return Progress()
    stream = sys.stdout if stream is None else stream
    can_redraw = stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("", "dumb", "unknown")
    return Progress(stream, can_redraw)
