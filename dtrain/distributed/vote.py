"""Votes: what any rank wishes and all ranks see after the same step."""

import time
from typing import Any

from dtrain.distributed.collectives import Collectives

VOTE_SECONDS = 0.2  # about so long apart are two votes; a stop takes effect after two of them


class Vote:
    """Wishes that any rank can have and that all ranks see after the same step, without waiting for one another.

    A vote is a small all-reduce (see `by_node`) that is started and read at the next one: it has had its time to
    finish. The tensor lives on the CPU, so that reading it never waits for the device. Where steps are short, most of
    them are spared the vote: it carries the time since the last one, from which all ranks find the same next step to
    vote at.
    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._pending: Any = None
        self._ballot: Any = None
        self._period = self._steps_left = 1  # steps from vote to vote, and to the next
        self._last_seconds = time.monotonic()

    def cast(self, *wishes: bool) -> tuple[bool, ...]:
        """Vote, if it is time to, and learn which wishes any rank had last time (with one rank: now)."""
        if self._ranks.world_size == 1:
            return wishes
        self._steps_left -= 1
        if self._steps_left:
            return (False,) * len(wishes)
        import torch

        from dtrain.distributed import by_node

        decided = self._read(len(wishes))
        now = time.monotonic()
        self._ballot = torch.tensor([now - self._last_seconds, *map(float, wishes)], dtype=torch.float64)
        self._last_seconds, self._steps_left = now, self._period
        self._pending = by_node.all_reduce(self._ballot, async_op=True)
        return decided

    def _read(self, count: int) -> tuple[bool, ...]:
        if self._pending is None:
            return (False,) * count
        self._pending.wait()
        seconds, *votes = self._ballot.tolist()
        between = seconds / self._ranks.world_size
        if between < VOTE_SECONDS / 2:
            self._period = min(2 * self._period, 1024)
        elif between > VOTE_SECONDS:
            self._period = max(1, self._period // 2)
        return tuple(vote > 0 for vote in votes)

    def settle(self) -> None:
        """Wait for the vote under way; before anything else is agreed on after the last step."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
