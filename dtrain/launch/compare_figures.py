"""Whether two runs have the same figures, and how far apart they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.reporting.number_text import figure_text
from dtrain.tracking.run_record import Figures

# They depend on the machine and on what else it does.
_OF_THE_MACHINE = ("samples_per_second", "gpu_memory", "time/", "system/")


def is_result(key: str) -> bool:
    """Whether a figure is a result of the training, which another one may repeat."""
    return not key.startswith(_OF_THE_MACHINE)


@dataclass
class Comparison:
    """What two runs' figures have in common.

    Attributes:
        points: How many figures, at steps, both have.
        equal: How many of them are equal bit for bit.
        apart: The largest relative difference of each key, with step and both values; of keys that differ.
        missing: Keys and steps that only one of them has: how many, of each key.
        first: The first step at which a figure differs, and its key.
    """

    points: int = 0
    equal: int = 0
    apart: dict[str, tuple[float, int, float, float]] = field(default_factory=dict)
    missing: dict[str, tuple[int, int]] = field(default_factory=dict)
    first: tuple[int, str] | None = None

    @property
    def is_equal(self) -> bool:
        """Bit for bit, and all of them there."""
        return not self.apart and not self.missing and self.points > 0

    @property
    def largest(self) -> float:
        """The largest relative difference of all; 0 where none differs."""
        return max((each[0] for each in self.apart.values()), default=0.0)

    def lines(self) -> list[str]:
        """How far apart they are, in a few lines."""
        if self.is_equal:
            return [f"equal: all {self.points:,} figures, bit for bit"]
        lines = []
        if self.apart and self.first is not None:
            differ = self.points - self.equal
            step, key = self.first
            lines.append(f"{differ:,} of {self.points:,} figures differ, first {key} at step {step:,}")
            for key, (relative, step, one, other) in sorted(self.apart.items(), key=lambda item: -item[1][0])[:8]:
                values = f"{_exact(one, other)} and {_exact(other, one)} at step {step:,}"
                lines.append(f"{key}: by {100 * relative:.3g} % at most ({values})")
            lines += [f"and {len(self.apart) - 8} more"] if len(self.apart) > 8 else []
        elif self.points:
            lines.append(f"equal where both have them: {self.points:,} figures, bit for bit")
        else:
            lines.append("there is no figure that both have")
        for key, (first, second) in list(self.missing.items())[:8]:
            lines.append(f"{key}: {first or 'no'} step(s) only in A, {second or 'no'} only in B")
        return lines


def _exact(one: float, other: float) -> str:
    """A figure as short as it can be told from another one."""
    text = figure_text(one)
    return text if text != figure_text(other) else repr(one)


def compare_figures(one: Figures, other: Figures) -> Comparison:
    """The figures that are results of two runs, by key and step."""
    found = Comparison()
    for key in dict.fromkeys((*one, *other)):
        if is_result(key):
            _compare(found, key, one.get(key, {}), other.get(key, {}))
    return found


def _compare(found: Comparison, key: str, one: Mapping[int, float], other: Mapping[int, float]) -> None:
    common = sorted(one.keys() & other.keys())
    only = (len(one.keys() - other.keys()), len(other.keys() - one.keys()))
    if any(only):
        found.missing[key] = only
    for step in common:
        found.points += 1
        apart = relative_difference(one[step], other[step])
        if not apart:
            found.equal += 1
            continue
        if key not in found.apart or apart > found.apart[key][0]:
            found.apart[key] = (apart, step, one[step], other[step])
        if found.first is None or step < found.first[0]:
            found.first = (step, key)


def relative_difference(one: float, other: float) -> float:
    """Of the larger one; 0 for equal ones, two NaN included; infinite where only one of them is a number."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    apart = abs(one - other) / max(abs(one), abs(other))
    return apart if math.isfinite(apart) else math.inf
