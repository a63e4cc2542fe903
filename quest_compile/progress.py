"""What takes long shows how far it is; where there is no terminal, by a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0
# What is over sooner needs no bar.
_SECONDS_BEFORE = 2.0


class _Lines:
    """Makes a line of its own of what a terminal would show in the place of the last."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    total: int, unit: str, title: str = "", *, initial: int = 0, is_shown: bool = True
) -> Any:
    """A tqdm on stderr, with ``doing(text)`` to say behind the title what goes on."""
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()

    class Bar(tqdm):
        def doing(self, text: str) -> None:
            self.set_description(": ".join(filter(None, (title, text))), refresh=is_terminal)

    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not is_terminal:
        options = {"file": _Lines(), "ncols": 90, "mininterval": _SECONDS_BETWEEN_LINES}
        options |= {"maxinterval": _SECONDS_BETWEEN_LINES, "miniters": 1}
    options |= {"delay": _SECONDS_BEFORE, "disable": not is_shown, "desc": title or None}
    return Bar(total=total, unit=unit, initial=initial, **options)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line on stderr with the seconds so far, until the block ends."""
    from tqdm import tqdm

    is_over = threading.Event()
    with tqdm(total=0, desc=what, bar_format="{desc}: {elapsed}") as line:

        def count() -> None:
            while sys.stderr.isatty() and not is_over.wait(1):
                line.refresh()

        counting = threading.Thread(target=count, daemon=True)
        counting.start()
        try:
            yield
        finally:
            is_over.set()
            counting.join()
