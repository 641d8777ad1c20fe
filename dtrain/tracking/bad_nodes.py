"""Nodes that a training does not use again: a note in its run folder, one line each, that a person can read and clear.

node2  2026-11-29 11:02:13  hung: rank 1 made no progress for 1800 s
"""

import time
from pathlib import Path

from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import write_text

HEADER = """\
# Nodes that the next start of this training leaves out; one that failed once is used once more.
# Remove a node's line, or this file, to have the node used again.
"""
USES_BAD_NODES = "DTRAIN_USES_BAD_NODES"  # in the environment of a batch job that has no other nodes
LEFT_OUT = "DTRAIN_LEFT_OUT"  # in its environment: those of its nodes, with commas, that spares take the place of
ONCE, TWICE = "failed once", "failed twice"


def bad_nodes(folder: Path) -> dict[str, str]:
    """The nodes that the next start leaves out, each with time and reason."""
    return {node: text for node, text in _lines(folder).items() if not _reason(text).startswith(ONCE)}


def note_bad_node(folder: Path, node: str, reason: str) -> None:
    """Leave a node out from now on. Nothing raises: whoever notes it has worse to tell."""
    lines = _lines(folder)
    lines[node] = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(reason.split())}"
    text = HEADER + "".join(f"{node}  {text}\n" for node, text in lines.items())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(RunFolder(folder).bad_nodes, text, durable=True)
    except OSError:
        return


def note_failed_node(folder: Path, node: str, reason: str) -> None:
    """A node has failed: the second time it is left out."""
    earlier = _lines(folder).get(node, "")
    times = TWICE if earlier else ONCE
    note_bad_node(folder, node, f"{times}: {reason}")


def _lines(folder: Path) -> dict[str, str]:
    """By node, what stands behind it; a line of a person's own may hold the node alone."""
    try:
        lines = RunFolder(folder).bad_nodes.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    parts = [line.split(None, 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {node: (rest[0].strip() if rest else "listed by hand") for node, *rest in parts}


def _reason(text: str) -> str:
    """Without the time."""
    words = text.split(None, 2)
    return words[2] if len(words) == 3 and words[0][:4].isdigit() else text
