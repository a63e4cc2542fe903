"""Progress bars that say what goes on; without a terminal, a line for what is done."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A bar on stderr, hidden where that is no terminal; ``total`` of ``unit``."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._description = description
        self._start = time.perf_counter()
        self._bar: Any = tqdm(
            total=total, desc=description, unit=unit, file=sys.stderr, disable=None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def doing(self, what: str) -> None:
        """Shown behind the bar until the next call."""
        self._bar.set_postfix_str(what)

    def update(self, number: int = 1) -> None:
        self._bar.update(number)

    def done(self, what: str) -> None:
        """Without a terminal: a line with the seconds since the last one."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        say(f"{self._description}: {what}, {seconds:.1f} s")


def say(text: str) -> None:
    """A line on stderr where that is no terminal."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def nothing(what: str) -> None:
    """For callers that do not show what goes on."""
