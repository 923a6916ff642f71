"""What ends a run early: signals that only raise a flag, and bad steps in a row."""

import json
import os
import signal

import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.errors import DivergedError
from nsa_train.train import guards
from nsa_train.train.guards import BadSteps, Spikes, StopSignals


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
def test_a_signal_only_raises_a_flag_and_says_what_comes_of_it(number, signals, capfd):
    assert signals.received is None
    send(number)
    send(number)
    assert signals.received == number.name
    assert capfd.readouterr().err == f"{number.name}: {guards.STOPPING}\n"


def test_a_signal_is_taken_where_nobody_reads_what_it_says(signals, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    write = os.write
    monkeypatch.setattr(guards.os, "write", lambda file, text: write(writer, text))
    send(signal.SIGTERM)
    os.close(writer)
    assert signals.received == "SIGTERM"


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


def spikes(window=4, sigmas=3.0):
    trainer = load_config([f"trainer.spike_window={window}", f"trainer.spike_sigmas={sigmas}"]).trainer
    return Spikes(trainer, torch.device("cpu"))


def feed(window, losses):
    for loss in losses:
        window.note(torch.tensor(loss))


def test_a_jump_is_measured_by_the_last_losses_and_only_when_there_are_enough():
    window = spikes()
    feed(window, [2.0, 2.1, 2.0])
    assert not window.is_spike(torch.tensor(9.0))
    feed(window, [2.1])
    assert window.is_spike(torch.tensor(2.3))
    assert not window.is_spike(torch.tensor(2.2))
    assert not window.is_spike(torch.tensor(float("nan")))  # that is DeepSpeed's to find
    feed(window, [9.0, 9.1, 9.0, 9.1])
    assert not window.is_spike(torch.tensor(9.2))
    window.forget()
    assert not window.is_spike(torch.tensor(99.0))


def test_a_restored_window_goes_on_as_it_would_have():
    one, other = spikes(), spikes()
    feed(one, [2.0, 2.1, 2.3, 2.2, 2.1])
    other.load_state(json.loads(json.dumps(one.state())))
    for window in (one, other):
        feed(window, [2.4])
    assert one.state() == other.state()


def test_without_sigmas_nothing_is_a_jump():
    window = spikes(sigmas=0)
    feed(window, [2.0, 2.1, 2.0, 2.1])
    assert not window.is_spike(torch.tensor(99.0))
