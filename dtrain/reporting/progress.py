"""What a person is told of a run while it lasts: how far it is, how long it will take, and its figures.

Lines in pipes and log files; `terminal_progress` adds a bar.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TextIO

from dtrain.reporting.number_text import duration_text, figure_texts, without_phase

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


class EpochClock:
    """How far a training or a prediction is and how long it still takes: counts steps of this process, or patches."""

    def __init__(self) -> None:
        self.epoch, self.steps = 0, 0  # from 1 on; steps in this epoch
        self.epochs: int | None = None  # None if something else ends the training
        self.done = 0  # of this epoch's steps; whoever does one counts it here
        self.of_patches = False  # else of optimizer steps
        self._before = 0  # steps of the epochs before; only differences of `counted` have a meaning
        self._measured_from: tuple[float, int] | None = None  # time, steps

    @property
    def counted(self) -> int:
        """Steps of this process so far."""
        return self._before + self.done

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int) -> None:
        """Count the steps of another epoch, of which some are done."""
        self._before += self.done - done
        self.epoch, self.epochs, self.steps, self.done = epoch, epochs, steps, done

    def epoch_text(self) -> str:
        """3/20, of equal length in all epochs."""
        return str(self.epoch) if self.epochs is None else f"{self.epoch:>{len(str(self.epochs))}}/{self.epochs}"

    def epochs_done_text(self) -> str:
        """How many epochs are done: 3/20, within an epoch 2.5/20."""
        if self.done >= self.steps:
            return self.epoch_text()
        epochs = f"{self.epoch - 1 + self.done / self.steps:.1f}"
        return epochs if self.epochs is None else f"{epochs}/{self.epochs}"

    def left_text(self) -> str:
        """How long the training, or else this epoch, will still take; empty before that can be known."""
        now = perf_counter()
        if self._measured_from is None:
            self._measured_from = (now, self.counted)  # not from the start: the first step may compile or wait
        since, from_steps = self._measured_from
        if self.counted == from_steps:
            return ""
        left = self.steps - self.done
        if self.epochs is not None:
            left += (self.epochs - self.epoch) * self.steps
        text = duration_text(left * (now - since) / (self.counted - from_steps))
        return f"epoch ends in {text}" if self.epochs is None else f"{text} left"


class Progress:
    """Lines with a time stamp, each flushed so that a kill loses none; without a stream it is silent."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = [SafeStream(stream) for stream in streams]
        self._clock = EpochClock()
        self._next_refresh = self._next_line = 0.0

    @contextlib.contextmanager
    def copied_to(self, stream: TextIO) -> Iterator[None]:
        """While the context lasts, write the lines to this stream, too."""
        copy = SafeStream(stream)
        self._streams.append(copy)
        try:
            yield
        finally:
            self._streams.remove(copy)

    def begin(self, facts: Mapping[str, str]) -> None:
        """Before the first step: what is going to run, name -> value, shown in this order."""
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

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
        """The loss and metrics of an evaluation, the best one so far or not; the phase may stand before their names."""
        texts = figure_texts(without_phase(phase, figures)).values()
        self._write(phase, f"step {step:,}", *texts, "best so far" if best else "")

    def note(self, text: str) -> None:
        """A text of one line or several, with a time stamp before each of them."""
        self._write(text)

    def end_epoch(self) -> None:
        """The epoch is over; its last figures have been written."""

    def summary(self, facts: Mapping[str, str]) -> None:
        """After the last step: how it went and where things are, name -> value."""
        self._write_facts(facts)

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
