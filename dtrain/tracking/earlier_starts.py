"""What a journal holds of earlier starts: how many there were, and the last step of each figure."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.tracking.run_folder import read_line

_BLOCK_BYTES = 2**20
_MOST_FORMS = 50  # of lines that are known; beyond that, looking for one of them takes longer than parsing the line
_NUMBER = rb"-?\d++(?:\.\d++)?+(?:e[+-]?\d++)?+"
_FIGURE = rb'(?:%b|"[a-z-]+")' % _NUMBER  # as text: nan, inf, -inf


def read_earlier(path: Path) -> tuple[int, dict[str, int]]:
    """Cuts off a last line that was torn by a kill; returns which start this is, and the last step of each figure."""
    attempt, whole = 1, 0
    steps: dict[str, int] = {}
    known = _KnownLines()
    with path.open("a+b") as file:
        file.seek(0)
        while text := file.read(_BLOCK_BYTES) + file.readline():
            text, place = text[: text.rfind(b"\n") + 1], 0
            whole += len(text)
            while (place := known.pass_over(text, place, steps)) < len(text):
                line = text[place : text.index(b"\n", place) + 1]
                place += len(line)
                entry = read_line(line)
                if entry.get("kind") == "start":
                    attempt += 1
                    go_back(steps, entry.get("from_step"))
                _take(entry, steps)
                known.learn(entry)
        if file.tell() > whole:
            file.truncate(whole)  # that figure was never acknowledged
    return attempt, steps


def go_back(steps: dict[str, int], step: int | None) -> None:
    """Forget, of the last step of each figure, what follows a step from which a training was continued otherwise."""
    if step is not None:
        steps.update({key: min(last, step) for key, last in steps.items()})


def _figures(entry: Mapping[str, Any]) -> list[str]:
    """The keys that a line of the journal has figures or a picture of."""
    kind = entry.get("kind")
    return [*entry.get("values", ())] if kind == "metrics" else [entry["key"]] if kind == "image" else []


def _take(entry: Mapping[str, Any], steps: dict[str, int]) -> None:
    for key in _figures(entry):
        steps[key] = max(entry["step"], steps.get(key, entry["step"]))


class _KnownLines:
    """Lines of the same figures as one that was parsed; a pattern passes over all that follow, several times as fast.

    Every byte is compared: what has another form, or is damaged, is parsed like the first. Of each form the last line
    is parsed, too. It has the highest step, to which `Journal.log` sees: within one start, steps of a figure only rise.
    """

    def __init__(self) -> None:
        self._forms: dict[tuple[str, ...], bytes] = {}  # by its figures
        self._pattern = re.compile(b"")

    def learn(self, entry: Mapping[str, Any]) -> None:
        """Know lines with these figures from now on."""
        keys = tuple(_figures(entry))
        if entry.get("kind") != "metrics" or keys in self._forms or len(self._forms) >= _MOST_FORMS:
            return
        values = b", ".join(re.escape(json.dumps(key).encode()) + b": " + _FIGURE for key in keys)
        begins = rb'\{"kind": "metrics", "time": %b, "step": \d++, "values": \{' % _NUMBER
        # The group, which is empty, is where the last line of the form ends. A group that something follows would not
        # do: Python's `re` leaves in it what a line of another form had there.
        self._forms[keys] = begins + values + rb"\}\}\n()"
        self._pattern = re.compile(b"(?:%b)*+" % b"|".join(self._forms.values()))

    def pass_over(self, text: bytes, place: int, steps: dict[str, int]) -> int:
        """Where the known lines end that begin at a place; `steps` gets the last step of each of their figures."""
        match = self._pattern.match(text, place)
        assert match is not None  # of none, the empty one
        for end in filter(lambda end: end > 0, map(match.end, range(1, len(self._forms) + 1))):
            line = text[max(place, text.rfind(b"\n", place, end - 1) + 1) : end]
            _take(read_line(line), steps)
        return match.end()
