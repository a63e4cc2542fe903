"""Tensors that a graph gained as inputs to write into: made with its first call, kept with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_calls = itertools.count(1)


class AddedInputs:
    """``fakes``: what they are like; ``fill``: what they hold before the first call.

    ``last_call``: later calls of any graph have higher numbers; 0 before the first.
    """

    def __init__(self, fakes: Sequence[torch.Tensor], fill: int = 0) -> None:
        self._like = [(tuple(x.shape), x.dtype, x.device) for x in fakes]
        self._fill = fill
        self._values: list[torch.Tensor] = []
        self.last_call = 0

    def append_to(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Call ``compiled`` with them behind its other arguments."""

        def step(*args: Any) -> Any:
            self.last_call = next(_calls)
            return compiled(*args, *self.values())

        return step

    def values(self) -> list[torch.Tensor]:
        if not self._values:
            # Outside inference mode, so that they may be written in either mode later.
            with torch.inference_mode(False), torch.no_grad():
                self._values = [
                    torch.full(shape, self._fill, dtype=dtype, device=device)
                    for shape, dtype, device in self._like
                ]
        return self._values
