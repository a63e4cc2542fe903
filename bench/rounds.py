"""Interleaved rounds: every method once per round, so that all see the same moments of the machine.

Rounds in which other processes used the machine are measured again; a result that could not be had
without them says so.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping

from quest_compile.bench.load import LoadMeter

# One sample: the number of the round -> seconds.
Sampler = Callable[[int], float]

_FEWEST_ROUNDS = 3
# Ticks of /proc are 0.01 s: shorter rounds are judged together.
_JUDGED_SECONDS = 0.25


@dataclasses.dataclass
class Rounds:
    """How to measure: ``rounds`` samples of each method, or as many as ``seconds`` allow one.

    ``max_load``: cores that other processes may use in a round that counts.
    """

    rounds: int = 15
    seconds: float = 8.0
    max_load: float = 0.25
    progress: bool = True


@dataclasses.dataclass
class Samples:
    """``values`` per method, in seconds; ``marked``: why they are not to be trusted, if so."""

    values: dict[str, list[float]]
    rounds_dropped: int = 0
    other_load: float | None = None
    marked: str = ""
    interrupted: bool = False

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


def measure_rounds(
    samplers: Mapping[str, Sampler],
    settings: Rounds,
    title: str = "",
    own_pids: Iterable[int] = (),
) -> Samples:
    """Take samples of each method in interleaved rounds; the first round warms up.

    Ctrl-C ends early: with too few rounds it is raised, else ``interrupted`` is set.
    """
    from tqdm import tqdm

    collector = _Collector(list(samplers), settings, own_pids)
    hidden = None if settings.progress else True
    bar = tqdm(total=settings.rounds, desc=title, unit="round", file=sys.stderr, disable=hidden)
    try:
        with bar:
            for sampler in samplers.values():
                sampler(0)
            collector.meter.other_load()
            number = 0
            while wanted := collector.wanted():
                number += 1
                for name in wanted:
                    collector.pending[name].append(samplers[name](number))
                collector.judge()
                bar.n = min(settings.rounds, collector.num_kept())
                bar.set_postfix(dropped=collector.num_dropped)
    except KeyboardInterrupt:
        collector.judge(at_once=True)
        if collector.num_kept() < _FEWEST_ROUNDS:
            raise
        return dataclasses.replace(collector.samples(), interrupted=True)
    return collector.samples()


class _Collector:
    """Samples that count, samples of disturbed rounds, and those not judged yet."""

    def __init__(self, names: list[str], settings: Rounds, own_pids: Iterable[int]) -> None:
        self.settings = settings
        self.meter = LoadMeter(own_pids)
        self.kept: dict[str, list[float]] = {name: [] for name in names}
        self.dropped: dict[str, list[float]] = {name: [] for name in names}
        self.pending: dict[str, list[float]] = {name: [] for name in names}
        self.num_dropped = 0
        self._kept_loads: list[float] = []
        self._dropped_loads: list[float] = []

    def num_kept(self) -> int:
        return max(map(len, self.kept.values()))

    def wanted(self) -> list[str]:
        """Methods that need another round."""
        if self.num_dropped >= 2 * self.settings.rounds:
            self.judge(at_once=True)
            return []
        wanted = [name for name in self.kept if not self._has_enough(name)]
        if not wanted and any(self.pending.values()):
            self.judge(at_once=True)
            return self.wanted()
        return wanted

    def _has_enough(self, name: str) -> bool:
        values = self.kept[name] + self.pending[name]
        if len(values) >= self.settings.rounds:
            return True
        fewest = min(_FEWEST_ROUNDS, self.settings.rounds)
        return len(values) >= fewest and sum(values) >= self.settings.seconds

    def judge(self, at_once: bool = False) -> None:
        """Keep or drop what is pending, by the load that others caused meanwhile."""
        if not any(self.pending.values()) or (
            self.meter.elapsed() < _JUDGED_SECONDS and not at_once
        ):
            return
        load = self.meter.other_load()
        is_quiet = load <= self.settings.max_load
        target, loads = (
            (self.kept, self._kept_loads) if is_quiet else (self.dropped, self._dropped_loads)
        )
        loads.append(load)
        if not is_quiet:
            self.num_dropped += max(map(len, self.pending.values()))
        for name, values in self.pending.items():
            target[name] += values
            values.clear()

    def samples(self) -> Samples:
        enough = min(_FEWEST_ROUNDS, self.settings.rounds)
        if all(len(values) >= enough for values in self.kept.values()):
            load = max(self._kept_loads, default=None)
            return Samples(self.kept, self.num_dropped, load)
        values = {name: self.kept[name] + self.dropped[name] for name in self.kept}
        load = statistics.median(self._kept_loads + self._dropped_loads)
        marked = f"other processes used {load:.2g} cores, more than {self.settings.max_load:g}"
        return Samples(values, self.num_dropped, load, marked)
