"""Progress as plain lines, in a pipe or a file, and no progress at all."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TextIO

from dtrain.reporting.text import duration_text, figure_texts, without_phase

LINE_SECONDS = 30.0  # between two lines of a prediction


class SilentProgress:
    """Shows nothing, for every rank but 0. It has the others' methods and no more: a wrong call fails on every rank."""

    def begin(self, facts: Mapping[str, str]) -> None:
        """See TerminalProgress."""

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """See TerminalProgress."""

    def start_patches(self, patches: int) -> None:
        """See TerminalProgress."""

    def step(self) -> None:
        """See TerminalProgress."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See TerminalProgress."""

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
        """See TerminalProgress."""

    def note(self, text: str) -> None:
        """See TerminalProgress."""

    def end_epoch(self) -> None:
        """See TerminalProgress."""

    def summary(self, facts: Mapping[str, str]) -> None:
        """See TerminalProgress."""

    def close(self) -> None:
        """See TerminalProgress."""


class LineProgress:
    """Plain lines with a time stamp, one per log step, evaluation and note; each is flushed, so a kill loses none."""

    def __init__(self, stream: TextIO) -> None:
        self._outlet = Outlet(stream)
        self._pace = EpochClock()
        self._next_line = 0.0

    def begin(self, facts: Mapping[str, str]) -> None:
        """One line per fact."""
        for key, value in facts.items():
            self.note(f"{key}: {value}")

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """Counts from here on; writes nothing."""
        self._pace.start_epoch(epoch, epochs, steps, done)

    def start_patches(self, patches: int) -> None:
        """Counts patches from here on; a line now and then says how many are done."""
        self._pace.start_patches(patches)
        self._next_line = perf_counter() + LINE_SECONDS

    def step(self) -> None:
        """Counts one optimizer step; writes nothing, but for patches a line now and then."""
        self._pace.done += 1
        if self._pace.of_patches and perf_counter() >= self._next_line:
            self._next_line = perf_counter() + LINE_SECONDS
            self._write(f"{self._pace.done:,} of {self._pace.steps:,} patches", self._pace.left_text())

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: where the training is, its figures, how long it will take."""
        place = f"epoch {self._pace.epoch_text()}", f"step {step:,}"
        self._write(*place, *figure_texts(figures), self._pace.left_text())

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
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

    def _write(self, *parts: str) -> None:
        self._outlet.write("  ".join([time.strftime("%Y-%m-%d %H:%M:%S"), *filter(None, parts)]) + "\n")
        self._outlet.flush()


class EpochClock:
    """How far the training is and how fast it goes, counted in the optimizer steps of this process, or in patches."""

    def __init__(self) -> None:
        self.epoch, self.steps, self.done = 0, 0, 0
        self.of_patches = False  # else of optimizer steps
        self.epochs: int | None = None
        self._earlier = 0  # steps of the epochs before; with `done` all that counts is differences
        self._measured_from: tuple[float, int] | None = None  # time, steps
        self._row_from = (perf_counter(), 0)

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int) -> None:
        """Count the steps of another epoch, of which some are done."""
        if not self.steps:
            self._row_from = (perf_counter(), 0)
        self._earlier += self.done - done
        self.epoch, self.epochs, self.steps, self.done = epoch, epochs, steps, done
        self.of_patches = False

    def start_patches(self, patches: int) -> None:
        """Count patches instead of steps."""
        self.start_epoch(1, 1, patches, 0)
        self.of_patches = True

    def epoch_text(self) -> str:
        """3/20, of equal length in all epochs."""
        return str(self.epoch) if self.epochs is None else f"{self.epoch:>{len(str(self.epochs))}}/{self.epochs}"

    def left_text(self) -> str:
        """How long the training, or else this epoch, will still take; empty before that can be known."""
        now, steps = perf_counter(), self._earlier + self.done
        if self._measured_from is None:
            self._measured_from = (now, steps)  # not from the start: the first step may compile, or wait for loaders
        since, from_steps = self._measured_from
        if steps == from_steps:
            return ""
        left = self.steps - self.done + (0 if self.epochs is None else (self.epochs - self.epoch) * self.steps)
        text = duration_text(left * (now - since) / (steps - from_steps))
        return f"epoch ends in {text}" if self.epochs is None else f"{text} left"

    def row_steps(self) -> int:
        """Steps since the last row."""
        return self._earlier + self.done - self._row_from[1]

    def row_seconds(self) -> float:
        """Seconds since the last row."""
        return perf_counter() - self._row_from[0]

    def row_text(self) -> str:
        """How many epochs are done: 3/20, within an epoch 2.5/20."""
        if self.done >= self.steps:
            return self.epoch_text()
        epochs = f"{self.epoch - 1 + self.done / self.steps:.1f}"
        return epochs if self.epochs is None else f"{epochs}/{self.epochs}"

    def start_row(self) -> None:
        """The next row counts from here."""
        self._row_from = (perf_counter(), self._earlier + self.done)


class Outlet:
    """A stream whose errors stay here."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Writes what the stream's encoding can express, and the rest as escapes."""
        with self._forgiving():
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._forgiving():
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The reader went away (`| head`). Python would fail once more when it flushes at its end: exit status 120.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):
            pass  # no space left for a log, a terminal that hung up, a closed stream
