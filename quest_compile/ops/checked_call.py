"""How the checked functions call their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.native import native_status


def checked_call(
    operator: Callable[..., Any],
    check: Callable[..., None],
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> Any:
    """``operator``, after ``check``; both take the same.

    Kernels on CPUs refuse the same arguments by themselves, before they write anything, and a small
    call takes less time than ``check``: there it only finds better words for what they refused.
    """
    if not _kernel_checks(arguments[0]):
        check(*arguments, **settings)
        return operator(*arguments, **settings)
    try:
        return operator(*arguments, **settings)
    except Exception:
        check(*arguments, **settings)
        raise


def _kernel_checks(first: object) -> bool:
    return (
        isinstance(first, Tensor)
        and first.is_cpu
        and not torch.compiler.is_compiling()
        and native_status().loaded
    )
