"""What of an error a user can change: the lines of their own files that led to it, and what it says, in a line."""

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dtrain.config.errors import one_line

SHOWS_ALL = "DTRAIN_TRACEBACK"  # in the environment, so that ranks have it, too: what --traceback asks for
MOST_FRAMES = 3  # of the user's own on the screen, the innermost
CONTEXT_LINES = 2  # before each frame's line
MOST_CHARACTERS = 500  # of a line of an error's message
# Components apart: a config names them as it names a user's own.
_ENGINE = re.compile(rf"{re.escape(str(Path(__file__).resolve().parents[1]))}/(?!components/)")
_WRAPPER = re.compile(r"/_?contextlib\.py$")  # decorators such as no_grad, around what is called
_INSTALLED = re.compile(r"/(site|dist)-packages/")
# What torch makes of an error in a loader's worker (torch/_utils.py, ExceptionWrapper): the traceback is its message.
_IN_WORKER = re.compile(r"Caught \S+ in DataLoader worker process \d+\.\nOriginal (?=Traceback)")
_FRAME = re.compile(r'^ +File "(.+)", line (\d+), in (.+)$', re.M)


class Frame(NamedTuple):
    """One line of a traceback."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    def lines(self) -> list[str]:
        """For the screen: where it is, and the line with those before it."""
        numbers = range(max(1, self.line - CONTEXT_LINES), self.line + 1)
        texts = {number: linecache.getline(self.file, number).rstrip() for number in numbers}
        shown = [f"  {'>' if number == self.line else ' '} {number:4} {text}" for number, text in texts.items() if text]
        return [str(self), *shown]


def frames_of(error: BaseException) -> list[Frame]:
    """All frames, the innermost last; of an error in a loader's worker those in the worker."""
    if in_worker := _IN_WORKER.search(str(error)):
        found = _FRAME.findall(str(error)[in_worker.end() :])
        return [Frame(file, int(line), function) for file, line, function in found]
    cause = error.__cause__
    chained = frames_of(cause) if cause is not None else []
    return [*chained, *(Frame(item.filename, item.lineno or 0, item.name) for item in _extracted(error))]


def _extracted(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def own_frames(error: BaseException) -> list[Frame]:
    """Those of an error in files that are neither dtrain's engine nor installed."""
    return only_own(frames_of(error))


def only_own(frames: Iterable[Frame]) -> list[Frame]:
    """Those in files that are neither dtrain's engine nor installed."""
    standard = tuple(map(sysconfig.get_path, ("stdlib", "platstdlib")))
    own = [
        frame
        for frame in frames
        if not (_ENGINE.match(frame.file) or _INSTALLED.search(frame.file) or frame.file.startswith(("<", *standard)))
    ]
    # A comprehension is a frame of its own before Python 3.12, at the line of the function that it is in.
    return [frame for outer, frame in zip([None, *own], own, strict=False) if not _is_within(frame, outer)]


def _is_within(frame: Frame, outer: Frame | None) -> bool:
    is_nameless = frame.function in ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
    return is_nameless and outer is not None and frame[:2] == outer[:2]


def place_of_error(error: BaseException) -> str:
    """The innermost line of the user's own, else the innermost of all but the engine; '' if there is none."""
    others = (frame for frame in frames_of(error) if not (_ENGINE.match(frame.file) or _WRAPPER.search(frame.file)))
    frames = own_frames(error) or list(others)
    return str(frames[-1]) if frames else ""


def message_of(error: BaseException) -> str:
    """What an error says, with its notes; of one in a loader's worker what it said there, without the traceback."""
    if in_worker := _IN_WORKER.search(text := str(error)):
        lines = text[in_worker.end() :].splitlines()
        after = next(index for index in reversed(range(len(lines))) if lines[index].startswith(" ")) + 1
        kind = type(error).__name__
        text = "\n".join(re.sub(rf"^([\w.]+\.)?{kind}(: |$)", "", line) for line in lines[after:])
    return "\n".join([text, *getattr(error, "__notes__", [])]).strip()


def one_line_of(error: BaseException) -> str:
    """`ValueError: the first line (while loading sample 37 of Digits)`."""
    return in_one_line(type(error).__name__, message_of(error))


def in_one_line(kind: str, message: str) -> str:
    """The same of an error's class and its message with notes."""
    first, *rest = message.splitlines() or [""]
    sample = next((line for line in reversed(rest) if line.startswith("while loading ")), "")
    return (f"{kind}: {first[:MOST_CHARACTERS]}" if first else kind) + (f" ({sample})" if sample else "")


def frame_lines(error: BaseException) -> list[str]:
    """The innermost of the user's own frames, for the screen."""
    frames = own_frames(error)
    lines = [line for frame in frames[-MOST_FRAMES:] for line in frame.lines()]
    more = len(frames) - MOST_FRAMES
    return [f"({more} more of your own files above these)", *lines] if more > 0 else lines


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line, without the source line that Python adds; of dtrain's own without a place."""
    place = "" if _ENGINE.match(filename) else f" ({filename}:{lineno})"
    kind = "warning" if category is UserWarning else category.__name__
    return one_line(f"{kind}: {message}{place}") + "\n"


def whole_traceback(error: BaseException) -> str:
    """All of it, as Python prints it."""
    return "".join(traceback.format_exception(error))
