"""Which validations are drawn: so few that pictures take at most 2 % of a training's time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dtrain.distributed.collectives import Collectives

MOST_SHARE = 0.02


class PictureTime:
    """Measures what pictures cost, and decides which validations have some; alike for all sets of one, on all ranks.

    The first validation of a start is drawn, and the last one of a training. In between, one is drawn once the time
    since the last one that was has grown to fifty times what its pictures took: what the loop waited for them, and the
    processor time of the threads that drew.

    Args:
        ranks: Rank 0 decides for all of them; None: there is but this one.
        clock: Seconds of a clock.
        worked: Seconds of processor time of the thread that asks.
    """

    def __init__(
        self,
        ranks: Collectives | None = None,
        clock: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._ranks, self._clock, self._worked = ranks, clock, worked
        self._decided: tuple[int, bool] | None = None  # at which step, and what
        self._drawn_at: float | None = None  # when the last validation that is drawn began
        self._before: float | None = None  # when the last one began
        self._spent: list[float] = []  # seconds, for that one's pictures: `append` is safe in any thread
        self._threads_begun = self._threads_done = 0
        self.left_out = ""  # why one is not drawn, to be said once

    def allows(self, step: int, is_last: bool) -> bool:
        """Whether the validation after so many steps is drawn. All ranks call it, as often."""
        if self._decided is None or self._decided[0] != step:
            own = self._is_earned() or is_last
            self._decided = step, bool(self._ranks.broadcast(own)) if self._ranks else own
            now = self._clock()
            if self._decided[1]:
                self._spent, self._drawn_at = [], now
            elif self._before is not None and not self.left_out:
                self.left_out = (
                    f"pictures take {sum(self._spent):.2g} s, and validations come every {now - self._before:.2g} s: "
                    f"some are left out, so that pictures take at most {MOST_SHARE:.0%} of the time "
                    "(trainer.pictures.every_validations=1 draws each)"
                )
            self._before = now
        return self._decided[1]

    def _is_earned(self) -> bool:
        if self._drawn_at is None:
            return True
        is_drawing = self._threads_done < self._threads_begun  # its time is not known yet
        return not is_drawing and sum(self._spent) <= MOST_SHARE * (self._clock() - self._drawn_at)

    @contextmanager
    def spent_by_loop(self) -> Iterator[None]:
        """The loop waits for what is done in it."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent.append(self._clock() - began)

    def in_thread(self, work: Callable[[], None]) -> Callable[[], None]:
        """The same work, for a thread that is about to do it beside the loop."""
        self._threads_begun += 1
        spent = self._spent

        def timed() -> None:
            began = self._worked()
            try:
                work()
            finally:
                spent.append(self._worked() - began)
                self._threads_done += 1

        return timed
