"""`trainer.profile`: torch's profiler over a few steps, and the trace that it leaves."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dtrain.tracking.journal import Journal
from dtrain.training.state import Activity
from dtrain.training.step_clock import Clock
from dtrain.training.throughput import Throughput

FOLDER = "profile"  # in the run folder, and among the run's artifacts


def profile_settings(
    *,
    steps: int = 5,
    after: int = 10,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
) -> dict[str, Any]:
    """The keys under `trainer.profile`.

    Args:
        steps: Optimizer steps that are in the trace; one more before them warms the profiler up.
        after: Optimizer steps of this start that are left alone before: workers start, kernels are chosen.
        record_shapes: The shapes of each operation's inputs, too.
        profile_memory: What is allocated and freed, too.
        with_stack: The lines of Python that each operation comes from, too; slow.
    """
    return dict(locals())


class Profiler:
    """Leaves a trace of some steps of rank 0 in the run folder and with the run's artifacts, which Perfetto opens.

    While it is at work, the phases of a step (forward, backward ...) are ranges in the trace.
    """

    def __init__(
        self,
        journal: Journal,
        say: Callable[[str], Any],
        activity: Activity,
        throughput: Throughput,
        settings: Mapping[str, Any],
    ) -> None:
        chosen = profile_settings(**settings)
        self._throughput = throughput
        self._first, self._steps = chosen.pop("after"), chosen.pop("steps")
        self._journal, self._say, self._activity, self._settings = journal, say, activity, chosen
        self._done = 0  # steps of this start
        self._at_work: Any = None
        self._clock = activity.clock

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave torch's profiler, of which a process has one, as it was found."""
        if self._at_work is not None:
            self._stop()

    def step(self, number: int) -> None:
        """A step is done, the training's so many-th."""
        self._done += 1
        if self._at_work is not None:
            if self._done == self._first + 1 + self._steps:
                self._write(number)
            else:
                self._at_work.step()
        elif self._done == self._first:
            self._start()

    def finish(self, number: int) -> None:
        """The last step is done: write what there is."""
        if self._done > self._first + 1 and self._at_work is not None:
            self._write(number)
        elif self._done <= self._first + 1:
            text = f"no trace: it begins after {self._first + 1} steps, and this start did {self._done}"
            self._say(f"warning: trainer.profile left {text}; set trainer.profile.after to less")

    def _start(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library writes lines to the terminal
        plan = schedule(wait=0, warmup=1, active=self._steps, repeat=1)
        with self._throughput.paused(), self._activity.during("profiling"):
            self._at_work = profile(activities=kinds, schedule=plan, **self._settings)
            self._at_work.start()
        self._named = _NamedPhases(self._clock)
        self._activity.follow(self._named)

    def _stop(self) -> Any:
        at_work, self._at_work = self._at_work, None
        self._named.close()
        self._activity.follow(self._clock)
        at_work.step()  # the end of the last step
        at_work.stop()
        return at_work

    def _write(self, number: int) -> None:
        recorded, first = self._stop(), number - (self._done - self._first - 2)
        with self._throughput.paused(), self._activity.during("profiling"):
            path = Path(self._journal.folder, FOLDER, f"steps-{first}-{number}.json.gz")
            try:
                path.parent.mkdir(exist_ok=True)
                recorded.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:  # a full disk
                self._say(f"warning: trainer.profile could not write {path}: {error}")
                return
        self._journal.artifact(str(path), FOLDER)
        self._say(f"the trace of steps {first} to {number} is {path}; https://ui.perfetto.dev opens it")


class _NamedPhases:
    """A clock, which names each phase in the trace as well."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begin(clock.phase)

    @property
    def phase(self) -> str:
        return self._clock.phase

    def _begin(self, phase: str) -> None:
        self._range = record_function(phase)
        self._range.__enter__()

    def enter(self, phase: str) -> None:
        self.close()
        self._clock.enter(phase)
        self._begin(phase)

    def close(self) -> None:
        self._range.__exit__(None, None, None)
