"""For a name that is not known: the known ones that it was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that `name` was probably meant to be, best first; of clearly worse ones none."""
    spellings: dict[str, list[str]] = {}
    for item in sorted(known):
        spellings.setdefault(item.lower(), []).append(item)
    close = difflib.get_close_matches(name.lower(), spellings, n=count, cutoff=0.6)
    alike = {item: difflib.SequenceMatcher(None, item.lower(), name.lower()).ratio() for item in close}
    best = [max(spellings[item], key=lambda one: difflib.SequenceMatcher(None, one, name).ratio()) for item in close]
    return [item for item in best if alike[item.lower()] > alike[best[0].lower()] - 0.1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing."""
    found = nearest(name, known)
    return f"; did you mean {' or '.join(repr(item) for item in found)}?" if found else ""
