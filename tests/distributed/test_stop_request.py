"""Signals: they set a flag and nothing else, several of one are one, and a second Ctrl-C ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dtrain.distributed import stop_request as interrupt
from dtrain.distributed.stop_request import SIGNALS, StopRequest, StopWaiting


@pytest.fixture
def hangup():
    """What these tests run under may have it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_gives_its_name(number):
    request = StopRequest()
    with request.listening():
        assert not request
        os.kill(os.getpid(), number)
        assert request.reason == f"signal {signal.Signals(number).name}"


@pytest.mark.usefixtures("hangup")
def test_under_nohup_a_terminal_that_hangs_up_asks_for_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("hangup")
def test_the_signal_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_failure_that_a_signal_follows_is_not_taken_for_an_early_stop():
    """Others that fail have a launcher end this one; the moment is that in which the signals are given back."""
    code = """
import os, signal, sys
from dtrain.distributed.stop_request import SIGNALS, StopRequest, end_at_once
from dtrain.distributed.process import run_to_end
def work():
    end_at_once(print)
    try:
        with StopRequest().listening():
            raise RuntimeError
    except RuntimeError:
        for number in SIGNALS[1:]:
            os.kill(os.getpid(), number)
        return 1
sys.exit(run_to_end(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr


def test_a_launcher_that_sends_a_signal_several_times_is_asking_once(monkeypatch):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 1000)  # however long this process is not let run
    request = StopRequest()
    with request.listening():
        for _ in range(4):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "signal SIGTERM"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_is_not_lost_where_python_drops_what_a_handler_raises(monkeypatch):
    """As in a destructor or, while a worker is forked, in what Python calls before."""
    monkeypatch.setattr(interrupt, "OTHERS_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 0.05)

    class Drops:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    def items():
        Drops()
        time.sleep(1000)
        yield

    request = StopRequest(alone=False)
    with request.listening(), pytest.raises(StopWaiting):
        next(request.waiting(items()))


@pytest.mark.parametrize("alone", [True, False])
def test_a_request_that_came_before_a_wait_ends_it_where_nothing_comes(monkeypatch, alone):
    """A step of two batches of which the second one hangs, or another rank that has not voted yet."""
    monkeypatch.setattr(interrupt, "NEXT_WAIT_SECONDS", 0.05)
    request = StopRequest(alone=alone)

    def items():
        yield "there"
        time.sleep(1000)
        yield "never"

    with request.listening():
        batches = request.waiting(items())
        assert next(batches) == "there"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopWaiting):
            next(batches)


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 0.05)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
