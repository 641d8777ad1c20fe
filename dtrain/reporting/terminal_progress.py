"""get_progress, and the progress on a terminal, drawn by rich: a bar, and a table with one row per epoch."""

import os
import sys
from collections.abc import Iterator, Mapping
from threading import Event, Thread
from time import perf_counter
from typing import Any, TextIO

from dtrain.reporting.events import OUTPUT, EventProgress
from dtrain.reporting.number_text import count_text, duration_text, figure_text, figure_texts, folded, without_phase
from dtrain.reporting.progress import REFRESH_SECONDS, Progress, SafeStream
from dtrain.reporting.quiet import QuietProgress

BAR_COLUMNS = (6, 40)  # at least, at most
ERASE_BELOW = "\x1b[J"  # and from the cursor on
_early: list["TerminalProgress"] = []  # begun before torch is imported; who asks for a progress gets it


def begin_early(what: str) -> None:
    """On a terminal, say what is waited for before a training has a progress of its own."""
    if os.environ.get(OUTPUT) is None and isinstance(progress := get_progress(True), TerminalProgress):
        _early.append(progress)
        progress.waits_for(what)


def end_early() -> None:
    """Leave nothing of it on the terminal, whatever came first."""
    while _early:
        _early.pop().close()


def get_progress(is_main: bool, stream: TextIO | None = None) -> Progress:
    """Bars and tables on a terminal that can redraw a line, plain lines elsewhere, silence but on the main rank.

    What --json or --quiet asked for comes first.
    """
    if not is_main:
        return Progress()
    if stream is None and _early:
        return _early[-1]
    if stream is None and (output := os.environ.get(OUTPUT)):
        return EventProgress("quiet" in output) if "json" in output else QuietProgress()
    stream = sys.stdout if stream is None else stream
    can_redraw = stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("", "dumb", "unknown")
    return TerminalProgress(stream) if can_redraw else Progress(stream)


