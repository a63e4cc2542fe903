"""How commands take a model."""

from __future__ import annotations

import argparse

from quest_compile.real_model import SOURCES

MODEL_HELP = f"folder, hub name, or {', '.join(SOURCES)} (see quest-compile fetch)"


def add_model_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    """A required model, with or without ``--model`` in front."""
    group = parser.add_mutually_exclusive_group(required=True)
    # Without SUPPRESS its default would overwrite what --model gave.
    group.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=MODEL_HELP + more)
    group.add_argument("--model", dest="model", help="the same")
