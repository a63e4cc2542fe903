"""Names of methods in tables and plots, and their order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from quest_compile.bench.results import Result
from quest_compile.bench.settings import MORE, QUEST

_NAMES = {
    "dense_decode": "`dense_decode`, all tokens",
    "dense_decode_linear_torch": "`dense_decode`, linear layers of torch",
    "llama_cpp_flash": "llama.cpp, flash attention",
    "llama_cpp": "llama.cpp",
    "sdpa_group_as_q_len": "torch SDPA, query heads of a group as positions",
    "sdpa_enable_gqa": "torch SDPA, `enable_gqa`",
    "sdpa_transformers": "torch SDPA as a compiled transformers model calls it",
    "dense_enable_gqa": "`torch.compile`, SDPA with `enable_gqa`",
    "dense_transformers": "`torch.compile` of the model as it is",
    "read_loop": "plain read loop",
}


# Settings by name, those of results on record too that are measured no more.
KINDS: dict[str, dict[str, Any]] = {
    **QUEST,
    **MORE,
    "quest-int8": {"summary": "minmax_int8"},
    "quest-sketch": {"summary": "sketch"},
    "quest-meanstd": {"summary": "meanstd"},
}


def label(method: str) -> str:
    """How a table calls ``method``, such as ``quest-int8_2048`` or ``dense_decode@avx2``."""
    name, _, level = method.partition("@")
    text = _NAMES.get(name, name)
    if quest := re.fullmatch(r"(quest(?:-[\w-]+?)?)_(\d+)(?:_page(\d+))?", name):
        kind, budget, page = quest.groups()
        text = f"Quest, budget {budget}"
        if settings := settings_of(kind):
            text += f", `{settings}`"
        if page:
            text += f", page {page}"
    return f"{text}, {level}" if level else text


def settings_of(kind: str) -> str:
    """Of Quest by the name of the setting, as Python has them: ``preset="paper"``; none for the
    defaults, those of the commit that measured."""
    settings = KINDS.get(kind, {})
    return ", ".join(
        f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in settings.items()
    )


def is_quest(method: str) -> bool:
    return method.startswith("quest")


def today(result: Result) -> Result | None:
    """By the name that its settings have now; None where one of them was taken out.

    Before results named their group_reduce, "quest" was min/max with group_reduce="sum", and
    sketches were not rotated.
    """
    facts = result.metadata
    if any(setting in result.method for setting in ("select_every", "meanstd", "int8")):
        return None
    if "summary" not in facts or "group_reduce" in facts:
        return result
    if facts["summary"] == "sketch":
        return None
    return dataclasses.replace(result, method=result.method.replace("quest_", "quest-minmax_"))


def methods_of(results: Iterable[Result]) -> list[str]:
    """Quest first, then what attends everything, the slowest last, the read loop behind all."""
    order = list(_NAMES)
    found = list(dict.fromkeys(r.method for r in results))

    def place(method: str) -> tuple[int, str]:
        name = method.partition("@")[0]
        return (-1 if is_quest(name) else order.index(name) if name in order else 99, method)

    return sorted(found, key=place)


def seconds(value: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            scaled = value * scale
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    raise AssertionError


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
