"""What goes on is said: on a terminal by a bar, else by a line for what is done."""

import io
import sys

import pytest

from quest_compile.bench.progress import Progress


class Stderr(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(is_terminal, monkeypatch):
    stderr = Stderr(is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("bench", 2, "method") as progress:
        progress.doing("quest_64: compiling")
        progress.update()
        progress.done("quest_64")
    text = stderr.getvalue()
    assert ("quest_64: compiling" in text) == ("1/2" in text) == is_terminal
    assert ("bench: quest_64, 0." in text) == (text.count("\n") == 1 and not is_terminal)
    assert is_terminal or text.startswith("bench: quest_64, ")
