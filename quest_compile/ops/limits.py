"""What the operators support; the one place that says so in Python."""

from __future__ import annotations

import torch

PAGE_SIZES = range(8, 129, 8)
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_REDUCTIONS = ("sum", "max", "none")
SUMMARIES = ("minmax", "sketch")
SKETCH_BITS = (1, 2)
# Tokens whose bits of 8 channels lie side by side in a sketch.
SKETCH_TILE = 16
# Pages that channel_scale is taken from, spread evenly.
NUM_SCALE_PAGES = 128


def sketch_row_bytes(head_dim: int, page_size: int, sketch_bits: int) -> int:
    return sketch_bits * page_size * head_dim // 8 + head_dim + page_size + 8


def num_pages_of(max_seq_len: int, page_size: int) -> int:
    """Pages of a cache of this many positions; the last one may be cut short by its end."""
    return (max_seq_len + page_size - 1) // page_size
