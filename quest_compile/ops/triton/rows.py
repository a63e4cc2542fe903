"""Device functions that several kernels share: lengths of rows of a batch, rows of pages.

A row of a batch is one query of one batch row. Kernels are launched over what the cache can hold;
how much of it is in use is read on the device.
"""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows_minmax import load_minmax, make_minmax, put_minmax
from quest_compile.ops.triton.rows_sketch import load_sketch, make_sketch, put_sketch


@triton.jit
def seq_len_of(seq_lens_ptr, b, i, q_len, stride_b, stride_i, step, max_seq_len):
    """Of query i of batch row b, in [1, max_seq_len]; ``step`` 1: query i stands q_len - 1 - i
    before the end; 0: seq_lens has a value per query."""
    seq_len = tl.load(seq_lens_ptr + b * stride_b + i * stride_i).to(tl.int64)
    seq_len = seq_len - (q_len - 1 - i) * step
    return tl.minimum(tl.maximum(seq_len, 1), max_seq_len)


@triton.jit
def make_rows(key_ptr, pages, is_wanted, key_stride_t, F: tl.constexpr):
    """From the keys; in registers, as rows_minmax and rows_sketch say."""
    if F.IS_SKETCH:
        return make_sketch(key_ptr, pages, is_wanted, key_stride_t, F)
    else:
        return make_minmax(key_ptr, pages, is_wanted, key_stride_t, F)


@triton.jit
def load_rows(rows, is_read, F: tl.constexpr):
    if F.IS_SKETCH:
        return load_sketch(rows, is_read, F)
    else:
        return load_minmax(rows, is_read, F)


@triton.jit
def put_rows(rows, values, is_wanted, F: tl.constexpr, COMPARE: tl.constexpr):
    """Write them; or with COMPARE write nothing, and say (int32) if other ones are stored."""
    if F.IS_SKETCH:
        return put_sketch(rows, values, is_wanted, F, COMPARE)
    else:
        return put_minmax(rows, values, is_wanted, F, COMPARE)


@triton.jit
def choose_rows(is_first, first, second, F: tl.constexpr):
    each = is_first[:, None]
    if F.IS_SKETCH:
        return (
            tl.where(each[:, :, None], first[0], second[0]), tl.where(each, first[1], second[1]),
            tl.where(each, first[2], second[2]), tl.where(is_first, first[3], second[3]),
        )  # fmt: skip
    else:
        return tl.where(each, first[0], second[0]), tl.where(each, first[1], second[1])


@triton.jit
def is_stale(
    key_ptr, summary_ptr, start, first_written, key_stride_t, summary_stride_p, F: tl.constexpr
):
    """int32: do some of the pages before ``start`` have other keys than when they were sealed?"""
    differs = 0
    if start > 0:
        for first in range(0, 4, F.SAMPLE_TILE):
            sample = first + tl.arange(0, F.SAMPLE_TILE)
            spread = first_written * 2654435761 % 4294967296 + 40503 * (sample - 1)
            pages = tl.where(sample == 0, start - 1, spread % start)
            values = make_rows(key_ptr, pages, sample >= 0, key_stride_t, F)
            rows = summary_ptr + pages * summary_stride_p
            differs |= put_rows(rows, values, sample >= 0, F, True)
    return differs


@triton.jit
def finish_update(
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr, b, k, is_first_of_head, is_first,
    key_stride_b, key_stride_h, key_stride_t, summary_stride_b, summary_stride_h, summary_stride_p,
    num_kv_heads, max_seq_len, HAS_NEXT: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """What update_and_score leaves to a later launch, when nothing reads the old state any more:
    num_sealed, and the summaries of heads that were found stale."""
    last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
    num_complete = (last + 1) // F.PAGE_SIZE
    if is_first:
        tl.store(sealed_ptr, num_complete)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            tl.store(sealed_ptr + 1, tl.where(next_position < 0, -1, last + 1))
    if is_first_of_head:
        if tl.load(stale_ptr + b * num_kv_heads + k) != 0:
            key_ptr += b * key_stride_b + k * key_stride_h
            summary_ptr += b * summary_stride_b + k * summary_stride_h
            for page in range(0, num_complete, F.PAGE_TILE):
                pages = page + tl.arange(0, F.PAGE_TILE).to(tl.int64)
                is_new = pages < num_complete
                values = make_rows(key_ptr, pages, is_new, key_stride_t, F)
                put_rows(summary_ptr + pages * summary_stride_p, values, is_new, F, False)