class TerminalProgress(Progress):
    """A table of facts, a row per epoch, under them a line with the bar, and at the end a summary.

    The bar is one line and the cursor stays visible: what another process writes in between spoils that line at most,
    and after a kill -9 the terminal is as it was. The cursor stands at the line's beginning: a terminal that is made
    narrower folds the line, and what is then below its first row is erased with it.
    """

    def __init__(self, terminal: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._console = Console(file=SafeStream(terminal), force_terminal=True, highlight=False)  # type: ignore[arg-type]
        self._columns: dict[str, int] = {}  # of the table of epochs, as its last header has them, with their widths
        self._step = 0
        self._trained: dict[str, float] = {}  # the training's latest figures
        self._evaluated: dict[str, float] = {}  # the validation's
        self._row_is_due = False
        self._row_start = (perf_counter(), 0)  # time, steps
        self._waits_for = ("", 0.0)  # what, and since when
        self._ticks: Thread | None = None
        self._wait_is_over = Event()
        self._has_bar = False
        is_stdout = terminal is sys.stdout
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            get_renderable=self._bar,
            redirect_stdout=is_stdout,  # what the user's model prints goes above the bar
            redirect_stderr=is_stdout and sys.stderr.isatty(),  # but `2> errors.log` is meant
        )

    def begin(self, facts: Mapping[str, str], monitor: str = "") -> None:
        """The table before the first step."""
        super().begin(facts, monitor)
        self._end_wait()
        self._print_table(facts)

    def waits_for(self, what: str) -> None:
        """A line, or a bar's last words, that says so and for how long; a thread moves it, as nothing else does."""
        super().waits_for(what)
        if not what:
            self._end_wait()
            return
        self._waits_for = what, perf_counter()
        if self._ticks is None:
            self._live.start()
            self._console.show_cursor(True)
            self._wait_is_over.clear()
            self._ticks = Thread(target=self._tick, name="waiting", daemon=True)
            self._ticks.start()

    def _tick(self) -> None:
        while not self._wait_is_over.is_set():
            self._live.refresh()
            self._wait_is_over.wait(REFRESH_SECONDS / 2)

    def _end_wait(self) -> None:
        """Before the first worker is forked: a lock that the thread holds then would be held for ever there."""
        if self._ticks is not None:
            self._waits_for = "", 0.0
            self._wait_is_over.set()  # so that what follows, as a first step, waits for no tick
            self._ticks.join()
            self._ticks = None
            if not self._has_bar:
                self._live.stop()

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int = 0) -> None:
        """A new bar."""
        self._end_wait()
        self._print_due_row()
        super().start_epoch(epoch, epochs, steps, done)
        self._start_bar()

    def start_patches(self, patches: int) -> None:
        """A new bar."""
        self._end_wait()
        super().start_patches(patches)
        self._start_bar()

    def _refresh(self) -> None:
        super()._refresh()
        self._live.refresh()

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Shown from the next redraw on."""
        super().figures(step, figures)
        self._step = step
        self._trained.update(figures)
        # So that a long evaluation stands under a full bar; an epoch shorter than a refresh needs no such care.
        if self._clock.done >= self._clock.steps and perf_counter() - self._row_start[0] > REFRESH_SECONDS:
            self._live.refresh()

    def evaluation(self, phase: str, step: int | None, figures: Mapping[str, float], best: bool = False) -> None:
        """A row in the table of epochs; of another phase than val, a line."""
        super().evaluation(phase, step, figures, best)
        bare = without_phase(phase, self._monitored_first(figures))
        if phase == "val":
            self._step = step or 0
            self._evaluated = {f"{phase}/{name}": value for name, value in bare.items()}
            self._print_row(folded(self._evaluated), best)
        else:
            self._print_due_row()
            texts = [f"{name} {text}" for name, text in folded(bare).items()]
            self._print("  ".join([phase, *texts, *(["best so far"] if best else [])]), "bold")

    def note(self, text: str) -> None:
        """The text above the bar; long lines are folded."""
        super().note(text)
        self._print(text)

    def end_epoch(self) -> None:
        """The row of this epoch is printed with its evaluation, before or after this, or else without one.

        One that was stopped has none: the training resumes in it.
        """
        self._row_is_due = self._clock.counted > self._row_start[1] and self._clock.done >= self._clock.steps

    def summary(self, facts: Mapping[str, str]) -> None:
        """The facts in a frame; one too long for it, say a command with a path, on a line to be copied in one piece."""
        super().summary(facts)
        self.close()
        width = self._console.width - max(map(len, facts), default=0) - 6  # frame, padding, gap
        long = {name: value for name, value in facts.items() if len(value) > width}
        self._print_table({name: value for name, value in facts.items() if name not in long})
        for name, value in long.items():
            self._print(name, "cyan")
            self._print_above(value, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away and gives sys.stdout back; may be called again."""
        self._end_wait()
        self._print_due_row()
        self._has_bar = False
        self._live.stop()

    def _start_bar(self) -> None:
        self._has_bar = True
        if not self._live.is_started:
            self._row_start = (perf_counter(), self._clock.counted)
            self._live.start()
            self._console.show_cursor(True)  # Live hides it, and a killed process could not bring it back
        self._refresh_now()  # the first batch may be long in coming

    def _print_table(self, facts: Mapping[str, str]) -> None:
        """Facts in a frame; nothing in them is taken for rich's markup."""
        from rich.box import ROUNDED
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(Text(name), Text(value))
        self._print_above(Panel(table, box=ROUNDED, border_style="dim", expand=False))

    def _print(self, text: str, style: str = "") -> None:
        # An address or a path that is longer than a line is left to the terminal to fold, to be copied in one piece.
        is_long = any(len(word) >= self._console.width for word in text.split())
        options: Any = {"soft_wrap": True} if is_long else {"overflow": "fold"}
        self._print_above(text, style=style, markup=False, emoji=False, **options)

    def _print_above(self, text: Any, **options: Any) -> None:
        """Above the bar, which is drawn as it now is."""
        if self._live.is_started:
            self._console.file.write(ERASE_BELOW)
        self._console.print(text, **options)
        self._live.refresh()

    def _print_due_row(self) -> None:
        if self._row_is_due:
            self._print_row(dict.fromkeys(folded(self._evaluated), ""))

    def _print_row(self, evaluated: Mapping[str, str], best: bool = False) -> None:
        """What has happened since the last row, and above it the columns' names when they have changed."""
        from rich.text import Text

        trained = self._trained
        cells = {"epoch": self._clock.epochs_done_text(), "step": f"{self._step:,}"}
        monitored = {name: text for name, text in evaluated.items() if name == self._monitor}
        cells |= monitored
        if "train/loss" in trained:
            cells["loss"] = figure_text(trained["train/loss"])
        cells |= evaluated
        if "samples_per_second" in trained:
            cells["samples/s"] = count_text(trained["samples_per_second"])
        cells |= {"time": duration_text(perf_counter() - self._row_start[0]), "": "best" if best else ""}
        columns = _fitting_columns(cells, self._columns, self._console.width)
        if columns != self._columns:
            self._columns = columns
            header = "  ".join(_aligned(name, name, width) for name, width in columns.items())
            self._print_above(Text(header, "dim", no_wrap=True))
        row = Text(no_wrap=True, overflow="crop")
        for name, width in columns.items():
            row.append("  " if row else "")
            row.append(_aligned(name, cells.get(name, ""), width), _style(name, cells.get(name, "")))
        self._print_above(row)
        self._row_is_due = False
        self._row_start = (perf_counter(), self._clock.counted)

    def _bar(self) -> Any:
        from rich.text import Text

        clock, console = self._clock, self._console
        if not self._has_bar:
            return _Line(Text(self._wait_text(), "dim"))
        head = "patches " if clock.of_patches else f"epoch {clock.epoch_text()} "
        width = console.width - 1 - len(head)
        figures = self._bar_figures(width - BAR_COLUMNS[0])
        columns = max(0, min(width - len(figures), BAR_COLUMNS[1]))
        filled = columns * min(clock.done, clock.steps) // max(clock.steps, 1)
        heavy, light = "=-" if console.options.ascii_only else "━─"  # different without colours, too
        line = Text(head, "bold")
        return _Line(line.append(heavy * filled, "cyan").append(light * (columns - filled), "dim").append(figures))

    def _wait_text(self) -> str:
        what, since = self._waits_for
        return f"{what} ... {duration_text(perf_counter() - since)}" if what else ""

    def _bar_figures(self, width: int) -> str:
        """The text after the bar: as many figures as there is width for, the most important ones first."""
        clock = self._clock
        texts = figure_texts(self._trained)
        if "samples_per_second" in texts:
            texts["samples_per_second"] = texts["samples_per_second"].rjust(15)
        texts |= figure_texts({name: value for name, value in self._evaluated.items() if name != "val/loss"})
        left = clock.left_text() if clock.done < clock.steps else "writing" if clock.of_patches else "evaluating"
        if not clock.counted:
            left = "first batch"
        left = self._wait_text() or left
        count = f" {clock.done:>{len(f'{clock.steps:,}')},}/{clock.steps:,}"
        shown = [count, left.ljust(16)]  # of equal length, so that nothing jumps
        for name in dict.fromkeys(["train/loss", "samples_per_second", *self._evaluated, *texts]):
            if name in texts and len("  ".join([*shown, texts[name]])) <= width:
                shown.insert(-1, texts[name])
        return "  ".join(shown)


