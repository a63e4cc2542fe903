"""How much of the machine other processes use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import psutil


class LoadMeter:
    """Cores that other processes kept busy since the last question.

    ``pids``: processes that count as our own.
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._own = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self._start = self._now()

    def elapsed(self) -> float:
        """Seconds since the last question; ticks of the system are 0.01 s."""
        return time.perf_counter() - self._start[0]

    def other_load(self) -> float:
        last, self._start = self._start, self._now()
        seconds, busy = (now - before for now, before in zip(self._start, last))
        return max(0.0, busy) / seconds

    def _now(self) -> tuple[float, float]:
        """The time, and the processor seconds of others; threads and ended children are our own."""
        machine = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of the users' time
        busy = sum(seconds for kind, seconds in machine.items() if kind not in idle)
        own = sum(sum(process.cpu_times()[:4]) for process in self._own)
        return time.perf_counter(), busy - own


def load_facts(meter: LoadMeter, max_load: float) -> dict[str, Any]:
    """Metadata of what was measured since the last question; marked above ``max_load``."""
    load = meter.other_load()
    if load <= max_load:
        return {"other_load": load}
    text = f"other processes used {load:.2g} cores, more than {max_load:g}"
    return {"other_load": load, "marked": text}
