"""The table of epochs on a terminal, row by row; knows no figures' meaning and no training."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


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