class _Line:
    """One line, at whose beginning the cursor stays, and below which there is nothing."""

    def __init__(self, text: Any) -> None:
        self._text = text
        text.no_wrap, text.overflow, text.end = True, "crop", ""

    def __rich_console__(self, *_: Any) -> Iterator[Any]:
        from rich.segment import ControlType, Segment

        yield Segment(ERASE_BELOW, None, [(ControlType.ERASE_IN_LINE, 0)])
        yield self._text
        yield Segment("\r", None, [(ControlType.CARRIAGE_RETURN,)])


def _fitting_columns(cells: Mapping[str, str], before: Mapping[str, int], width: int) -> dict[str, int]:
    """The columns for which a terminal so wide has space, with their widths, which never shrink.

    The figures are left out from the right, others before; how many figures are left out is a column of its own.
    """
    columns = {name: max(_usual_width(name, cell), before.get(name, 0)) for name, cell in cells.items()}
    figures = [name for name in cells if name not in ("epoch", "step", "samples/s", "time", "")]
    hidden = 0
    for dropped in ("step", "samples/s", "time", *reversed(figures)):
        if sum(columns.values()) + 2 * len(columns) - 2 < width:
            break
        columns.pop(dropped, None)
        if dropped in figures:
            best = columns.pop("")
            columns.pop(f"+{hidden} more", None)
            hidden += 1
            more = f"+{hidden} more"
            columns |= {more: len(more), "": best}
    return columns


def _usual_width(name: str, cell: str) -> int:
    """How wide a column is: the widest that its cells usually get."""
    usual = {"time": 10, "step": 7, "": 4, "epoch": len(cell)}.get(name, max(6, len(cell)))
    return max(len(name), usual)


def _aligned(name: str, text: str, width: int) -> str:
    return text.ljust(width) if name == "" else text.rjust(width)


def _style(name: str, cell: str) -> str:
    if cell in ("nan", "inf", "-inf"):
        return "bold red"
    return {"epoch": "bold", "time": "dim", "samples/s": "dim", "step": "dim", "": "bold green"}.get(name, "")
