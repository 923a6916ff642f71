"""What ends a run early: signals that only raise a flag, and bad steps in a row."""

import os
import signal

import pytest

from nsa_train.errors import DivergedError
from nsa_train.train import guards
from nsa_train.train.guards import BadSteps, StopSignals


@pytest.fixture
def signals():
    """StopSignals that listen; the handlers of pytest come back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    listening = StopSignals()
    listening.training = True
    listening.listen()
    yield listening
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_only_raises_a_flag(number, signals):
    assert signals.received is None
    send(number)
    assert signals.received == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_training_the_first_signal_stops_at_once(number, signals):
    signals.training = False
    with pytest.raises(KeyboardInterrupt):
        send(number)


def test_a_second_ctrl_c_seconds_later_stops_at_once(signals, monkeypatch):
    send(signal.SIGINT)
    later = signals._first_s + guards.SAME_CTRL_C_S + 1
    monkeypatch.setattr(guards.time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_one_ctrl_c_that_arrives_twice_is_one(signals):
    """A terminal sends it to torchrun and to us, and torchrun passes its own on."""
    send(signal.SIGINT)
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert signals.received == "SIGINT"


def test_only_bad_steps_in_a_row_stop_a_run():
    bad_steps = BadSteps(limit=3)
    for step, bad in enumerate([True, True, False, True, True, False], start=1):
        bad_steps.note(step, bad)
    bad_steps.note(7, True)
    bad_steps.note(8, True)
    with pytest.raises(DivergedError, match="in 3 steps in a row, up to step 9"):
        bad_steps.note(9, True)
