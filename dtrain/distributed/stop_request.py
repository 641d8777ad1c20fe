"""A request to stop, by a signal or a time limit: only a flag, read between two steps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from dtrain.config.durations import seconds_of
from dtrain.distributed.exit_status import INTERRUPTED, STOPPED_EARLY

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
REPEAT_SECONDS = 0.5  # launchers deliver one signal several times within milliseconds
OTHERS_WAIT_SECONDS = 3.0  # a rank that is asked to stop while it waits for data waits on, since others wait for it
NEXT_WAIT_SECONDS = 10.0  # a wait that begins after the request takes no longer: the data may never come
# A batch system's own limit is kept clear of by so much, or a tenth of what there is: a step and a save must fit in.
MARGIN_SECONDS = 120.0
# Without the members of enums that Python makes of what it finds: that takes a tenth of a log step.
_getsignal: Callable[[int], Any] = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_ends_at_once: list[object] = []  # the handlers of `end_at_once`
T = TypeVar("T")


class StopWaiting(BaseException):
    """A request to stop came while there was nothing to do but wait: no `except Exception` on the way may take it."""


class Interrupted(KeyboardInterrupt):
    """A second Ctrl-C. Any other KeyboardInterrupt while a StopRequest listens is one that code itself has raised."""


class StopRequest:
    """True once a signal has come or the time is over; `reason` says which. A second Ctrl-C ends at once.

    Args:
        time_limit: How long this process may train, from now: see `seconds_of`, also for errors.
        job_ends_at: When a batch system ends it, in unix seconds.
        alone: Nobody else needs what this process waits for; else it continues to wait for a while.
        told: Asked why, when a signal comes; '' where nothing but the signal is known.
    """

    def __init__(
        self,
        time_limit: float | str | None = None,
        job_ends_at: float | None = None,
        alone: bool = True,
        told: Callable[[], str] = str,
    ) -> None:
        self.reason, self._told = "", told
        self._patience_seconds = 0.0 if alone else OTHERS_WAIT_SECONDS
        self._first_seconds = 0.0
        self._wait = self._asked_in = self._wait_number = 0  # the wait at the moment, by number; 0 for none
        limits = []
        if time_limit is not None:
            limits.append((seconds_of(time_limit), f"the time limit ({time_limit})"))
        if job_ends_at is not None:
            left = max(0.0, job_ends_at - time.time())
            limits.append((left - min(MARGIN_SECONDS, left / 10), "the batch system's time limit"))
        self._taken: tuple[signal.Signals, ...] = ()
        self._not_ours: set[int] = set()  # signals that other code has taken since, and somebody was told
        self._end_seconds, self._limit = min(limits, default=(0.0, ""))
        self._end_seconds += time.monotonic()

    def __bool__(self) -> bool:
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back at the end.

        RuntimeError: for a KeyboardInterrupt that came from code, not from a keyboard: nobody asked for anything.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        real_signal = signal.signal
        taken = self._taken = (*stop_signals(), signal.SIGALRM)
        before = {number: signal.signal(number, self._handle) for number in taken}
        if self._limit:  # a signal, too: it reaches a loop that waits for data
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, self._end_seconds - time.monotonic()))
        try:
            yield
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted):
                raise
            raise RuntimeError("KeyboardInterrupt was raised by the program itself: nobody pressed Ctrl-C") from error
        finally:
            signal.signal = real_signal  # see `_hold`
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                if handler not in _ends_at_once:  # which is not for what comes afterwards: it may be a failure
                    signal.signal(number, handler)
                elif number == signal.SIGINT:
                    signal.signal(number, signal.default_int_handler)

    def keep_listening(self, say: Callable[[str], object]) -> None:
        """Takes back, for good, signals that other code ignores; says so once, and of those with another handler."""
        for number in self._taken if threading.current_thread() is threading.main_thread() else ():
            handler = _getsignal(number)
            if handler == self._handle or (number == signal.SIGALRM and not self._limit):
                continue
            if is_dead := handler in (signal.SIG_IGN, signal.SIG_DFL):
                signal.signal(number, self._handle)
                self._hold(number)
            if number not in self._not_ours:
                self._not_ours.add(number)
                name, other = signal.Signals(number).name, getattr(handler, "__qualname__", handler)
                taken_back = "was ignored by the training's code, which would keep it from saving; it is heard again"
                say(f"warning: {name} {taken_back if is_dead else f'goes to {other} of the training, not to dtrain'}")

    def _hold(self, number: int) -> None:
        """Let no code of this process have a signal ignored any more: a dataset may try so with each sample."""
        before, process = signal.signal, os.getpid()  # workers that are forked ignore what they want

        def kept(other: int, handler: Any) -> Any:
            if other == number and handler in (signal.SIG_IGN, signal.SIG_DFL) and os.getpid() == process:
                return signal.getsignal(number)
            return before(other, handler)

        signal.signal = kept  # type: ignore[assignment]

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; while one is waited for, a request raises StopWaiting, and an earlier one after a while."""
        iterator = iter(items)
        while True:
            self._wait_number += 1
            self._wait = self._wait_number
            try:
                if self.reason:  # of a step that is to be finished
                    self._asked_in = self._wait
                    signal.setitimer(signal.ITIMER_REAL, NEXT_WAIT_SECONDS, REPEAT_SECONDS)
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._wait = 0
            yield item

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.reason:
            alarm = number == signal.SIGALRM
            self.reason = self._limit if alarm else self._told() or f"signal {signal.Signals(number).name}"
            self._first_seconds, self._asked_in = now, self._wait
            if self._wait and self._patience_seconds:
                # Again and again: what a handler raises is lost where a worker is just forked, as in destructors.
                signal.setitimer(signal.ITIMER_REAL, self._patience_seconds, REPEAT_SECONDS)
            elif self._wait:
                raise StopWaiting
        elif number == signal.SIGALRM and self._wait and self._wait == self._asked_in:
            raise StopWaiting
        elif number == signal.SIGINT and now - self._first_seconds > REPEAT_SECONDS:
            raise Interrupted


def was_pressed(error: KeyboardInterrupt) -> bool:
    """Whether a KeyboardInterrupt is from a keyboard: with a handler of ours, it would not be Python's own."""
    return isinstance(error, Interrupted) or signal.getsignal(signal.SIGINT) == signal.default_int_handler


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop; under nohup, a terminal that hangs up does not."""
    return tuple(each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN)


def end_at_once(say: Callable[[str], object]) -> None:
    """Until there is something to lose, have a request to stop end this process; the next start does the same work."""

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:  # as KeyboardInterrupt it would be lost in some library's import now and then
            os._exit(INTERRUPTED)
        say(f"signal {signal.Signals(number).name} before the first step")
        os._exit(STOPPED_EARLY)  # from within an import: whatever it has locked, nothing of it is needed

    _ends_at_once.append(end)
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
