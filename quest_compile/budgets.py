"""Budgets of layers: tokens, or shares of the context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEFAULT_BUDGET = 2048
_DEFAULT_KEY = "default"

# Tokens, or above 0 and below 1 a share of the tokens of the context.
TokensOrShare = int | float
Budget = TokensOrShare | Mapping[int | str, TokensOrShare] | Callable[[int], Any]


class LayerBudgets(Mapping):
    """Budgets by layer, hashable; those not named have that of "default", or DEFAULT_BUDGET."""

    def __init__(self, budgets: Mapping[Any, Any]) -> None:
        for layer, budget in budgets.items():
            if layer == _DEFAULT_KEY:
                check_budget('budget["default"]', budget)
                continue
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f'budget: expected layers as ints or "default", got {layer!r}')
            if layer < 0:
                raise ValueError(f"budget: expected layers counted from 0, got {layer}")
            check_budget(f"budget[{layer}]", budget)
        self._items = tuple(sorted(budgets.items(), key=lambda item: (str(item[0]), item[0])))

    def __getitem__(self, layer: Any) -> Any:
        return dict(self._items)[layer]

    def __iter__(self) -> Iterator[Any]:
        return iter(dict(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))

    def of(self, layer: int) -> TokensOrShare:
        return self.get(layer, self.get(_DEFAULT_KEY, DEFAULT_BUDGET))


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """What an attention call of a layer is given.

    ``pages``: that a query attends at most; ``tokens``: the same in tokens; ``fraction``: of the
    pages in use, 1 for a budget in tokens.
    """

    pages: int
    tokens: int
    fraction: float = 1.0

    def covers(self, num_pages: int) -> bool:
        """Does every query of a cache of so many pages attend all of them?"""
        return num_pages <= self.pages


def check_budget(name: str, value: Any) -> None:
    """
    Raises:
        TypeError, ValueError: not a number of tokens, nor a share of the context.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected an int (tokens) or a float (share), got {value!r}")
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{name}: expected a share of the context in (0, 1), got {value}")
    if value <= 0:
        raise ValueError(f"{name}: expected 1 or more tokens, got {value}")
