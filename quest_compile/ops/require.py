"""Requirements on arguments; each message names the argument, what was expected and what came.

Sizes may be symbolic, so conditions on them are handed to torch one by one and never joined here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def that(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition``; on symbolic sizes, make it a guard."""
    if isinstance(condition, bool):
        if not condition:
            raise ValueError(message())
    else:
        torch._check(condition, message)


def tensors(**arguments: Tensor) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def integer(name: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    that(value >= lowest, lambda: f"{name}: expected {lowest} or more, got {value}")


def choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def share(name: str, value: float) -> None:
    """Above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected above 0 and up to 1, got {value}")


def dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    if tensor.dtype not in expected:
        names = " or ".join(str(x).removeprefix("torch.") for x in expected)
        raise ValueError(f"{name}: expected dtype {names}, got {tensor.dtype}")


def device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def rank(name: str, tensor: Tensor, expected: int, layout: str) -> None:
    if tensor.dim() != expected:
        raise ValueError(f"{name}: expected {layout}, got shape {list(tensor.shape)}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], layout: str) -> None:
    """``layout`` is ``expected`` in words, e.g. "[batch, num_pages]"."""
    rank(name, tensor, len(expected), layout)
    for size, wanted in zip(tensor.shape, expected, strict=True):
        that(
            size == wanted,
            lambda: f"{name}: expected {layout} = {list(expected)}, got {list(tensor.shape)}",
        )


def broadcastable(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Every size is 1 or the one expected; None means that it does not matter."""
    for size, wanted in zip(tensor.shape, expected, strict=True):
        if wanted is None or (isinstance(size, int) and size == 1):
            continue
        that(
            size == wanted,
            lambda: (
                f"{name}: expected a shape broadcastable to "
                f"{list(expected)}, got {list(tensor.shape)}"
            ),
        )


def contiguous(name: str, tensor: Tensor, num_dims: int) -> None:
    """The last ``num_dims`` dimensions are."""
    expected = 1
    for dim in range(1, num_dims + 1):
        that(
            tensor.stride(-dim) == expected,
            lambda: (
                f"{name}: expected its last {num_dims} dimension(s) to be contiguous, "
                f"got strides {list(tensor.stride())}"
            ),
        )
        expected = expected * tensor.shape[-dim]


def values(name: str, tensor: Tensor, lowest: int, highest: int) -> None:
    """All in [lowest, highest]. Only on the CPU: elsewhere a look would wait for the device."""
    if torch.compiler.is_compiling() or not tensor.is_cpu or type(tensor) is not Tensor:
        return
    smallest, largest = (int(x) for x in tensor.aminmax())
    if smallest < lowest or largest > highest:
        found = smallest if smallest < lowest else largest
        raise ValueError(f"{name}: expected values from {lowest} to {highest}, got {found}")
