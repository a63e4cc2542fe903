"""What the operators support; the one place that says so in Python."""

from __future__ import annotations

import torch

PAGE_SIZES = range(8, 129, 8)
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_REDUCTIONS = ("sum", "max", "none")
# "minmax": rows [2, head_dim] in the dtype of the keys; the others: uint8, and a channel_scale.
SUMMARIES = ("minmax", "minmax_int8", "sketch")
SKETCH_BITS = (1, 2)
# Tokens whose bits of 8 channels lie side by side in a sketch.
SKETCH_TILE = 16
# Pages that channel_scale is taken from, spread evenly.
NUM_SCALE_PAGES = 128


def row_bytes(summary: str, head_dim: int, page_size: int, sketch_bits: int) -> int:
    """Bytes per page of the summaries that are uint8 rows."""
    if summary == "sketch":
        return sketch_bits * page_size * head_dim // 8 + head_dim + page_size + 8
    return int8_row_bytes(head_dim)


def int8_row_bytes(head_dim: int) -> int:
    """Of "minmax_int8": int8 [2, head_dim], a float32, and padding to a multiple of 8."""
    return (2 * head_dim + 4 + 7) // 8 * 8


def channel_scale_sizes(summary: str, head_dim: int) -> tuple[int, ...]:
    """Of channel_scale, behind batch and num_kv_heads."""
    return (3, head_dim) if summary == "sketch" else (head_dim,)


def num_pages_of(max_seq_len: int, page_size: int) -> int:
    """Pages of a cache of this many positions; the last one may be cut short by its end."""
    return (max_seq_len + page_size - 1) // page_size
