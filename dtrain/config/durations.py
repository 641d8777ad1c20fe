"""How long something may take, as people write it."""

import re

POSSIBLE = "seconds, 90m, 1.5h, 2d, 01:30:00 or 1-12:00:00"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(duration: float | str) -> float:
    """Seconds of 5400, '90m', '1.5h', '01:30:00' or '1-12:00:00' (days-hours:...); ValueError for others and 0."""
    text = str(duration).strip()
    seconds = 0.0
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    elif number := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text):
        seconds = float(number[1]) * _UNITS[number[2] or "s"]
    if seconds <= 0:
        raise ValueError(f"{duration!r} is not a time; possible: {POSSIBLE}")
    return seconds
