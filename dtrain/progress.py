"""What a person sees: a bar and tables on a terminal, plain lines in a pipe or a batch log, nothing off rank 0.

Knows no torch, no ranks, no config and no trainer: it is told texts and figures. It starts no thread, and never raises
into the training because of its stream: a closed terminal or a full disk costs the picture, not the run.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, TextIO

from dtrain.rows import Rows

if TYPE_CHECKING:
    from rich.text import Text

LINE_SECONDS = 30.0  # between two lines of a prediction
REDRAW_SECONDS = 0.5  # a bar is for eyes; a redraw costs the step under it about a millisecond
BAR_COLUMNS = (6, 40)  # at least, at most


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
        self._outlet = _Outlet(stream)
        self._pace = _Pace()
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
        self._write(f"epoch {self._pace.epoch_text()}", f"step {step:,}", *_named(figures), self._pace.left_text())

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
        """One line: the phase, the step, its figures."""
        self._write(phase, f"step {step:,}", *_named(_bare(phase, figures)), "best so far" if best else "")

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


class TerminalProgress:
    """A table of facts, a row per epoch, under them a line with the bar, and at the end a summary.

    The bar is one line and the cursor stays visible: what another process writes in between spoils that line at most,
    and after a kill -9 the terminal is as it was.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=_Outlet(stream), force_terminal=True, highlight=False)  # type: ignore[arg-type]
        self._pace = _Pace()
        self._rows = Rows()
        self._next_redraw = 0.0
        self._step = 0
        self._trained: dict[str, float] = {}  # the training's latest figures
        self._evaluated: dict[str, float] = {}  # the validation's
        self._row_is_due = False
        ours = stream is sys.stdout
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            get_renderable=self._bar,
            redirect_stdout=ours,  # what the user's model prints goes above the bar
            redirect_stderr=ours and sys.stderr.isatty(),  # but `2> errors.log` is meant
        )

    def begin(self, facts: Mapping[str, str]) -> None:
        """The table before the first step.

        Args:
            facts: What is going to run, name -> value, shown in this order. Long values are folded.
        """
        self._print_table(facts)

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """A new bar.

        Args:
            epoch: Which one, from 1 on.
            epochs: How many there will be; None if something else ends the training.
            steps: Optimizer steps in this epoch.
            done: How many of them an earlier run has done already.
        """
        self._print_due_row()
        self._pace.start_epoch(epoch, epochs, steps, done)
        self._start_bar()

    def start_patches(self, patches: int) -> None:
        """A bar for a prediction rather than a training; `step` counts one patch.

        Args:
            patches: How many there are.
        """
        self._pace.start_patches(patches)
        self._start_bar()

    def step(self) -> None:
        """One optimizer step is done: counts (0.1 us), and redraws at most twice a second."""
        self._pace.done += 1
        if perf_counter() >= self._next_redraw:
            self._redraw()

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The training's figures at a log step, shown from the next redraw on.

        Args:
            step: Optimizer steps done since the training began.
            figures: Such as train/loss, lr, samples_per_second.
        """
        self._step = step
        self._trained.update(figures)
        # So that a long evaluation stands under a full bar; an epoch shorter than a redraw's pause needs no such care.
        if self._pace.done >= self._pace.steps and self._pace.row_seconds() > REDRAW_SECONDS:
            self._redraw()

    def evaluation(self, phase: str, step: int, figures: Mapping[str, float], best: bool = False) -> None:
        """A row in the table of epochs; of another phase than val, a line.

        Args:
            phase: val, test ...
            step: Optimizer steps done since the training began.
            figures: Loss and metrics; the phase may stand before their names.
            best: Whether this is the best evaluation so far.
        """
        bare = _bare(phase, figures)
        if phase == "val":
            self._step = step
            self._evaluated = {f"{phase}/{name}": value for name, value in bare.items()}
            self._print_row({name: figure_text(value) for name, value in self._evaluated.items()}, best)
        else:
            self._print_due_row()
            self._print("  ".join([phase, *_named(bare), *(["best so far"] if best else [])]), "bold")

    def note(self, text: str) -> None:
        """A text above the bar.

        Args:
            text: One line or several; long ones are folded.
        """
        self._print(text)

    def end_epoch(self) -> None:
        """The epoch is over. Its row is printed with its evaluation, before or after this, or else without one."""
        self._row_is_due = self._pace.row_steps() > 0

    def summary(self, facts: Mapping[str, str]) -> None:
        """The table after the last step; the bar is taken away.

        Args:
            facts: How it went and where things are, name -> value. What is too long for the table, say a command with
                a path, follows it on a line of its own that can be copied in one piece.
        """
        self.close()
        room = self._console.width - max(map(len, facts), default=0) - 6  # frame, padding, gap
        long = {key: value for key, value in facts.items() if len(value) > room}
        self._print_table({key: value for key, value in facts.items() if key not in long})
        for key, value in long.items():
            self._print(key, "cyan")
            self._console.print(value, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away and gives sys.stdout back; may be called again."""
        self._print_due_row()
        self._live.stop()

    def _start_bar(self) -> None:
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # Live hides it, and a killed process could not bring it back

    def _redraw(self) -> None:
        self._live.refresh()
        self._next_redraw = perf_counter() + REDRAW_SECONDS

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, emoji=False, overflow="fold")

    def _print_due_row(self) -> None:
        if self._row_is_due:
            self._print_row(dict.fromkeys(self._evaluated, ""))

    def _print_row(self, evaluated: Mapping[str, str], best: bool = False) -> None:
        """What has happened since the last row."""
        trained, pace = self._trained, self._pace
        cells = {"epoch": pace.row_text(), "step": f"{self._step:,}"}
        if "train/loss" in trained:
            cells["loss"] = figure_text(trained["train/loss"])
        cells |= evaluated
        if "samples_per_second" in trained:
            cells["samples/s"] = count_text(trained["samples_per_second"])
        cells |= {"time": duration_text(pace.row_seconds()), "": "best" if best else ""}
        for line in self._rows.lines(cells, self._console.width):
            self._console.print(line)
        self._row_is_due = False
        pace.start_row()

    def _print_table(self, facts: Mapping[str, str]) -> None:
        """Facts in a frame; nothing in them is taken for rich's markup."""
        from rich.box import ROUNDED
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in facts.items():
            table.add_row(Text(key), Text(value))
        self._console.print(Panel(table, box=ROUNDED, border_style="dim", expand=False))

    def _bar(self) -> "Text":
        """The line with the bar: as many figures as the terminal is wide, the most important ones first."""
        from rich.text import Text

        pace, console = self._pace, self._console
        head = "patches " if pace.of_patches else f"epoch {pace.epoch_text()} "
        named = {name: text.rjust(15) if "samples/s" in text else text for name, text in _pairs(self._trained)}
        named |= {name: text for name, text in _pairs(self._evaluated) if name != "val/loss"}
        left = pace.left_text() if pace.done < pace.steps else "writing" if pace.of_patches else "evaluating"
        tail = [f" {pace.done:>{len(f'{pace.steps:,}')},}/{pace.steps:,}", left.ljust(16)]  # so that nothing jumps
        room = console.width - 1 - len(head) - BAR_COLUMNS[0]
        for name in dict.fromkeys(["train/loss", "samples_per_second", *self._evaluated, *named]):
            if name in named and len("  ".join([*tail, named[name]])) <= room:
                tail.insert(-1, named[name])
        text = "  ".join(tail)
        columns = max(0, min(console.width - 1 - len(head) - len(text), BAR_COLUMNS[1]))
        full = columns * min(pace.done, pace.steps) // max(pace.steps, 1)
        heavy, light = "=-" if console.options.ascii_only else "━─"  # told apart without colours, too
        line = Text(head, "bold", no_wrap=True, overflow="crop")
        return line.append(heavy * full, "cyan").append(light * (columns - full), "dim").append(text)


