"""Checks of page summaries: their kind, rows and channel scales."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import limits, require


def summary_kind(value: str, sketch_bits: int) -> None:
    if value not in limits.SUMMARIES:
        expected = ", ".join(map(repr, limits.SUMMARIES))
        raise ValueError(f"summary: expected one of {expected}, got {value!r}")
    if isinstance(sketch_bits, bool) or sketch_bits not in limits.SKETCH_BITS:
        raise ValueError(f"sketch_bits: expected 1 or 2, got {sketch_bits!r}")


def page_summary(
    tensor: Tensor,
    scale: Tensor | None,
    kind: str,
    like: Tensor,
    sizes: tuple[int, int, int, int],
    page_size: int,
    sketch_bits: int,
) -> None:
    """``scale``: channel_scale; ``like``: for dtype and device; ``sizes``: batch, num_kv_heads,
    num_pages, head_dim."""
    summary_kind(kind, sketch_bits)
    if isinstance(tensor, tuple):
        raise TypeError(
            "page_summary: expected a tensor, got a tuple: of sketches "
            "build_page_summary gives page_summary and channel_scale"
        )
    require.tensors(page_summary=tensor)
    if kind == "minmax":
        if tensor.dtype == torch.uint8:
            raise ValueError("page_summary: got uint8 rows, which need summary='sketch'")
        layout = "[batch, num_kv_heads, num_pages, 2, head_dim]"
        require.shape("page_summary", tensor, (*sizes[:3], 2, sizes[3]), layout)
        require.dtype("page_summary", tensor, like.dtype)
        require.contiguous("page_summary", tensor, 2)
        if scale is not None:
            raise ValueError(f"channel_scale: expected None with summary={kind!r}, got a tensor")
    else:
        layout = "[batch, num_kv_heads, num_pages, bytes_per_page]"
        row_bytes = limits.sketch_row_bytes(sizes[3], page_size, sketch_bits)
        require.shape("page_summary", tensor, (*sizes[:3], row_bytes), layout)
        require.dtype("page_summary", tensor, torch.uint8)
        require.contiguous("page_summary", tensor, 1)
        if scale is None:
            raise ValueError(f"channel_scale: expected a tensor with summary={kind!r}, got None")
        require.tensors(channel_scale=scale)
        layout = "[batch, num_kv_heads, 3, head_dim]"
        require.shape("channel_scale", scale, (*sizes[:2], 3, sizes[3]), layout)
        require.dtype("channel_scale", scale, torch.float32)
        require.contiguous("channel_scale", scale, 4)
        require.device("channel_scale", scale, like)
    require.device("page_summary", tensor, like)


def page_summary_of(
    tensor: Tensor, scale: Tensor | None, kind: str, keys: Tensor, size: int, sketch_bits: int
) -> None:
    """A page summary of the cache ``keys`` with pages of this size."""
    batch, num_kv_heads, max_seq_len, last = keys.shape
    sizes = (batch, num_kv_heads, limits.num_pages_of(max_seq_len, size), last)
    page_summary(tensor, scale, kind, keys, sizes, size, sketch_bits)
