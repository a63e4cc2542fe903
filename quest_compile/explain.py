"""Ask what Quest would do with a model, without compiling it for real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quest_compile.backend import QuestBackend
from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.config import QuestConfig, QuestSettings
from quest_compile.decoding import prefill, step_inputs
from quest_compile.report import Report


def explain(
    model: Callable[..., Any], *args: Any, quest: QuestConfig | None = None, **kwargs: Any
) -> Report:
    """One row per attention call of ``model(*args, **kwargs)``: what becomes of it, and why.

    The call is traced and run once, without Inductor and without gradients, so it writes the cache
    it is given. With no arguments at all, a transformers model is traced for one decode step over a
    static cache of 4 times the budget (the largest in tokens, or else the default).

    Args:
        model: a module or function that calls ``scaled_dot_product_attention``.
        quest: the settings; default ``QuestConfig()``. Single ones may be given by name instead:
            ``explain(model, budget=512)``.

    Returns:
        The report; ``print`` it.
    """
    names = QuestSettings.__annotations__
    settings = {name: kwargs.pop(name) for name in names if name in kwargs}
    config = (quest or QuestConfig()).replace(settings)
    if not args and not kwargs:
        budgets = config.budget.values() if isinstance(config.budget, Mapping) else [config.budget]
        tokens = max([budget for budget in budgets if isinstance(budget, int)] or [DEFAULT_BUDGET])
        args, kwargs = (), _decode_step_inputs(model, max_seq_len=4 * tokens)
    backend = QuestBackend(config.replace({"inner": "eager", "strict": False}))
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return backend.report()


def _decode_step_inputs(model: Any, max_seq_len: int) -> dict[str, Any]:
    """The arguments of a decode step: one token, on top of a static cache that holds one."""
    if getattr(model, "config", None) is None:
        raise TypeError(
            "explain(model) without arguments needs a transformers model; "
            f"pass the arguments of one call of {type(model).__name__}"
        )
    device = next(model.parameters()).device
    cache = prefill(model, torch.zeros(1, 1, dtype=torch.int64, device=device), max_seq_len)
    return step_inputs(cache, torch.zeros(1, 1, dtype=torch.int64, device=device), position=1)
