"""The figures of overhead.py as tables, and what is promised of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants import BARE, DTRAIN, FEATURES, FULL, HAND, PEERS, TORCHMETRICS, Contestant
from turns import End, Start, Turn

HAND_LABEL, DTRAIN_LABEL = Contestant(HAND, BARE).label, Contestant(DTRAIN, FULL).label
WITH_TORCHMETRICS = Contestant(DTRAIN, TORCHMETRICS).label

MOST_RATIO = 1.03
MOST_LATER_SECONDS = 0.5
MOST_MORE_MB = {DTRAIN_LABEL: 25.0, WITH_TORCHMETRICS: 170.0}
MOST_SENDER_MB = 350.0
CALLED = {"Items": "a dataset class of the user's own", "tensors": "a TensorDataset"}


@dataclass
class Measurement:
    """One run of one program."""

    label: str
    ranks: int
    dataset: str
    session: int  # of programs that were there at the same time, the hand-written loop among them
    start: Start = field(default_factory=lambda: Start(math.nan, math.nan))
    turns: list[Turn] = field(default_factory=list)
    end: End = field(default_factory=lambda: End([], math.nan, math.nan, math.nan, 0))

    @property
    def where(self) -> str:
        """What it is, in a line."""
        return f"{self.label}, {called(self.ranks)}, {self.dataset}"

    def middle(self, figure: str) -> float:
        """The median of a figure over its turns."""
        return statistics.median(getattr(turn, figure) for turn in self.turns)


def from_plain(run: Mapping[str, Any]) -> Measurement:
    """A run from what `asdict` made of it."""
    parts = {"start": Start(**run["start"]), "end": End(**run["end"]), "turns": [Turn(**turn) for turn in run["turns"]]}
    return Measurement(**{**run, **parts})


@dataclass
class Verdict:
    """One promise, and whether it was kept."""

    what: str
    found: float
    most: float
    unit: str = ""
    kept: bool = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.found <= self.most

    @property
    def mark(self) -> str:
        """Whether it was kept, in a word."""
        return "ok" if self.kept else "MISS"

    def line(self) -> str:
        """What was promised, and what was found."""
        return f"{self.mark:<4}  {self.what:<64} {self.found:8.2f}  <= {self.most:g}{self.unit}"


@dataclass
class Row:
    """All runs of one program of one kind, each with that of the hand-written loop in the same session."""

    runs: list[tuple[Measurement, Measurement]]

    def middle(self, figure: str) -> float:
        """The median of a figure over all turns."""
        return statistics.median(getattr(turn, figure) for own, _ in self.runs for turn in own.turns)

    def ratios(self, figure: str) -> list[float]:
        """A figure as a multiple of the hand-written loop's, of each round."""
        pairs = [pair for own, hand in self.runs for pair in zip(own.turns, hand.turns, strict=True)]
        return [getattr(mine, figure) / getattr(its, figure) for mine, its in pairs]

    def start(self, figure: str) -> float:
        """The median of a figure of the start-up."""
        return statistics.median(getattr(own.start, figure) for own, _ in self.runs)

    def later_s(self) -> float:
        """How much later than by hand the first step was."""
        return statistics.median(own.start.first_step_s - hand.start.first_step_s for own, hand in self.runs)

    def memory_mb(self) -> float:
        """The largest rank's peak memory."""
        return statistics.median(max(own.end.peak_mb) for own, _ in self.runs)

    def more_mb(self) -> float:
        """How much more memory than by hand a rank had, of several ranks the one of which that is most."""
        pairs = [zip(own.end.peak_mb, hand.end.peak_mb, strict=True) for own, hand in self.runs]
        return statistics.median(max(mine - its for mine, its in ranks) for ranks in pairs)


def rows(runs: Sequence[Measurement], ranks: int, dataset: str | None = None) -> dict[str, Row]:
    """The programs with so many ranks (with a dataset: and turns with it), by label, in the order of measuring."""
    hands = {run.session: run for run in runs if run.label == HAND_LABEL}
    found: dict[str, Row] = {}
    for run in runs:
        if run.ranks == ranks and (dataset is None or (run.dataset == dataset and run.turns)):
            found.setdefault(run.label, Row([])).runs.append((run, hands[run.session]))
    return found


def kinds(runs: Sequence[Measurement]) -> list[tuple[int, str]]:
    """The numbers of ranks and datasets with which steps were measured."""
    return list(dict.fromkeys((run.ranks, run.dataset) for run in runs if run.turns))


