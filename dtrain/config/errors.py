"""What a mistake is, where it stands, and the words of its message."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_SHOWN = 60  # characters of a value in a message
KeyPath = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a key was written: a file with line and column (from 1), or a command-line argument (line 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Mistake(NamedTuple):
    """One thing that is wrong with a config, in one line."""

    text: str
    place: Place | None = None

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.text}" if self.place else self.text)


class ConfigError(Exception):
    """The config or the command line is wrong; holds every mistake that was found. Exit status 2."""

    def __init__(self, mistakes: Iterable[Mistake] | Mistake | str, place: Place | None = None) -> None:
        if isinstance(mistakes, str):
            mistakes = Mistake(mistakes, place)
        self.mistakes = [mistakes] if isinstance(mistakes, Mistake) else list(dict.fromkeys(mistakes))
        super().__init__("\n".join(map(str, self.mistakes)))


def one_line(text: str) -> str:
    """The text without line breaks, and without characters that a terminal would obey."""
    text = " ".join(text.split())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def bad_syntax(error: SyntaxError) -> str:
    """What is wrong with a Python file, and where."""
    return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"


def first_few(items: Sequence[str], limit: int, separator: str = ", ") -> str:
    """The first items of a list in one text: `a, b and 3 more`, or with semicolons `a; b; and 3 more`."""
    text = separator.join(items[:limit])
    if len(items) <= limit:
        return text
    return f"{text}{'' if separator == ', ' else separator.rstrip()} and {len(items) - limit} more"


def dotted(path: Sequence[str | int]) -> str:
    """('loaders', 'train', 0) -> 'loaders.train.0'."""
    return ".".join(map(str, path))


def shown(value: Any) -> str:
    """A value as YAML would have it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(to_plain(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def found(value: Any) -> str:
    """`found string 'abc'`, `found null`: the end of a message about a value of a wrong type."""
    return "found null" if value is None else f"found {type_name(value)} {shown(value)}"


def type_name(value: Any) -> str:
    """What a user calls the type of a YAML value that is not null."""
    return "mapping" if is_mapping(value) else "string" if isinstance(value, str) else type(value).__name__


def is_mapping(value: Any) -> bool:
    """A mapping of any kind; a ConfigDict does not inherit from Mapping."""
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def to_plain(value: Any) -> Any:
    """A copy in plain dicts and lists (ConfigDict's own to_dict shares lists and skips dicts inside them)."""
    if is_mapping(value):
        return {key: to_plain(value[key]) for key in value}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def mark_section(error: BaseException, section: str) -> None:
    """Note, on its way, from which section of the config an error came: `error.section`. The innermost mark counts."""
    if not hasattr(error, "section"):
        error.section = section  # type: ignore[attr-defined]
