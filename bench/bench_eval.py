"""``python -m quest_compile.bench eval MODEL``: the same as ``quest-compile eval MODEL``."""

from quest_compile.eval.cli import main

__all__ = ["main"]
