"""What the ranks' notes of a preflight say of each node: a table of figures, and what is wrong with whom."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dtrain.config.errors import one_line
from dtrain.distributed.environment import name_of_node

SLOW_BELOW = {"cuda": 0.7, "cpu": 0.3}  # of the median; times of CPUs, and gloo's, vary more
DISK_SLOW_BELOW = 0.2
CLOCK_BAD_SECONDS, CLOCK_WARN_SECONDS = 60.0, 1.0
ROWS = 40  # a longer table is cut; bad nodes are always in it
NAMES = 6  # of files and packages that differ
FIGURES = {  # key of a note: what a person calls it, unit, whether a slow one is bad
    "compute": ("compute", "TFLOP/s", True),
    "memory": ("memory", "GB/s", True),
    "in node": ("in node", "GB/s", True),
    "network": ("network", "GB/s", True),
    "written": ("disk, written", "MB/s", False),
    "read": ("disk, read", "MB/s", False),
}


class Notes(NamedTuple):
    """What ranks have left, by rank."""

    here: Mapping[int, Any]  # those that came
    alone: Mapping[int, Any]  # what each found by itself
    together: Mapping[int, Any]  # and with others
    clocks: Mapping[str, Any]  # of the first rank of a node: how exactly it is known, and the difference, in seconds
    planned: Sequence[int]  # the ranks that came in time
    world_size: int
    come_seconds: float


@dataclass
class Node:
    """One node: its figures, those of its slowest rank, and what was found, as ("bad", "warn" or "note", text)."""

    name: str
    ranks: list[int]
    figures: dict[str, float] = field(default_factory=dict)
    findings: list[tuple[str, str]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst of what was found."""
        levels = {level for level, _ in self.findings}
        return next((level for level in ("bad", "warn") if level in levels), "ok")

    @property
    def reasons(self) -> list[str]:
        """Why it is bad."""
        return [text for level, text in self.findings if level == "bad"]


def judge(notes: Notes, slow_below: float | None, list_of: Callable[[str], dict[str, str]]) -> list[Node]:
    """All nodes, in order; `list_of` gives the names and values that a digest stands for."""
    nodes = _nodes(notes)
    for node in nodes:
        _judge_presence(node, notes)
        for rank in node.ranks:
            prefix = f"rank {rank}: " if notes.world_size > 1 else ""
            for note in (notes.alone.get(rank, {}), notes.together.get(rank, {})):
                node.findings += [(level, prefix + text) for level, text in note.get("findings", ())]
    _judge_links(nodes, notes)
    _judge_speed(nodes, notes, slow_below)
    _judge_clocks(nodes, notes)
    for kind in ("packages", "code"):
        _judge_lists(nodes, notes, kind, list_of)
    _judge_devices(nodes, notes)
    return nodes


def _nodes(notes: Notes) -> list[Node]:
    """Every rank has its node: that of the notes, or where the launcher counts one that has left none."""
    numbers: dict[int, list[int]] = {}
    size = next((note["local_world_size"] for note in notes.here.values()), notes.world_size)
    for rank in range(notes.world_size):
        number = notes.here[rank]["number"] if rank in notes.here else rank // size
        numbers.setdefault(number, []).append(rank)
    names = {}
    for number, ranks in numbers.items():
        known = [notes.here[rank]["node"] for rank in ranks if rank in notes.here]
        names[number] = known[0] if known else name_of_node(number)
    several = Counter(names.values())
    return [
        Node(names[number] if several[names[number]] == 1 else f"{names[number]}/{number}", numbers[number])
        for number in sorted(numbers)
    ]


def _judge_presence(node: Node, notes: Notes) -> None:
    late = f"within {notes.come_seconds:.0f} s"
    cases: dict[str, list[int]] = {}
    for rank in node.ranks:
        if rank not in notes.here:
            text = f"did not come {late}"
        elif rank not in notes.alone:
            text = "came, but did not finish its own checks: frozen, or its GPU or disk hangs"
        elif rank not in notes.planned:
            text = f"was not ready {late}"
        elif rank not in notes.together:
            text = "stopped answering while the network was measured"
        else:
            continue
        cases.setdefault(text, []).append(rank)
    for text, ranks in cases.items():
        node.findings.append(("bad", f"{_called(ranks)} {text}"))


