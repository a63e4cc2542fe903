"""How an operator of the namespace ``quest`` is made: a schema, an implementation, a fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)


def define(name: str, schema: str) -> None:
    """Declare ``quest::<name>``. Native kernels may be registered before or after this."""
    torch.library.define(f"quest::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def reference(name: str) -> Callable[[_Function], _Function]:
    """Decorator: what serves on every device that has no kernel of its own."""

    def register(function: _Function) -> _Function:
        torch.library.impl(f"quest::{name}", "CompositeExplicitAutograd", function)
        return function

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """Decorator: shapes and dtypes of the results, for tracing."""
    return torch.library.register_fake(f"quest::{name}")