Progress = SilentProgress | LineProgress | TerminalProgress


def get_progress(is_main: bool, stream: TextIO | None = None) -> Progress:
    """The right one for this rank and this stream.

    Args:
        is_main: Whether this is the rank that speaks.
        stream: Where to write; sys.stdout if None.

    Returns:
        Bars and tables on a terminal that can redraw a line, plain lines elsewhere, silence on the other ranks.
    """
    if not is_main:
        return SilentProgress()
    stream = sys.stdout if stream is None else stream
    can_redraw = stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("", "dumb", "unknown")
    return TerminalProgress(stream) if can_redraw else LineProgress(stream)


def count_text(count: float) -> str:
    """A number of things: 68,946 as a whole number; other figures with three digits, as 0.25, 12.3k or 1.23M."""
    if isinstance(count, int):
        return f"{count:,}"
    if not math.isfinite(count):
        return str(count)
    units = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9))
    unit, size = next((pair for pair in units if abs(count) < 999.5 * pair[1]), units[-1])
    return f"{count / size:.3g}{unit}"


def duration_text(seconds: float) -> str:
    """A time in its two largest units: 4.1 s, 42 s, 1 min 05 s, 1 h 02 min, 2 d 03 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    for name, size, lower_name, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // lower_size:02} {lower_name}"
    return f"{whole} s"


def figure_text(value: float) -> str:
    """A loss or a metric with five digits, 0.3124 or 2.303e-05; whatever is no number as it prints itself."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if number == 0 or not math.isfinite(number):
        return str(number)
    size = math.floor(math.log10(abs(number)))
    return f"{number:.{min(4, 4 - size)}f}" if -2 <= size <= 4 else f"{number:.3e}"


def _pairs(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(name, what to show for it) of each figure."""
    for name, value in figures.items():
        if name == "samples_per_second":
            yield name, f"{count_text(float(value))} samples/s"
        elif name == "lr":
            yield name, f"lr {value:.3g}"
        else:
            yield name, f"{name.removeprefix('train/')} {figure_text(value)}"


def _named(figures: Mapping[str, float]) -> list[str]:
    return [text for _, text in _pairs(figures)]


def _bare(phase: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures without the phase before their names."""
    return {name.removeprefix(f"{phase}/"): value for name, value in figures.items()}


class _Pace:
    """How far the training is and how fast it goes, counted in the optimizer steps of this process, or in patches."""

    def __init__(self) -> None:
        self.epoch, self.steps, self.done = 0, 0, 0
        self.of_patches = False  # else of optimizer steps
        self.epochs: int | None = None
        self._earlier = 0  # steps of the epochs before; with `done` all that counts is differences
        self._measured_from: tuple[float, int] | None = None  # time, steps
        self._row_from = (perf_counter(), 0)

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int) -> None:
        if not self.steps:
            self._row_from = (perf_counter(), 0)
        self._earlier += self.done - done
        self.epoch, self.epochs, self.steps, self.done = epoch, epochs, steps, done
        self.of_patches = False

    def start_patches(self, patches: int) -> None:
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


class _Outlet:
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
        with self._forgiving():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
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
