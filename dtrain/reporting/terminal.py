"""Progress on a terminal: a bar, and a table with one row per epoch."""

import os
import sys
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, TextIO

from dtrain.reporting.lines import EpochClock, LineProgress, Outlet, SilentProgress
from dtrain.reporting.text import count_text, duration_text, figure_pairs, figure_text, figure_texts, without_phase

if TYPE_CHECKING:
    from rich.text import Text

REDRAW_SECONDS = 0.5  # a bar is for eyes; a redraw costs the step under it about a millisecond
BAR_COLUMNS = (6, 40)  # at least, at most


class TerminalProgress:
    """A table of facts, a row per epoch, under them a line with the bar, and at the end a summary.

    The bar is one line and the cursor stays visible: what another process writes in between spoils that line at most,
    and after a kill -9 the terminal is as it was.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=Outlet(stream), force_terminal=True, highlight=False)  # type: ignore[arg-type]
        self._pace = EpochClock()
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
        bare = without_phase(phase, figures)
        if phase == "val":
            self._step = step
            self._evaluated = {f"{phase}/{name}": value for name, value in bare.items()}
            self._print_row({name: figure_text(value) for name, value in self._evaluated.items()}, best)
        else:
            self._print_due_row()
            self._print("  ".join([phase, *figure_texts(bare), *(["best so far"] if best else [])]), "bold")

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
        named = {name: text.rjust(15) if "samples/s" in text else text for name, text in figure_pairs(self._trained)}
        named |= {name: text for name, text in figure_pairs(self._evaluated) if name != "val/loss"}
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


class Rows:
    """The table of epochs: rows that line up under their columns' names."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()

    def lines(self, cells: Mapping[str, str], width: int) -> "Iterator[Text]":
        """The row, and above it the names when they are not those of the row before.

        Args:
            cells: Column's name -> text.
            width: Columns of the terminal; what does not fit is left out, the figures from the right.
        """
        from rich.text import Text

        names = self._fitting(cells, width)
        if names != self._names:
            self._names = names
            yield Text("  ".join(_aligned(name, name, cells[name]) for name in names), "dim", no_wrap=True)
        line = Text(no_wrap=True, overflow="crop")
        for name in names:
            line.append("  " if line else "")
            line.append(_aligned(name, cells[name], cells[name]), _style(name, cells[name]))
        yield line

    @staticmethod
    def _fitting(cells: Mapping[str, str], width: int) -> tuple[str, ...]:
        """The columns for which there is room."""
        names = list(cells)
        droppable = ["time", *(name for name in names if name not in ("epoch", "")), "samples/s", "step"]
        while sum(len(_aligned(name, "", cells[name])) + 2 for name in names) - 2 >= width and droppable:
            name = droppable.pop()
            if name in names:
                names.remove(name)
        return tuple(names)


def _aligned(name: str, text: str, cell: str) -> str:
    """A cell's text as wide as its column: the widest that it usually gets."""
    usual = {"time": 10, "step": 7, "": 4, "epoch": len(cell)}.get(name, 6)
    return text.ljust(usual) if name == "" else text.rjust(max(len(name), usual))


def _style(name: str, cell: str) -> str:
    if cell in ("nan", "inf", "-inf"):
        return "bold red"
    return {"epoch": "bold", "time": "dim", "samples/s": "dim", "step": "dim", "": "bold green"}.get(name, "")
