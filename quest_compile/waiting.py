"""Something takes longer than a moment: say what, and how long it has taken."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator


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
