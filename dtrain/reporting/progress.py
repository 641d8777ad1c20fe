"""get_progress: what a person is told of a run while it lasts."""

import os
import sys
from typing import TextIO

from dtrain.reporting.line_progress import LineProgress
from dtrain.reporting.terminal_progress import TerminalProgress


def get_progress(is_main: bool, stream: TextIO | None = None) -> LineProgress:
    """The right one for this rank and this stream.

    Args:
        is_main: Whether this is the rank that speaks.
        stream: Where to write; sys.stdout if None.

    Returns:
        Bars and tables on a terminal that can redraw a line, plain lines elsewhere, silence on the other ranks.
    """
    if not is_main:
        return LineProgress()
    stream = sys.stdout if stream is None else stream
    can_redraw = stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("", "dumb", "unknown")
    return TerminalProgress(stream) if can_redraw else LineProgress(stream)
