"""Whether a rank is slow because its processor runs at a lower clock than the others'."""

import os

from dtrain.distributed.clock_speed import ClockSpeed, clock_speed, compared
from dtrain.distributed.ranks import Ranks

WAIT_SECONDS = 2.0  # for the ranks' notes, once for each slow rank


def cause_in_clock(ranks: Ranks, slow: int | None) -> str:
    """The end of the line on a slow rank, for the main rank; all ranks call it where one is slow in its own work.

    Each leaves its clock as a note: that costs nothing in the steps in which nobody is slow.
    """
    if slow is None:
        return ""
    name = f"clock of {slow}"
    ranks.mailbox.post(name, tuple(clock_speed(ranks.device, os.sched_getaffinity(0))))
    if not ranks.is_main:
        return ""
    found = ranks.mailbox.notes(name, WAIT_SECONDS)
    text = compared(slow, {rank: ClockSpeed(*speed) for rank, speed in found.items()})
    return f"; {text}" if text else ""
