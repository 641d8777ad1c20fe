"""When to try again what has failed, and when to give up."""

from types import SimpleNamespace

import pytest

from dtrain.tracking import retry
from dtrain.tracking.retry import Retry


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: self.now))

    def fail(self, tries: Retry, seconds: float = 0.0) -> None:
        with pytest.raises(OSError, match="refused"), tries.attempt():
            self.now += seconds
            raise OSError("refused")

    def pause_of(self, tries: Retry) -> float:
        """How long it takes, in steps of a quarter of a second, until the next try is due."""
        began = self.now
        while not tries.is_due():
            self.now += 0.25
        return self.now - began


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_first_try_is_due_at_once(clock: Clock) -> None:
    assert Retry(1, 10).is_due()


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success(clock: Clock) -> None:
    tries, pauses = Retry(1, 10), []
    for _ in range(6):
        clock.fail(tries)
        pauses.append(clock.pause_of(tries))
    assert pauses == [1, 2, 4, 8, 10, 10] and tries.failures == 6
    with tries.attempt():
        pass
    assert tries.failures == 0 and tries.is_due()
    clock.fail(tries)
    assert clock.pause_of(tries) == 1


def test_another_pause_may_be_asked_for_and_the_failed_try_was_timed(clock: Clock) -> None:
    tries = Retry(1, 10)
    clock.fail(tries, seconds=3)
    assert tries.took_seconds == 3
    clock.now += 5
    assert tries.is_due(5) and not tries.is_due(5.1)


def test_it_is_over_when_the_next_try_would_come_too_late(clock: Clock) -> None:
    tries = Retry(1, 10)
    for _ in range(20):
        clock.fail(tries)
    assert not tries.is_over, "nobody has set an end"
    tries = Retry(1, 10)
    tries.give_up_after(3)
    clock.fail(tries)  # the next try is due in a second
    assert not tries.is_over
    clock.now += 1
    clock.fail(tries)  # in two
    assert not tries.is_over
    clock.now += 2
    clock.fail(tries)  # in four
    assert tries.is_over
    tries.give_up_after(10)
    assert not tries.is_over


def test_an_interruption_is_no_failure(clock: Clock) -> None:
    tries = Retry(1, 10)
    with pytest.raises(KeyboardInterrupt), tries.attempt():
        raise KeyboardInterrupt
    assert tries.failures == 0 and tries.is_due()
