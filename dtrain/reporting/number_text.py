"""Numbers, durations and figures as text."""

import math
import re
from collections.abc import Mapping


def count_text(count: float) -> str:
    """A figure with three digits, as 0.25, 12.3k or 1.23M."""
    if not math.isfinite(count):
        return str(count)
    units = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9))
    unit, size = next((pair for pair in units if abs(count) < 999.5 * pair[1]), units[-1])
    return f"{count / size:.3g}{unit}"


def short_count(number: int) -> str:
    """A count in at most four characters or so: 999, 1.2k, 12k, 3.4M."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            value = number / size
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    return str(number)


def duration_text(seconds: float) -> str:
    """A time in its two largest units: 4.1 s, 42 s, 1 min 05 s, 1 h 02 min, 2 d 03 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    for name, size, lower_name, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // lower_size:02} {lower_name}"
    return f"{whole} s"


def figure_text(value: float) -> str:
    """A loss or a metric with five digits, 0.3124 or 2.303e-05; what is not a number as it prints itself."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if number == 0 or not math.isfinite(number):
        return str(number)
    size = math.floor(math.log10(abs(number)))
    return f"{number:.{min(4, 4 - size)}f}" if -2 <= size <= 4 else f"{number:.3e}"


def figure_texts(figures: Mapping[str, float]) -> dict[str, str]:
    """What to show for each figure, by its name."""
    shown = {name: value for name, value in figures.items() if not name.startswith("lr/")}  # there may be many groups
    texts = {name: f"{name.removeprefix('train/')} {figure_text(value)}" for name, value in shown.items()}
    if "samples_per_second" in figures:
        texts["samples_per_second"] = f"{count_text(figures['samples_per_second'])} samples/s"
    if "lr" in figures:
        texts["lr"] = f"lr {figures['lr']:.3g}"
    return texts


def folded(figures: Mapping[str, float]) -> dict[str, str]:
    """Each figure's text, in which a mean stands for its classes, too: F1, F1_0, F1_1 as F1 -> '0.93 (0.81-0.99)'."""
    texts: dict[str, str] = {}
    of_classes: set[str] = set()
    for name, value in figures.items():
        classes = {key: one for key, one in figures.items() if re.fullmatch(re.escape(name) + r"_\d+", key)}
        if len(classes) > 1:
            known = [one for one in classes.values() if not math.isnan(one)]
            ends = f"{_rounded(min(known))}-{_rounded(max(known))}" if known else "nan"
            texts[name] = f"{_rounded(value)} ({ends})"
            of_classes |= classes.keys()
    return {name: texts.get(name, figure_text(value)) for name, value in figures.items() if name not in of_classes}


def _rounded(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= abs(value) < 10 or value == 0 else f"{value:.2g}"


def without_phase(phase: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures without the phase before their names."""
    return {name.removeprefix(f"{phase}/"): value for name, value in figures.items()}
