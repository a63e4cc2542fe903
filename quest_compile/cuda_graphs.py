"""On CUDA a decode step is one CUDA graph, whichever mode was asked for.

With ``mode="reduce-overhead"`` results live in the memory of the graph and the next step overwrites
them, as torch documents it. Without a mode they are copied out, so that they may be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quest_compile.passes import Decision, Treatment
from quest_compile.passes.graph import example_value

_OPTION = "triton.cudagraphs"


def wants_cuda_graph(
    decisions: list[Decision], inner: str, mode: str | None, patches: Mapping[str, Any]
) -> bool:
    """Does nobody but us ask for a CUDA graph of this decode step?"""
    if inner != "inductor" or mode is not None or _OPTION in patches:
        return False
    return any(_decodes_on_cuda(decision) for decision in decisions)


def _decodes_on_cuda(decision: Decision) -> bool:
    site = decision.call.site
    is_decode = decision.treatment is Treatment.SPARSE or decision.operator == "dense_decode"
    return is_decode and site is not None and example_value(site.key_cache).device.type == "cuda"


def cuda_graph_options() -> dict[str, Any]:
    return {_OPTION: True}


def with_own_outputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Copy the results that live in the memory of a CUDA graph; others are handed on."""
    copied: list[int] | None = None

    def step(*args: Any) -> Any:
        nonlocal copied
        outs = compiled(*args)
        if copied is None:
            copied = _made_by_the_graph(args, outs)
        outs = list(outs)
        for i in copied:
            outs[i] = outs[i].clone()
        return outs

    return step


def _made_by_the_graph(args: tuple[Any, ...], outs: Any) -> list[int]:
    """Positions of results that share memory with no argument and no other result."""
    storages = [_storage_of(x) for x in (*args, *outs)]
    own = storages[len(args) :]
    return [i for i, s in enumerate(own) if s is not None and storages.count(s) == 1]


def _storage_of(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None
