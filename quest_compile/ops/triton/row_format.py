"""What rows of pages consist of, as kernels take it."""

from __future__ import annotations

import dataclasses
import functools

import triton.language as tl

from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.summaries.sketch import TILE, plane_bytes, row_bytes
from quest_compile.ops.triton.launch import power_of_two

# What a program holds in registers: values of minima, or of keys that are made sketches of.
_MINMAX_VALUES, _SKETCH_VALUES = 2048, 4096


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """Every field is a constexpr, the whole an argument of kernels.

    D_PAD, T_PAD: channels and tokens of a page in registers; PAGE_TILE: pages that a program holds,
    SAMPLE_TILE: that it compares with their keys at once.
    Of sketches: PLANE: bytes of a plane; TOKENS: that have a scale; SECOND: where the second plane
    begins.
    """

    IS_SKETCH: tl.constexpr
    BITS: tl.constexpr
    D: tl.constexpr
    D_PAD: tl.constexpr
    PAGE_SIZE: tl.constexpr
    T_PAD: tl.constexpr
    PAGE_TILE: tl.constexpr
    SAMPLE_TILE: tl.constexpr
    PLANE: tl.constexpr
    TOKENS: tl.constexpr
    SECOND: tl.constexpr

    @property
    def num_warps(self) -> int:
        values = self.PAGE_TILE.value * self.D_PAD.value * self.T_PAD.value
        return min(16, max(4, values // 512)) if self.IS_SKETCH.value else 4


@functools.cache
def row_format(page_format: SummaryFormat, head_dim: int) -> RowFormat:
    page_size, is_sketch = page_format.page_size, page_format.summary == "sketch"
    d_pad = power_of_two(head_dim, 32 if is_sketch else 16)
    t_pad = power_of_two(page_size, TILE)
    page_tile = max(1, _SKETCH_VALUES // (d_pad * t_pad))
    if not is_sketch:
        page_tile = max(8, _MINMAX_VALUES // d_pad)
    fields = (
        is_sketch, page_format.sketch_bits, head_dim, d_pad, page_size, t_pad, page_tile,
        min(4, page_tile), plane_bytes(head_dim, page_size), -(-page_size // TILE) * TILE,
        row_bytes(head_dim, page_size, 1),
    )  # fmt: skip
    return RowFormat(*map(tl.constexpr, fields))
