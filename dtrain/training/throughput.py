"""Throughput: samples per second, where a step's time is spent, on all ranks, and which rank the others wait for."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

from torch.nn import Module, SyncBatchNorm

from dtrain.training.step_clock import PHASES, StepClock

LEAST_STEPS = 5  # to judge by
LEAST_SHARE = 0.33  # of its own time, that the others wait
LEAST_SECONDS = 0.02
LEAST_FORWARD = 1e-4  # seconds, of what is left of one that was mostly waiting
SLOW_POINTS = 5  # so often in a row, and it is not by chance
_KINDS = ("waiting for data", "forward")
_OWN = len(_KINDS)
_COLUMNS = _OWN + len(PHASES)  # of a rank in the row of all


class Throughput:
    """The clock of training between two points at which figures are logged.

    A rank's own time, before it exchanges gradients, tells who is slow: from there on all wait for the slowest. On a
    CPU it is the host's time, on a GPU the device's.

    Args:
        meets_in_forward: Whether ranks wait for one another within the forward pass.
    """

    def __init__(
        self, rank: int, world_size: int, clock: StepClock | None = None, meets_in_forward: bool = False
    ) -> None:
        self.meets_in_forward = meets_in_forward
        self.rank, self.world_size, self.clock = rank, world_size, clock or StepClock()
        self._steps = 0  # that this rank's figures are of, which are under way to all ranks
        self._reported: set[tuple[int, int]] = set()
        self.slow_rank: int | None = None  # of the last report, if it is slow in its own work, not in waiting for data
        self._slow = (-1, 0)  # the slow rank of the last point, and at how many points in a row it was that one
        self.spent = dict.fromkeys(PHASES, 0.0)  # seconds of this epoch, of each kind on the rank that it takes longest
        self.restart()

    def restart(self, warm_up: bool = True) -> None:
        """Another point, or with a warm-up another epoch."""
        self._began = time.perf_counter()
        self._samples = 0
        if warm_up:
            self.clock.begin_epoch()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training does not count."""
        before = time.perf_counter()
        yield
        self._began += time.perf_counter() - before

    def step_done(self, samples: int) -> None:
        """The step is, over so many samples of all ranks."""
        self.clock.end_step()
        self._samples += samples

    @property
    def samples_per_second(self) -> float:
        """Of all ranks, since the last point."""
        return self._samples / max(time.perf_counter() - self._began, 1e-9)

    def row(self) -> list[float]:
        """This rank's seconds per step since the last point in a row for all ranks', which adding up completes.

        Of each rank its own ones, after the warm-up and with several ranks, and those of each kind.
        """
        self.clock.settle()
        row = [0.0] * (_COLUMNS * self.world_size)
        begin = _COLUMNS * self.rank
        if self.world_size > 1:
            row[begin : begin + _OWN] = self.clock.own_seconds(LEAST_STEPS)
        row[begin + _OWN : begin + _COLUMNS], self._steps = self.clock.take()
        return row

    def figures(self, row: Sequence[float]) -> dict[str, float]:
        """Of the row of all ranks: time/<kind>, seconds per step; of several ranks the median, least and most.

        Without steps since the last point there is nothing to tell.
        """
        times = [row[_COLUMNS * rank + _OWN : _COLUMNS * (rank + 1)] for rank in range(self.world_size)]
        if not all(map(any, times)):
            return {}
        figures = {}
        for kind, values in zip(PHASES, zip(*times, strict=True), strict=True):
            figures[f"time/{kind}"] = statistics.median(values)
            if self.world_size > 1:
                figures |= {f"time/{kind}_min": min(values), f"time/{kind}_max": max(values)}
            self.spent[kind] += max(values) * self._steps
        return figures

    def end_epoch(self) -> Mapping[str, float]:
        """Seconds of each kind in the epoch that is over, on the rank that it takes longest."""
        spent, self.spent = self.spent, dict.fromkeys(PHASES, 0.0)
        return spent

    def judge(self, row: Sequence[float]) -> str:
        """Name the rank that the others wait for, once, by the row of all ranks; '' where there is none."""
        ranks = range(self.world_size)
        own = [row[_COLUMNS * rank : _COLUMNS * rank + _OWN] for rank in ranks]
        if self.world_size == 1 or not all(map(any, own)):
            return ""
        if self.meets_in_forward:  # for who has had no data yet; which rank computes for longer, nobody sees
            last = max(data for data, _ in own)
            own = [[data, max(forward - (last - data), LEAST_FORWARD)] for data, forward in own]
        totals = [sum(seconds) for seconds in own]
        slow = max(ranks, key=totals.__getitem__)
        others = [rank for rank in ranks if rank != slow]
        usual = [statistics.median(own[rank][kind] for rank in others) for kind in (0, 1)]
        kind = max((0, 1), key=lambda kind: own[slow][kind] - usual[kind])
        is_slow = totals[slow] - sum(usual) >= max(LEAST_SECONDS, LEAST_SHARE * totals[slow])
        before, times = self._slow
        self._slow = (slow, times + 1 if slow == before else 1) if is_slow else (-1, 0)
        if not is_slow or (slow, kind) in self._reported:
            return ""
        self._reported.add((slow, kind))
        self.slow_rank = slow if kind else None
        return (
            f"rank {slow} is slow: {totals[slow]:.3g} s per step until it has its loss, {own[slow][kind]:.3g} s "
            f"of them {_KINDS[kind]}; the others take {sum(usual):.3g} s, {totals[slow] / sum(usual):.1f} times less, "
            "and wait for it"
        )

    @property
    def always_slow(self) -> int | None:
        """The rank that has become the slow one so often in a row that it is not by chance; told once."""
        rank, times = self._slow
        return rank if times == SLOW_POINTS else None


def meets_in_forward(model: Module, is_sharded: bool) -> bool:
    """Whether ranks wait for one another within a model's forward pass: for weights, or a batch's statistics."""
    return is_sharded or any(isinstance(part, SyncBatchNorm) for part in model.modules())
