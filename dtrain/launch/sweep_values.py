"""What a sweep's `KEY=VALUES` means: some values, all of which are tried, or a range from which numbers are drawn."""

import re
from typing import NamedTuple

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, shown

MOST = 1000  # trials of one grid
FORMS = {  # the words, with what stands in their brackets
    "range": "range(first, end, step), Python's",
    "choice": "choice(A, B, ...)",
    "uniform": "uniform(low, high, step)",
    "loguniform": "loguniform(low, high)",
    "int": "int(low, high, step)",
    "logint": "logint(low, high)",
}
_CALL = re.compile(r"\s*(\w+)\((.*)\)\s*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")


class Draw(NamedTuple):
    """A range from which a sampler draws, both ends included."""

    low: float
    high: float
    step: float | None = None  # None: any number between them, for integers each
    is_log: bool = False
    is_integer: bool = False

    def __str__(self) -> str:
        """As it is written."""
        word = ("log" if self.is_log else "") + ("int" if self.is_integer else "uniform")
        ends = [self.low, self.high, *([] if self.step is None else [self.step])]
        return f"{word}({', '.join(f'{int(end)}' if self.is_integer else f'{end:g}' for end in ends)})"


def values_of(override: str) -> list[str] | Draw:
    """The values of `KEY=VALUES` as texts: several where there are commas outside of brackets and quotes, or 0..4.

    Raises:
        ConfigError: A word such as `loguniform(...)` that does not exist, or with arguments that cannot be.
    """
    result: list[str] = []
    parts = _parts(override.partition("=")[2])
    for part in parts:
        call = _CALL.fullmatch(part)
        if found := re.fullmatch(r"\s*(-?\d+)\.\.(-?\d+)\s*", part):
            first, last = int(found[1]), int(found[2])
            result += _integers(range(first, last + (1 if last >= first else -1), 1 if last >= first else -1), part)
        elif call and (meant := _called(override, call[1], [item.strip() for item in _parts(call[2])])) is not None:
            if isinstance(meant, list):
                result += meant
            elif len(parts) > 1:
                raise _wrong(override, f"{part.strip()} draws numbers, so it stands alone")
            else:
                return meant
        elif (open_call := re.match(r"\s*(\w+)\(", part)) and open_call[1] in FORMS:
            raise _wrong(override, f"{shown(part.strip())} has no closing bracket; expected {FORMS[open_call[1]]}")
        else:
            result.append(part)
    return result


def _called(override: str, word: str, arguments: list[str]) -> list[str] | Draw | None:
    """What one of the words means; None for a text that only looks like one."""
    if word == "choice":
        return arguments
    are_numbers = all(map(_NUMBER.fullmatch, arguments))
    if word not in FORMS:
        if not are_numbers:
            return None
        quotes = "; a text is written in quotes" if not did_you_mean(word, FORMS) else ""
        possible = ", ".join(FORMS.values())
        raise _wrong(override, f"{shown(word)} is not a word{did_you_mean(word, FORMS)}; possible: {possible}{quotes}")
    most = 3 if word in ("range", "uniform", "int") else 2
    if not are_numbers or not (1 if word == "range" else 2) <= len(arguments) <= most:
        raise _wrong(override, f"expected numbers as in {FORMS[word]}")
    numbers = [float(item) for item in arguments]
    if word in ("range", "int", "logint") and not all(re.fullmatch(r"[-+]?\d+", item) for item in arguments):
        raise _wrong(override, f"{word}(...) takes integers")
    if word == "range":
        integers = [int(item) for item in arguments]
        if len(integers) == 3 and not integers[2]:
            raise _wrong(override, "the step of range(...) must not be 0")
        return _integers(range(*integers), override.partition("=")[2])
    low, high, *rest = numbers
    drawn = Draw(low, high, rest[0] if rest else None, word.startswith("log"), word.endswith("int"))
    if not low < high or (drawn.is_log and low <= 0) or (drawn.step is not None and drawn.step <= 0):
        above = " and above 0" if drawn.is_log else ""
        step = ", and a step above 0" if rest else ""
        raise _wrong(override, f"expected low below high{above}{step}, as in {FORMS[word]}")
    return drawn


def _integers(numbers: range, text: str) -> list[str]:
    if not 0 < len(numbers) <= MOST:
        amount = f"more than {MOST}" if numbers else "no"
        raise ConfigError(f"dtrain sweep: {text.strip()} has {amount} values")
    return [*map(str, numbers)]


def _wrong(override: str, text: str) -> ConfigError:
    return ConfigError(f"dtrain sweep: {override}: {text}")


def _parts(text: str) -> list[str]:
    """A text cut at its commas, as far as these are not inside of brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{(") - (letter in ")}]") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
