"""llama.cpp on a model of one such layer, where llama-cpp-python is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peers_of(wanted: list[str] | None) -> Callable[..., Any] | None:
    return None
