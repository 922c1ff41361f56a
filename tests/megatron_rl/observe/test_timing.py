"""Timers add up per phase and start afresh after pop."""

import time

import pytest

from megatron_rl.observe import Timers


def test_a_phase_entered_twice_adds_up_and_pop_starts_afresh():
    timers = Timers()
    for _ in range(2):
        with timers("generate"):
            time.sleep(0.02)
    assert timers.seconds("generate") >= 0.04
    assert set(timers.pop()) == {"time/generate"}
    assert timers.pop() == {}


def test_a_phase_that_fails_is_counted():
    timers = Timers()
    with pytest.raises(RuntimeError), timers("train"):
        time.sleep(0.01)
        raise RuntimeError("out of memory")
    assert timers.pop()["time/train"] >= 0.01
