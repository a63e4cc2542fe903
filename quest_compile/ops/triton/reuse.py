"""With select_every: does this step select by the page scores of an earlier one?"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_heads", "budget_tokens", "max_seq_len", "select_every"],
    do_not_specialize_on_alignment=["first_ptr", "sealed_ptr", "seq_lens_ptr", "scored_at_ptr"],
)
def decide_reuse(
    # int64 [1], [1 or 2], as before the update; int32 [num_heads]: heads found stale, or with
    # IS_SCALED the first page that is made
    first_ptr, sealed_ptr, heads_ptr,
    # [1]; int64 [2], written: length of the step that scored, or -1, and of the last; int32 [1]
    seq_lens_ptr, scored_at_ptr, is_reused_ptr,
    num_heads, budget_tokens, max_seq_len, select_every,
    HAS_NEXT: tl.constexpr, IS_SCALED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEADS_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (1,), after the first launch of the update and before num_sealed is written."""
    first = tl.minimum(tl.maximum(tl.load(first_ptr), 0), max_seq_len - 1)
    head = tl.arange(0, HEADS_PAD)
    found = tl.load(heads_ptr + head, mask=head < num_heads, other=0).to(tl.int64)
    if IS_SCALED:
        is_other = (head < num_heads) & (found != first // PAGE_SIZE)
        continues = tl.max(is_other.to(tl.int32), axis=0) == 0
    else:
        start = tl.minimum(tl.maximum(tl.load(sealed_ptr), 0), first // PAGE_SIZE)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            start = tl.where((next_position < 0) | (next_position == first), start, 0)
        continues = (start == first // PAGE_SIZE) & (tl.max(found, axis=0) == 0)
    length = tl.load(seq_lens_ptr).to(tl.int64)
    keeps = tl.minimum(tl.maximum(length, 1), max_seq_len) > budget_tokens
    scored, last = tl.load(scored_at_ptr), tl.load(scored_at_ptr + 1)
    is_reused = keeps & continues & (scored > 0) & (last == length - 1)
    is_reused = is_reused & (length % select_every != 0)
    tl.store(is_reused_ptr, is_reused.to(tl.int32))
    tl.store(scored_at_ptr, tl.where(is_reused, scored, tl.where(keeps, length, -1)))
    tl.store(scored_at_ptr + 1, length)
