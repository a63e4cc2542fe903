"""Attention over listed pages, or over everything: splits, merged by the one that comes last."""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows import seq_len_of

# What one row is split into at most. The merge reads as many slots, whatever is in use.
MAX_SPLITS: tl.constexpr = tl.constexpr(64)
# Tokens of a split of a row that attends everything, at least.
DENSE_SPLIT: tl.constexpr = tl.constexpr(256)


@triton.jit
def merge(
    out_ptr, lse_ptr, partial_ptr, sums_ptr, num_splits, row_head, split_stride, out_stride_h,
    lse_stride_h, HAS_LSE: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    E: tl.constexpr, E_TILE: tl.constexpr,
):  # fmt: skip
    """The result of one row and its query heads, in the order of the splits."""
    split = tl.arange(0, MAX_SPLITS)
    for head in range(HEADS):
        slot = (row_head * split_stride + split) * HEADS_PAD + head
        largest = tl.load(sums_ptr + 2 * slot, mask=split < num_splits, other=float("-inf"))
        total = tl.load(sums_ptr + 2 * slot + 1, mask=split < num_splits, other=0.0)
        top = tl.max(largest, axis=0)
        weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight * total, axis=0)
        for first in range(0, E, E_TILE):
            e = first + tl.arange(0, E_TILE)
            pointers = partial_ptr + slot[:, None] * E + e[None, :]
            is_read = (split < num_splits)[:, None] & (e < E)[None, :]
            part = tl.load(pointers, mask=is_read, other=0.0)
            out = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
            out_dtype: tl.constexpr = out_ptr.dtype.element_ty
            tl.store(out_ptr + head * out_stride_h + e, out.to(out_dtype), mask=e < E)
        if HAS_LSE:
            lse = (top + tl.log2(total)) * 0.6931471805599453
            lse = tl.where(total == 0.0, float("-inf"), lse)
            tl.store(lse_ptr + head * lse_stride_h, lse)


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i",
                       "mask_stride_b", "mask_stride_i", "mask_stride_h", "split_pages",
                       "page_budget", "heads_per_list", "heads_per_kv_head", "num_lists"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "mask_ptr"],
)  # fmt: skip
def attend(
    # query_ptr [B, Q, q_len, D], key_ptr [B, K, max_seq_len, D], value_ptr [B, K, max_seq_len, E]
    query_ptr, key_ptr, value_ptr,
    # int32 [B, q_len, num_lists, page_budget], or None; [B, q_len]; bool, or None
    pages_ptr, seq_lens_ptr, mask_ptr,
    # out_ptr [B, Q, q_len, E], lse_ptr float32 [B, q_len, Q], or None
    out_ptr, lse_ptr,
    # float32 [B, q_len, H, splits, HEADS_PAD, E]; [..., 2]: largest logit and sum;
    # int32 [B, q_len, H], zeros
    partial_ptr, sums_ptr, counters_ptr,
    query_stride_b, query_stride_h, query_stride_i, key_stride_b, key_stride_h, key_stride_t,
    value_stride_b, value_stride_h, value_stride_t, out_stride_b, out_stride_h, out_stride_i,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len,
    mask_stride_b, mask_stride_i, mask_stride_h, mask_len,
    page_budget, split_pages, heads_per_list, heads_per_kv_head, num_lists, scale_log2,
    HAS_PAGES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LSE: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, E_TILE: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    WIDEN: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (splits, H, B * q_len); HEADS query heads that attend the same positions per program.

    Rows of at most ``budget_tokens`` attend everything, as without pages: then a split follows from
    the length of the row alone.
    """
    split, h, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_programs_h = tl.num_programs(1)
    b, i = row // q_len, row % q_len
    seq_len = seq_len_of(
        seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
    )  # fmt: skip
    uses_pages = False
    split_tokens = tl.cdiv(tl.cdiv(seq_len, MAX_SPLITS), DENSE_SPLIT) * DENSE_SPLIT
    num_tokens = seq_len
    if HAS_PAGES:
        uses_pages = seq_len > budget_tokens
        split_tokens = tl.where(uses_pages, split_pages * PAGE_SIZE, split_tokens)
        num_tokens = tl.where(uses_pages, page_budget * PAGE_SIZE, num_tokens)
    num_splits = tl.cdiv(num_tokens, split_tokens)
    if split < num_splits:
        kv_head = h // heads_per_kv_head
        key_ptr += b * key_stride_b + kv_head * key_stride_h
        value_ptr += b * value_stride_b + kv_head * value_stride_h
        d, e, head = tl.arange(0, D_PAD), tl.arange(0, E_PAD), tl.arange(0, HEADS_PAD)
        query_ptr += b * query_stride_b + i * query_stride_i + h * HEADS * query_stride_h
        q = tl.load(
            query_ptr + head[:, None] * query_stride_h + d[None, :],
            mask=(head < HEADS)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        if WIDEN:
            q = q.to(tl.float32)
        if HAS_PAGES:
            pages_ptr += (row * num_lists + h // heads_per_list) * page_budget
        if HAS_MASK:
            mask_ptr += b * mask_stride_b + i * mask_stride_i + h * HEADS * mask_stride_h
        largest = tl.full([HEADS_PAD], float("-inf"), tl.float32)
        total = tl.zeros([HEADS_PAD], tl.float32)
        out = tl.zeros([HEADS_PAD, E_PAD], tl.float32)
        begin = split * split_tokens
        end = tl.minimum(begin + split_tokens, num_tokens)
        for first in tl.range(begin, end, TILE, num_stages=NUM_STAGES):
            token = first + tl.arange(0, TILE)
            position, is_live = token.to(tl.int64), token < end
            if HAS_PAGES:
                page = tl.load(pages_ptr + token // PAGE_SIZE, mask=is_live & uses_pages, other=0)
                paged = page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
                position = tl.where(uses_pages, paged, position)
                is_live = is_live & (page >= 0) & (position < seq_len)
            if HAS_MASK:
                in_mask = is_live & (position < mask_len)
                is_live = is_live & (tl.load(mask_ptr + position, mask=in_mask, other=0) != 0)
            k = tl.load(
                key_ptr + position[None, :] * key_stride_t + d[:, None],
                mask=is_live[None, :] & (d < D)[:, None], other=0.0,
            )  # fmt: skip
            v = tl.load(
                value_ptr + position[:, None] * value_stride_t + e[None, :],
                mask=is_live[:, None] & (e < E)[None, :], other=0.0,
            )  # fmt: skip
            if WIDEN:
                k, v = k.to(tl.float32), v.to(tl.float32)
            logits = tl.dot(q, k, input_precision="ieee") * scale_log2
            logits = tl.where(is_live[None, :], logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, axis=1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weight, axis=1)
            out = out * shrink[:, None]
            out = tl.dot(weight.to(v.dtype), v, out, input_precision="ieee")
            largest = new_largest
        row_head = row * num_programs_h + h
        slot = (row_head * tl.num_programs(0) + split) * HEADS_PAD + head
        is_head = head < HEADS
        tl.store(
            partial_ptr + slot[:, None] * E + e[None, :], out,
            mask=is_head[:, None] & (e < E)[None, :],
        )  # fmt: skip
        tl.store(sums_ptr + 2 * slot, largest, mask=is_head)
        tl.store(sums_ptr + 2 * slot + 1, total, mask=is_head)
        # All threads of this program have written before one of them counts.
        tl.debug_barrier()
        num_before = tl.atomic_add(counters_ptr + row_head, 1, sem="acq_rel", scope="gpu")
        if num_before == num_splits - 1:
            tl.debug_barrier()
            merge(
                out_ptr + b * out_stride_b + i * out_stride_i + h * HEADS * out_stride_h,
                lse_ptr + row * num_programs_h * HEADS + h * HEADS, partial_ptr, sums_ptr,
                num_splits, row_head, tl.num_programs(0), out_stride_h, 1,
                HAS_LSE, HEADS, HEADS_PAD, E, E_TILE,
            )  # fmt: skip
