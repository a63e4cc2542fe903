"""Checks of the arguments that several operators share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_compile.ops import limits, require
from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.summaries import SUMMARIES


def head_dim(name: str, tensor: Tensor) -> None:
    """The last dimension, and the dtype."""
    require.dtype(name, tensor, *limits.DTYPES)
    size, multiple = tensor.shape[-1], limits.HEAD_DIM_MULTIPLE
    for condition in (size >= multiple, size <= limits.MAX_HEAD_DIM, size % multiple == 0):
        require.that(
            condition,
            lambda: (
                f"{name}: expected a last dimension that is a multiple of {multiple} up to "
                f"{limits.MAX_HEAD_DIM}, got {size}"
            ),
        )


def query(tensor: Tensor, num_kv_heads: int, takes_several: bool) -> None:
    q_len_name = "q_len" if takes_several else "1"
    require.rank("query", tensor, 4, f"[batch, num_q_heads, {q_len_name}, head_dim]")
    head_dim("query", tensor)
    _, num_q_heads, q_len, _ = tensor.shape
    if takes_several:
        require.that(q_len >= 1, lambda: f"query: expected at least 1 query, got {q_len}")
    else:
        require.that(q_len == 1, lambda: f"query: expected q_len (dimension 2) 1, got {q_len}")
    require.that(
        num_q_heads % num_kv_heads == 0,
        lambda: (
            f"query: expected a multiple of {num_kv_heads} KV heads, got {num_q_heads} heads "
            "([batch, num_q_heads, q_len, head_dim])"
        ),
    )


def key_cache(tensor: Tensor) -> None:
    shape = list(tensor.shape)
    require.rank("key_cache", tensor, 4, "[batch, num_kv_heads, max_seq_len, head_dim]")
    head_dim("key_cache", tensor)
    require.contiguous("key_cache", tensor, 1)
    for size in tensor.shape[1:3]:
        require.that(size >= 1, lambda: f"key_cache: expected no empty dimension, got {shape}")


def value_cache(tensor: Tensor, keys: Tensor) -> None:
    layout = "[batch, num_kv_heads, max_seq_len, value_dim]"
    require.rank("value_cache", tensor, 4, layout)
    head_dim("value_cache", tensor)
    require.shape("value_cache", tensor, (*keys.shape[:3], tensor.shape[3]), layout)
    require.contiguous("value_cache", tensor, 1)


def seq_lens(tensor: Tensor, like: Tensor, max_seq_len: int, q_len: int = 1) -> None:
    """``like``: for batch and device."""
    require.dtype("seq_lens", tensor, torch.int32, torch.int64)
    require.rank("seq_lens", tensor, 1, "[1] or [batch]")
    require.broadcastable("seq_lens", tensor, (like.shape[0],))
    require.device("seq_lens", tensor, like)
    require.values("seq_lens", tensor, q_len, max_seq_len)


def attn_mask(tensor: Tensor | None, like: Tensor, sizes: tuple[int | None, ...]) -> None:
    """``like``: for the device; ``sizes``: batch, num_q_heads, q_len, max_seq_len."""
    if tensor is None:
        return
    require.tensors(attn_mask=tensor)
    require.dtype("attn_mask", tensor, torch.bool)
    layout = "a shape broadcastable to [batch, num_q_heads, q_len, max_seq_len]"
    require.rank("attn_mask", tensor, 4, layout)
    require.broadcastable("attn_mask", tensor, sizes)
    require.device("attn_mask", tensor, like)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    takes_several: bool = True,
) -> None:
    """What attention over the first positions takes; ``takes_several``: q_len may be above 1."""
    require.tensors(seq_lens=lengths)
    attention_over_cache(queries, keys, values, mask, scale, takes_several=takes_several)
    seq_lens(lengths, queries, keys.shape[2], queries.shape[2])


def attention_over_cache(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    takes_several: bool = True,
) -> None:
    """What every attention over a cache takes."""
    require.tensors(query=queries, key_cache=keys, value_cache=values)
    key_cache(keys)
    query(queries, keys.shape[1], takes_several)
    layout = "[batch, num_kv_heads, max_seq_len, head_dim]"
    sizes = (queries.shape[0], keys.shape[1], keys.shape[2], queries.shape[3])
    require.shape("key_cache", keys, sizes, layout)
    value_cache(values, keys)
    for name, tensor in (("key_cache", keys), ("value_cache", values)):
        require.dtype(name, tensor, queries.dtype)
        require.device(name, tensor, queries)
    attn_mask(mask, queries, (*queries.shape[:3], keys.shape[2]))
    scale_of_products(scale)


def scale_of_products(value: float | None) -> None:
    if value is not None:
        finite("scale", value)


def finite(name: str, value: float) -> None:
    for condition in (value > -math.inf, value < math.inf):
        require.that(condition, lambda: f"{name}: expected a finite number, got {value}")


def page_summary(
    tensor: Tensor, page_format: SummaryFormat, like: Tensor, sizes: tuple[int, int, int, int]
) -> None:
    """``like``: for dtype and device; ``sizes``: batch, num_kv_heads, num_pages, head_dim."""
    require.tensors(page_summary=tensor)
    if tensor.dtype == torch.uint8 and page_format.summary != "sketch":
        raise ValueError("page_summary: got uint8 rows, which need summary='sketch'")
    row = SUMMARIES[page_format.summary].row(sizes[3], like.dtype, page_format)
    layout = f"[batch, num_kv_heads, num_pages, {row.layout}]"
    require.shape("page_summary", tensor, (*sizes[:3], *row.shape), layout)
    require.dtype("page_summary", tensor, row.dtype)
    require.contiguous("page_summary", tensor, len(row.shape))
    require.device("page_summary", tensor, like)


def page_summary_of(tensor: Tensor, page_format: SummaryFormat, keys: Tensor) -> None:
    """A page summary of the cache ``keys``."""
    batch, num_kv_heads, max_seq_len, last = keys.shape
    sizes = (batch, num_kv_heads, page_format.num_pages(max_seq_len), last)
    page_summary(tensor, page_format, keys, sizes)
