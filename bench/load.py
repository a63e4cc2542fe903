"""How much of the machine other processes use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# user, nice, system, irq, softirq, steal of the first line of /proc/stat; not idle and iowait.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


class LoadMeter:
    """Cores that other processes kept busy since the last question; None where nothing tells.

    ``pids``: processes that count as our own.
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = (os.getpid(), *pids)
        self._start = self._now()

    def elapsed(self) -> float:
        """Seconds since the last question; ticks of /proc are 0.01 s."""
        return time.perf_counter() - self._start[0]

    def other_load(self) -> float | None:
        last, self._start = self._start, self._now()
        (seconds, busy, own), (last_seconds, last_busy, last_own) = self._start, last
        if busy is None or last_busy is None or seconds <= last_seconds:
            return None
        return max(0.0, (busy - last_busy) - (own - last_own)) / (seconds - last_seconds)

    def _now(self) -> tuple[float, float | None, float]:
        seconds = time.perf_counter()
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
            busy = sum(int(fields[i]) for i in _BUSY_FIELDS) / _TICKS
            own = sum(map(_cpu_seconds, self._pids))
        except (OSError, ValueError, IndexError):
            return seconds, None, 0.0
        return seconds, busy, own


def load_facts(meter: LoadMeter, max_load: float) -> dict[str, Any]:
    """Metadata of what was measured since the last question; marked above ``max_load``."""
    load = meter.other_load()
    if load is None:
        return {}
    if load <= max_load:
        return {"other_load": load}
    text = f"other processes used {load:.2g} cores, more than {max_load:g}"
    return {"other_load": load, "marked": text}


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads, and of children that have ended."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS
