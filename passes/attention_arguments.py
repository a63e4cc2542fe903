"""What the operators can take of the arguments of a scaled_dot_product_attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from quest_compile.ops.limits import DTYPES, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from quest_compile.passes.graph import is_plain_tensor, same_size
from quest_compile.passes.reasons import Reason, require

SDPA = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = "query key value attn_mask dropout_p is_causal scale enable_gqa".split()


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """Of an SDPA call."""
    return dict(zip(_PARAMETERS, node.args)) | node.kwargs


def check_arguments(
    arguments: dict[str, Any],
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    repeats: int,
) -> None:
    """``repeats``: how often the graph repeats the KV heads of these caches before the call.

    Raises:
        Refused: an operator cannot take them, and why.
    """
    tensors = (query, key_cache, value_cache)
    require(all(map(is_plain_tensor, tensors)), Reason.TENSOR_SUBCLASS)
    require(key_cache.shape[:3] == value_cache.shape[:3], Reason.KEY_VALUE_MISMATCH)
    require(
        query.ndim == key_cache.ndim == value_cache.ndim == 4
        and query.shape[0] == key_cache.shape[0]
        and query.shape[1] % key_cache.shape[1] == 0,
        Reason.HEAD_COUNTS,
    )
    require(
        query.dtype in DTYPES and query.dtype == key_cache.dtype == value_cache.dtype, Reason.DTYPE
    )
    require(
        _is_head_dim(key_cache.shape[3]) and _is_head_dim(value_cache.shape[3]), Reason.HEAD_DIM
    )
    require(key_cache.stride(3) == value_cache.stride(3) == 1, Reason.LAYOUT)
    wants_grad = any(tensor.requires_grad for tensor in tensors)
    require(not (torch.is_grad_enabled() and wants_grad), Reason.GRADIENTS)
    require(out.dtype == query.dtype, Reason.DTYPE)
    # One head is broadcast, more are repeated if enable_gqa says so.
    num_kv_heads = key_cache.shape[1]
    sdpa_repeats = repeats == 1 and (num_kv_heads == 1 or arguments.get("enable_gqa", False))
    require(num_kv_heads * repeats == query.shape[1] or sdpa_repeats, Reason.HEAD_COUNTS)
    require(not arguments.get("dropout_p", 0.0), Reason.DROPOUT)


def check_mask(mask: torch.Tensor, q_len: Any, num_keys: Any) -> None:
    """Raises:
    Refused: the operators do not take this mask.
    """
    require(mask.dtype == torch.bool, Reason.MASK_DTYPE)
    require(
        mask.ndim == 4
        and (same_size(mask.shape[2], 1) or same_size(mask.shape[2], q_len))
        and same_size(mask.shape[3], num_keys),
        Reason.MASK_SHAPE,
    )


def _is_head_dim(size: Any) -> bool:
    # A symbol where models of several sizes share their code: fixed by a guard.
    if has_free_unbacked_symbols(size):
        return False
    return int(size) % HEAD_DIM_MULTIPLE == 0 and 0 < int(size) <= MAX_HEAD_DIM