def _called(ranks: Sequence[int]) -> str:
    """Ranks in words: `rank 3`, `ranks 8-15`, `ranks 1, 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _judge_links(nodes: Sequence[Node], notes: Notes) -> None:
    """An all-reduce that failed is the fault of the one that is silent, or fails with all; else of both."""
    node_of = {rank: node for node in nodes for rank in node.ranks}
    silent = {rank for rank in range(notes.world_size) if rank not in notes.together}
    with_none = {
        rank for rank, note in notes.together.items()
        if any(key.startswith("network") for key in note["failed"]) and "network" not in note
    }  # fmt: skip
    for rank, note in notes.together.items():
        for key, text in note["failed"].items():
            kind, _, other = key.rpartition(" ")
            if kind == "in node":
                if not silent & set(node_of[rank].ranks):
                    node_of[rank].findings.append(("bad", f"rank {rank}: no all-reduce within the node: {text}"))
                continue
            partner = int(other)
            if partner in silent or (partner in with_none and rank not in with_none):
                continue
            reason = f"rank {rank}: no all-reduce with rank {partner} on {node_of[partner].name}: {text}"
            node_of[rank].findings.append(("bad", reason))


def _judge_speed(nodes: Sequence[Node], notes: Notes, slow_below: float | None) -> None:
    """Each rank's figures against the median of all ranks'."""
    is_gpu = any(note["device"] != "cpu" for note in notes.alone.values())
    least = SLOW_BELOW["cuda" if is_gpu else "cpu"] if slow_below is None else slow_below
    for key, (name, unit, is_bad) in FIGURES.items():
        values = {}
        for rank in range(notes.world_size):
            value = notes.together.get(rank, {}).get(key, notes.alone.get(rank, {}).get("figures", {}).get(key))
            if value is not None:
                values[rank] = value
        if not values:
            continue
        usual = statistics.median(values.values())
        for node in nodes:
            if not (own := {rank: values[rank] for rank in node.ranks if rank in values}):
                continue
            node.figures[key] = min(own.values())
            share = least if is_bad else min(least, DISK_SLOW_BELOW)
            if slow := [rank for rank, value in own.items() if value < share * usual]:
                worst = min(own[rank] for rank in slow)
                who = f"{_called(slow)}: " if key not in ("written", "read") else ""
                text = f"{who}{name} {worst:.3g} {unit}, {worst / usual:.2f} of the median's {usual:.3g}"
                node.findings.append(("bad" if is_bad else "warn", text))


def _judge_clocks(nodes: Sequence[Node], notes: Notes) -> None:
    """Each node's clock against that of most: of two, against the first one's."""
    offsets = {int(rank): (error, offset) for rank, (error, offset) in notes.clocks.items()}
    if not offsets:
        return
    known = {node.name: offsets[rank] for node in nodes for rank in node.ranks if rank in offsets}
    first = next(node for node in nodes if node.name not in known)  # who asked
    known[first.name] = (0.0, 0.0)
    usual = statistics.median_low(offset for _, offset in known.values()) if len(known) > 2 else 0.0
    for node in nodes:
        if node.name in known:
            error, offset = known[node.name]
            node.figures["clock"] = offset - usual
            off = abs(offset - usual) - error
            if off > CLOCK_WARN_SECONDS:
                text = (
                    f"clock {offset - usual:+.3f} s (to {error:.3f} s) from the others'; NTP sets it (chronyc makestep)"
                )
                node.findings.append(("bad" if off > CLOCK_BAD_SECONDS else "warn", text))


def _judge_lists(nodes: Sequence[Node], notes: Notes, kind: str, list_of: Callable[[str], dict[str, str]]) -> None:
    """What must be the same everywhere, against what most have."""
    digests = {rank: note[kind] for rank, note in notes.alone.items() if kind in note}
    if len(set(digests.values())) < 2:
        return
    usual = Counter(digests.values()).most_common(1)[0][0]  # of equally many the first: rank 0's
    expected = list_of(usual)
    for node in nodes:
        others: dict[str, list[int]] = {}
        for rank in node.ranks:
            if digests.get(rank, usual) != usual:
                others.setdefault(digests[rank], []).append(rank)
        for digest, ranks in others.items():
            found = list_of(digest)
            names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
            texts = [_difference(name, found, expected, kind) for name in names[:NAMES]]
            if len(names) > NAMES:
                texts.append(f"and {len(names) - NAMES} more")
            node.findings.append(("bad", f"{_called(ranks)}: other {kind} than the rest: {', '.join(texts)}"))


def _difference(name: str, found: Mapping[str, str], expected: Mapping[str, str], kind: str) -> str:
    if name not in found:
        return f"no {name}"
    if name not in expected:
        return (
            f"{name} {found[name]} (the others have none)" if kind == "packages" else f"{name} (the others have none)"
        )
    return f"{name} {found[name]} (the others {expected[name]})" if kind == "packages" else name


def _judge_devices(nodes: Sequence[Node], notes: Notes) -> None:
    kinds = {rank: note["device"] for rank, note in notes.alone.items()}
    usual = Counter(kinds.values()).most_common(1)
    for node in nodes:
        if other := [rank for rank in node.ranks if rank in kinds and kinds[rank] != usual[0][0]]:
            node.findings.append(("warn", f"{_called(other)}: {kinds[other[0]]}, the others {usual[0][0]}"))


def text_of(nodes: Sequence[Node], seconds: float, as_json: bool) -> str:
    """The table, what was found, and which nodes are bad; or one JSON object of it."""
    bad = [node.name for node in nodes if node.verdict == "bad"]
    if as_json:
        each = [
            {"node": node.name, "ranks": node.ranks, "verdict": node.verdict, "figures": node.figures,
             "findings": [{"level": level, "text": text} for level, text in node.findings]}
            for node in nodes
        ]  # fmt: skip
        return json.dumps({"ok": not bad, "bad": bad, "seconds": round(seconds, 1), "nodes": each}, indent=2)
    ranks = sum(len(node.ranks) for node in nodes)
    lines = [f"preflight of {len(nodes)} node(s), {ranks} rank(s), {seconds:.0f} s", *_table(nodes)]
    width = max(len(node.name) for node in nodes)
    for level in ("bad", "warn", "note"):
        for node in nodes:
            lines += [
                f"{level:<4}  {node.name:<{width}}  {one_line(text)}" for each, text in node.findings if each == level
            ]
    lines.append(f"bad: {', '.join(bad)}" if bad else f"{'all nodes are' if len(nodes) > 1 else 'this node is'} good")
    return "\n".join(lines)


def _table(nodes: Sequence[Node]) -> list[str]:
    """A row for each node, of many for the bad ones and some others, and the medians."""
    columns = [key for key in FIGURES if any(key in node.figures for node in nodes)]
    heads = ["node", *(f"{FIGURES[key][0]} {FIGURES[key][1]}" for key in columns), "clock s", "ranks", ""]

    def row(name: str, figures: Mapping[str, float], ranks: str, verdict: str) -> list[str]:
        numbers = [f"{figures[key]:.3g}" if key in figures else "-" for key in columns]
        clock = f"{figures['clock']:+.3f}" if "clock" in figures else "-"
        return [name, *numbers, clock, ranks, verdict]

    shown = (
        sorted(nodes, key=lambda node: ("bad", "warn", "ok").index(node.verdict))[:ROWS] if len(nodes) > ROWS else nodes
    )
    rows = [row(node.name, node.figures, str(len(node.ranks)), node.verdict) for node in shown]
    if len(nodes) > len(shown):
        rows.append([f"({len(nodes) - len(shown)} more)", *[""] * (len(heads) - 1)])
    if len(nodes) > 1:
        usual = {key: statistics.median(node.figures[key] for node in nodes if key in node.figures) for key in columns}
        rows.append(row("median", usual, "", ""))
    widths = [max(len(line[index]) for line in (heads, *rows)) for index in range(len(heads))]
    lines = []
    for line in (heads, *rows):
        name, *others = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        lines.append("  ".join([line[0].ljust(len(name)), *others]).rstrip())
    return lines
