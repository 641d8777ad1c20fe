"""A node that hangs, or makes the others wait, is noted in the run folder: the next start leaves it out."""

from collections.abc import Sequence
from pathlib import Path

from dtrain.distributed.ranks import Ranks
from dtrain.tracking.bad_nodes import note_bad_node


def note_nodes_of(ranks: Ranks, folder: Path, blamed: Sequence[int], reason: str) -> None:
    """Note the nodes of some ranks, unless they are more than half of all: then it is not the nodes' fault."""
    nodes = ranks.mailbox.notes("node")
    bad, all_nodes = {nodes[rank] for rank in blamed if rank in nodes}, set(nodes.values())
    if len(all_nodes) > 1 and 2 * len(bad) <= len(all_nodes):
        for node in sorted(bad):
            note_bad_node(folder, node, reason)
