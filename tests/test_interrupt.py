"""Signals: they set a flag and nothing else, several of one are one, and a second Ctrl-C ends at once."""

import os
import signal
import time

import pytest

from dtrain import interrupt
from dtrain.interrupt import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_gives_its_name(number):
    request = StopRequest()
    with request.listening():
        assert not request
        os.kill(os.getpid(), number)
        assert request.reason == f"signal {signal.Signals(number).name}"


def test_the_signal_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_launcher_that_sends_a_signal_several_times_is_asking_once():
    request = StopRequest()
    with request.listening():
        for _ in range(4):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "signal SIGTERM"


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 0.05)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
