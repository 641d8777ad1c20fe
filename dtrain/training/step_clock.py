"""Where a step's time goes: every moment belongs to what this rank is doing, by its own clock or by its GPU's."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

# What is logged as time/<kind>, and the phase of `Activity` that it is. Others, such as a validation, are left out.
PHASES = {
    "data_wait": "waiting for data",
    "transfer": "transfer",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer step",
    "logging": "logging",
    "checkpoint": "saving",
}
WARM_UP_STEPS = 3  # of each epoch, by which no rank is judged: loader workers start, kernels are chosen
_MOST_EDGES = 512  # of phases that the device may not have passed, before they are looked at
_STEP_ENDS = ""  # no phase


class Clock(Protocol):
    """What is told of each phase."""

    @property
    def phase(self) -> str:
        """What it is now."""

    def enter(self, phase: str) -> None:
        """From now on it is this phase."""


class StepClock:
    """Seconds of each phase since `take`, by the host's clock, which costs a microsecond a step.

    The first step of a start is left out: in it workers start, kernels are compiled and libraries are imported.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0  # that were done in them
        self.phase, self._since = "start-up", time.perf_counter()
        self._is_first, self._warm_up_left = True, WARM_UP_STEPS
        self._judged_steps = 0  # those of them after an epoch's warm-up,
        self._before: dict[str, float] = {}  # and the seconds until then

    def enter(self, phase: str) -> None:
        """From now on it is this phase."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now

    def begin_epoch(self) -> None:
        """Its first steps are a warm-up."""
        self._warm_up_left = WARM_UP_STEPS

    def end_step(self) -> None:
        """A step is done, but for what follows it."""
        if self._warm_up_left or self._is_first:
            self.enter(self.phase)
            self._count(self._next_is_warm_up())
        else:  # the next phase will do
            self.steps += 1
            self._judged_steps += 1

    def _next_is_warm_up(self) -> bool:
        is_warm_up = self._warm_up_left > 0
        self._warm_up_left -= is_warm_up
        return is_warm_up

    def _count(self, is_warm_up: bool) -> None:
        """Count a step, whose phases are in the seconds by now."""
        self.steps += 1
        self._judged_steps += 1
        if is_warm_up or self._is_first:
            self._judged_steps, self._before = 0, dict(self.seconds)
        if self._is_first:
            self._is_first, self.steps = False, 0
            self.seconds.clear()
            self._before.clear()

    def settle(self) -> None:
        """Count what can be counted by now."""
        self.enter(self.phase)

    def own_seconds(self, least_steps: int) -> tuple[float, float]:
        """Seconds per step of waiting for data, and from there until its loss; 0 where these are too few steps."""
        if self._judged_steps < least_steps:
            return 0.0, 0.0
        parts = [
            (self.seconds[PHASES[kind]] - self._before.get(PHASES[kind], 0.0)) / self._judged_steps
            for kind in ("data_wait", "transfer", "forward")
        ]
        return parts[0], parts[1] + parts[2]

    def take(self) -> tuple[list[float], int]:
        """Seconds per step of each kind, in the order of PHASES, and the steps; begins anew unless there are none."""
        if not self.steps:
            return [0.0] * len(PHASES), 0
        seconds, steps = [self.seconds[phase] / self.steps for phase in PHASES.values()], self.steps
        self.seconds.clear()
        self._before.clear()
        self.steps = self._judged_steps = 0
        return seconds, steps


class DeviceClock(StepClock):
    """The same by a GPU's own clock: what it does, and for what it has to wait, whatever the host does meanwhile.

    An event goes into its stream where a phase begins, and is read once the device has passed it: nothing ever waits.
    So the seconds are those of the steps that the device has done, a few less than the host has.
    """

    def __init__(self, new_event: Callable[[], Any]) -> None:
        super().__init__()
        self._new_event = new_event
        self._edges: deque[tuple[str, Any]] = deque()  # a phase with its event, or a step's end with its warm-up
        self._unused: list[Any] = []
        self._device_phase = self.phase
        self._of_step: dict[str, float] = defaultdict(float)  # seconds since the end of the last one that is counted
        self._last: Any = None  # the event with which the phase at work began

    def enter(self, phase: str) -> None:
        """From here on in the device's stream it is this phase."""
        event = self._unused.pop() if self._unused else self._new_event()
        event.record()
        self.phase = phase
        self._edges.append((phase, event))
        if len(self._edges) >= _MOST_EDGES:
            self.settle()

    def end_step(self) -> None:
        """A step's last work is in the stream."""
        self.enter(self.phase)
        self._edges.append((_STEP_ENDS, self._next_is_warm_up()))

    def settle(self) -> None:
        """Count what the device has passed."""
        while self._edges:
            phase, event = self._edges[0]
            if phase == _STEP_ENDS:
                for name, seconds in self._of_step.items():
                    self.seconds[name] += seconds
                self._of_step.clear()
                self._count(event)
            elif not event.query():
                return
            else:
                if self._last is not None:
                    self._of_step[self._device_phase] += self._last.elapsed_time(event) / 1e3
                    self._unused.append(self._last)
                self._device_phase, self._last = phase, event
            self._edges.popleft()


def clock_of(device: torch.device) -> StepClock:
    """The clock for what this device trains."""
    if device.type == "cuda":
        return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))
    return StepClock()
