"""What compiles the rewritten graph: Inductor, or something simpler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quest_compile.passes import Rewrite


def compile_rewrite(
    rewrite: Rewrite, example_inputs: Sequence[Any], inner: str, patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile the rewritten graph; the inputs of the original come first, then the state."""
    inputs = [*example_inputs, *rewrite.state_values()]
    if inner == "eager":
        return rewrite.gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(rewrite.gm, inputs)
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(rewrite.gm, inputs, config_patches=patches or None)
    return compiled


def inner_compiler(wanted: str, example_inputs: Sequence[Any]) -> str:
    """``wanted``, or "aot_eager" (said once) where Inductor lacks the C++ compiler it needs."""
    if wanted != "inductor" or not has_cpu_tensor(example_inputs) or _has_cpp_compiler():
        return wanted
    return "aot_eager"


def has_cpu_tensor(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in example_inputs)


@functools.cache
def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn(
            "Inductor finds no C++ compiler, which it needs on CPU: graphs run uncompiled "
            '(inner="aot_eager"), which is right but slower.',
            stacklevel=2,
        )
        return False
    return True


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor settings of a torch.compile mode."""
    if mode is None or mode == "default":
        return {}
    try:
        return dict(torch._inductor.list_mode_options(mode))
    except RuntimeError as error:
        known = ", ".join(torch._inductor.list_mode_options())
        raise ValueError(f"mode must be one of {known}; got {mode!r}") from error
