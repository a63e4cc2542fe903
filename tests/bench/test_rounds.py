"""Interleaved rounds: what counts, what is dropped, what is marked."""

import pytest

from quest_compile.bench import rounds as subject
from quest_compile.bench.rounds import Rounds, measure_rounds


class FakeMeter:
    """Says a load per question; the last one for ever. Every round is judged for itself."""

    loads = [0.0]

    def __init__(self, pids=()):
        self._left = list(self.loads)

    def elapsed(self):
        return 1.0

    def other_load(self):
        return self._left.pop(0) if len(self._left) > 1 else self._left[0]


@pytest.fixture
def loads(monkeypatch):
    def set_loads(*values):
        # The first question is after the warm-up.
        monkeypatch.setattr(FakeMeter, "loads", [0.0, *values])

    monkeypatch.setattr(subject, "LoadMeter", FakeMeter)
    return set_loads


def settings(rounds, seconds=100.0):
    return Rounds(rounds, seconds, max_load=0.25, progress=False)


def test_methods_take_turns_and_the_warm_up_does_not_count(loads):
    loads(0.0)
    calls = []

    def sampler(name):
        return lambda number: calls.append((name, number)) or 1.0 + number

    samples = measure_rounds({"a": sampler("a"), "b": sampler("b")}, settings(3))
    assert calls == [(name, number) for number in range(4) for name in "ab"]
    assert samples.values == {"a": [2.0, 3.0, 4.0], "b": [2.0, 3.0, 4.0]}
    assert not samples.marked


def test_disturbed_rounds_are_measured_again(loads):
    loads(0.0, 1.5, 0.1, 0.9, 0.0)
    samples = measure_rounds({"a": lambda number: float(number + 1)}, settings(3))
    assert samples.values["a"] == [2.0, 4.0, 6.0]
    assert samples.rounds_dropped == 2
    assert samples.other_load == 0.1
    assert not samples.marked


def test_a_machine_that_is_never_quiet_marks_the_result(loads):
    loads(1.5)
    samples = measure_rounds({"a": lambda number: 1.0}, settings(4))
    assert samples.marked == "other processes used 1.5 cores, more than 0.25"
    assert len(samples.values["a"]) == 8


def test_a_slow_method_stops_early_and_a_fast_one_goes_on(loads):
    loads(0.0)
    methods = {"slow": lambda number: 2.0, "fast": lambda number: 0.001}
    samples = measure_rounds(methods, settings(10, seconds=7.0))
    assert (len(samples.values["slow"]), len(samples.values["fast"])) == (4, 10)


def test_an_interrupt_keeps_enough_rounds_and_raises_with_fewer(loads):
    loads(0.0)

    def until(last):
        def sample(number):
            if number > last:
                raise KeyboardInterrupt
            return 1.0

        return {"a": sample}

    samples = measure_rounds(until(5), settings(10))
    assert samples.interrupted
    assert samples.values["a"] == [1.0] * 5
    with pytest.raises(KeyboardInterrupt):
        measure_rounds(until(2), settings(10))