def verdicts(runs: Sequence[Measurement]) -> list[Verdict]:
    """What is promised against what was found."""
    found = []
    for ranks, dataset in kinds(runs):
        own = rows(runs, ranks, dataset)[DTRAIN_LABEL]
        for what, figure in (("time per step", "step_us"), ("processor time per step", "step_cpu_us")):
            name = f"{called(ranks)}, {dataset}: {what} / by hand"
            found.append(Verdict(name, statistics.median(own.ratios(figure)), MOST_RATIO))
    for ranks in dict.fromkeys(run.ranks for run in runs):
        programs = rows(runs, ranks)
        own = programs[DTRAIN_LABEL]
        found.append(Verdict(f"{called(ranks)}: first step later", own.later_s(), MOST_LATER_SECONDS, " s"))
        for label, most in MOST_MORE_MB.items():
            if label in programs:
                name = f"{called(ranks)}, {label}: a rank's memory, more"
                found.append(Verdict(name, programs[label].more_mb(), most, " MB"))
        ends = [run.end for run, _ in own.runs]
        sender_mb = max(end.sender_mb for end in ends)
        found.append(Verdict(f"{called(ranks)}: the sender's memory", sender_mb, MOST_SENDER_MB, " MB"))
        left = sum(end.left_behind for end in ends)
        found.append(Verdict(f"{called(ranks)}: processes left behind", left, 0))
    return found


def markdown(about: str, runs: Sequence[Measurement], absent: Sequence[str]) -> str:
    """All tables; `absent` names those of whom there should be figures."""
    peers = [peer for peer in (HAND, DTRAIN, *PEERS) if any(run.label.startswith(peer.name) for run in runs)]
    absent = [name for name in absent if name not in [peer.name for peer in peers]]
    parts = [f"Measured: {about}.{' Not measured: ' + ', '.join(absent) + '.' if absent else ''}"]
    promised = [[one.what, f"{one.found:.4g}{one.unit}", f"{one.most:g}{one.unit}", one.mark] for one in verdicts(runs)]
    parts.append(table(["of dtrain", "found", "promised: at most", ""], promised))
    for ranks, dataset in kinds(runs):
        parts.append(steps_table(rows(runs, ranks, dataset), f"{called(ranks)}, {CALLED[dataset]}"))
    parts += [start_table(rows(runs, ranks), called(ranks)) for ranks in dict.fromkeys(run.ranks for run in runs)]
    head = ["with all features", *FEATURES]
    parts.append(table(head, [[peer.name, *peer.has] for peer in peers]))
    return "\n\n".join(parts)


def called(ranks: int) -> str:
    """A number of ranks in words."""
    return "one process" if ranks == 1 else f"{ranks} ranks"


def steps_table(programs: dict[str, Row], title: str) -> str:
    """What a step takes."""
    head = [title, "us per step", "processor us", "time / by hand", "processor time / by hand", "all its processes"]
    lines = []
    for label, row in programs.items():
        tree_us = statistics.median(own.end.tree_cpu_us for own, _ in row.runs)
        cells = [label, f"{row.middle('step_us'):,.0f}", f"{row.middle('step_cpu_us'):,.0f}"]
        ratios = (
            ["1", "1"] if label == HAND_LABEL else [spread(row.ratios(name)) for name in ("step_us", "step_cpu_us")]
        )
        lines.append([*cells, *ratios, f"{tree_us:,.0f}"])
    return table(head, lines)


def spread(ratios: Sequence[float]) -> str:
    """The median, and the quartiles."""
    middle = statistics.median(ratios)
    if len(ratios) < 4:
        return f"{middle:.2f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def start_table(programs: dict[str, Row], title: str) -> str:
    """What comes before the first step and after the last one, and memory."""
    head = [f"start, {title}", "first step, s", "later", "processor s", "a rank's memory, MB", "more", "starts"]
    lines = []
    for label, row in programs.items():
        later, more = f"{row.later_s():+.2f}", f"{row.more_mb():+.0f}"
        if label == HAND_LABEL:
            later = more = ""
        first_s, cpu_s = row.start("first_step_s"), row.start("first_step_cpu_s")
        figures = [f"{first_s:.2f}", later, f"{cpu_s:.2f}", f"{row.memory_mb():.0f}", more, str(len(row.runs))]
        lines.append([label, *figures])
    return table(head, lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def write_between(page: Path, name: str, text: str) -> None:
    """Put a text between the lines `<!-- name: begin -->` and `<!-- name: end -->` of a page.

    Raises:
        ValueError: The page has no such lines.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")
