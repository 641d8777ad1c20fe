"""Throughput: samples per second, and which rank the others wait for."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

WARM_UP_STEPS = 3  # of each epoch: loader workers start, kernels are chosen
LEAST_STEPS = 5  # to judge by
LEAST_SHARE = 0.33  # of its own time, that the others wait
LEAST_SECONDS = 0.02
_KINDS = ("waiting for data", "forward")


class Throughput:
    """The clock of training between two points at which figures are logged.

    A rank's own time, before it exchanges gradients, tells who is slow: from there on all wait for the slowest. It is
    the host's time, in which a GPU that is slow itself does not show.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._reported: set[tuple[int, int]] = set()
        self.restart()

    def restart(self, warm_up: bool = True) -> None:
        """Another point, or with a warm-up another epoch."""
        self._began = self._mark = time.perf_counter()
        self._samples = self._steps = 0
        self._own = [0.0, 0.0]  # seconds of each kind
        self._warm_up = WARM_UP_STEPS if warm_up else 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training does not count."""
        before = time.perf_counter()
        yield
        self._mark = time.perf_counter()
        self._began += self._mark - before

    def data_came(self) -> None:
        """A batch is there."""
        now = time.perf_counter()
        self._own[0] += now - self._mark
        self._mark = now

    def forward_done(self) -> None:
        """Its loss is."""
        now = time.perf_counter()
        self._own[1] += now - self._mark
        self._mark = now

    def exchanged(self) -> None:
        """The gradients are."""
        self._mark = time.perf_counter()

    def step_done(self, samples: int) -> None:
        """The step is, over so many samples of all ranks."""
        self._mark = time.perf_counter()
        self._samples += samples
        self._steps += 1
        if self._warm_up:
            self._warm_up -= 1
            self._steps, self._own = 0, [0.0, 0.0]

    @property
    def samples_per_second(self) -> float:
        """Of all ranks, since the last point."""
        return self._samples / max(time.perf_counter() - self._began, 1e-9)

    def own(self) -> list[float]:
        """This rank's seconds per step in a row for all ranks', which adding up over the ranks completes."""
        row = [0.0] * (2 * self.world_size)
        if self._steps >= LEAST_STEPS and self.world_size > 1:
            row[2 * self.rank : 2 * self.rank + 2] = [seconds / self._steps for seconds in self._own]
        return row

    def judge(self, row: Sequence[float]) -> str:
        """Name the rank that the others wait for, once; '' where there is none."""
        ranks = range(self.world_size)
        totals = [row[2 * rank] + row[2 * rank + 1] for rank in ranks]
        if self.world_size == 1 or min(totals) == 0:
            return ""
        slow = max(ranks, key=totals.__getitem__)
        others = [rank for rank in ranks if rank != slow]
        usual = [statistics.median(row[2 * rank + kind] for rank in others) for kind in (0, 1)]
        kind = max((0, 1), key=lambda kind: row[2 * slow + kind] - usual[kind])
        if totals[slow] - sum(usual) < max(LEAST_SECONDS, LEAST_SHARE * totals[slow]) or (slow, kind) in self._reported:
            return ""
        self._reported.add((slow, kind))
        return (
            f"rank {slow} is slow: {totals[slow]:.3g} s per step until it has its loss, {row[2 * slow + kind]:.3g} s "
            f"of them {_KINDS[kind]}; the others take {sum(usual):.3g} s, {totals[slow] / sum(usual):.1f} times less, "
            "and wait for it"
        )
