"""What a person is told of a run while it lasts: lines in pipes and log files.

`terminal_progress` adds a bar, `time_left` says how long it will take.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from dtrain.reporting.number_text import figure_texts, without_phase
from dtrain.reporting.time_left import EpochClock

REFRESH_SECONDS = 0.5  # between two looks at the clock by `step`
LINE_SECONDS = 30.0  # between two lines of a prediction


class SafeStream:
    """Writes to a stream, and drops what it refuses: a full disk, a reader that has gone away, a missing letter."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Writes what the stream's encoding can express, and the rest as escapes."""
        with self._errors_dropped():
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._errors_dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors_dropped(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The reader has gone (`| head`). Python would fail once more when it flushes at exit: exit status 120.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):
            pass  # no space left for a log, a terminal that hung up, a closed stream


class Progress:
    """Lines with a time stamp, each flushed so that a kill loses none; without a stream it is silent."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = [SafeStream(stream) for stream in streams]
        self._clock = EpochClock()
        self._next_refresh = self._next_line = 0.0
        self._monitor = ""  # the figure that 'best' means

    @contextlib.contextmanager
    def copied_to(self, stream: TextIO) -> Iterator[None]:
        """While the context lasts, write the lines to this stream, too."""
        copy = SafeStream(stream)
        self._streams.append(copy)
        try:
            yield
        finally:
            self._streams.remove(copy)

    def begin(self, facts: Mapping[str, str], monitor: str = "") -> None:
        """Before the first step: what is going to run, name -> value, shown in this order.

        Of an evaluation's figures, the one that is monitored is shown first.
        """
        self._monitor = monitor
        self._write_facts(facts)

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """Count the steps of an epoch (from 1 on), some of them done; `epochs` None: something else ends the run."""
        self._clock.start_epoch(epoch, epochs, steps, done)

    def start_patches(self, patches: int) -> None:
        """Count the patches of a prediction rather than steps; a line now and then says how many are done."""
        self._clock.start_epoch(1, 1, patches, 0)
        self._clock.of_patches = True
        self._next_line = perf_counter() + LINE_SECONDS

    def step(self) -> None:
        """One optimizer step or patch is done: counts (0.1 us), and refreshes at most twice a second."""
        self._clock.done += 1
        if perf_counter() >= self._next_refresh:
            self._refresh_now()

    def _refresh_now(self) -> None:
        self._refresh()
        self._next_refresh = perf_counter() + REFRESH_SECONDS

    def _refresh(self) -> None:
        clock = self._clock
        if clock.of_patches and perf_counter() >= self._next_line:
            self._next_line = perf_counter() + LINE_SECONDS
            self._write(f"{clock.done:,} of {clock.steps:,} patches", clock.left_text())

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The training's figures, such as train/loss, lr, samples_per_second, after so many optimizer steps."""
        clock = self._clock
        self._write(f"epoch {clock.epoch_text()}", f"step {step:,}", *figure_texts(figures).values(), clock.left_text())

    def evaluation(self, phase: str, step: int | None, figures: Mapping[str, float], best: bool = False) -> None:
        """The loss and metrics of an evaluation, the best one so far or not; the phase may stand before their names.

        `step` is that of the weights; None: it is not known.
        """
        texts = figure_texts(without_phase(phase, self._monitored_first(figures))).values()
        self._write(phase, "" if step is None else f"step {step:,}", *texts, "best so far" if best else "")

    def _monitored_first(self, figures: Mapping[str, float]) -> dict[str, float]:
        first = self._monitor
        return {first: figures[first], **figures} if first in figures else dict(figures)

    def note(self, text: str) -> None:
        """A text of one line or several, with a time stamp before each of them."""
        self._write(text)

    def end_epoch(self) -> None:
        """The epoch is over; its last figures have been written."""

    def summary(self, facts: Mapping[str, str]) -> None:
        """After the last step: how it went and where things are, name -> value."""
        self._write_facts(facts)

    def waits_for(self, what: str) -> None:
        """What takes time before there are steps, or after the first one; shown on a terminal; '': nothing any more."""
        if not what:
            self._clock.measure_anew()

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is on the disk, whole; for programs."""

    def ended(self, **fields: Any) -> None:
        """How it went and where things are; for programs."""

    def close(self) -> None:
        """Give back what is held of the terminal; may be called again, and notes may follow."""

    def _write_facts(self, facts: Mapping[str, str]) -> None:
        self._write("\n".join(f"{name}: {value}" for name, value in facts.items()))

    def _write(self, *texts: str) -> None:
        for line in "  ".join(filter(None, texts)).splitlines():
            stamped = "  ".join(filter(None, (time.strftime("%Y-%m-%d %H:%M:%S"), line))) + "\n"
            for stream in self._streams:
                stream.write(stamped)
                stream.flush()
