"""Quest decoding (arXiv 2406.10774) in plain torch: what the operators mean.

Kernels answer to these functions. In float64 they are the oracle of the tests; as they are, they
serve where no kernel is installed. Only the CPU is asked for values: no other device is waited for.

Decoding is below; its parts are in
    update.py      when the summary of a page is made again
    scores.py      the score of each page, and how the heads of a group agree
    selection.py   the pages to attend
    attention.py   attention over these, or over everything
    linear.py      linear layers, which have no page
    positions.py   which positions count for a query
and what is kept of a page in ops/summaries.

Shape suffixes: B batch, Q query heads, K KV heads, G query heads per KV head, S heads that select,
H heads that share what they attend (K or Q), M heads of the mask (1 or Q), P pages, T positions,
N gathered positions, D head_dim, E head_dim of the values, W both halves of a row (2*D).
"""

import torch

from quest_compile.ops.reference.attention import (
    TILE_SIZE,
    attend_all,
    attend_pages,
    dense_decode,
    dense_prefill,
    full_attention,
)
from quest_compile.ops.reference.linear import linear_decode
from quest_compile.ops.reference.positions import each_query, join_queries, seq_len_B11
from quest_compile.ops.reference.scores import score_pages, score_scale_of
from quest_compile.ops.reference.selection import page_budget_of, select_pages
from quest_compile.ops.reference.update import update_page_summary
from quest_compile.ops.settings import FormatSettings, take_sparse
from quest_compile.ops.summaries import SUMMARIES

__all__ = [
    "attend_pages",
    "dense_decode",
    "dense_prefill",
    "each_query",
    "fits_budget",
    "full_attention",
    "linear_decode",
    "score_and_select",
    "score_pages",
    "select_pages",
    "share_mask",
    "sparse_decode",
    "sparse_decode_step",
    "update_page_summary",
]


def sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None, *, scale=None, **settings
):
    """Score, select, attend; a row that fits the budget is dense.

    Returns out, and per query its seq_lens, the selected pages, None if every row was dense, and
    which rows were, [B, 1, 1].
    """
    selection, page_format = take_sparse(settings)
    outs, selected = [], []
    for query_i, seq_lens_i, mask_i in each_query(query, seq_lens, attn_mask):
        tensors = (query_i, key_cache, value_cache, page_summary, seq_lens_i, mask_i)
        out, pages, fits_B11 = _sparse_decode(*tensors, selection, page_format, scale)
        outs.append(out)
        selected.append((seq_lens_i, pages, fits_B11))
    return join_queries(outs), selected


def fits_budget(seq_lens, max_seq_len, selection, page_size):
    """Rows that attend every page, bool [B or 1, 1, 1]; True if a cache of this length does so."""
    limits = selection.in_pages(page_size)
    most = -(-max_seq_len // page_size)
    if most <= page_budget_of(most, **limits):
        return True
    num_used_B11 = (seq_len_B11(seq_lens, max_seq_len) + page_size - 1) // page_size
    return num_used_B11 <= page_budget_of(num_used_B11, **limits)


def score_and_select(
    query, page_summary, seq_lens, attn_mask, selection, page_format, scale, ops=None
):
    """Scores [B, S, P] and selected pages of one query; ``ops``: whose functions, or these."""
    score, select = (ops.score_pages, ops.select_pages) if ops else (score_pages, select_pages)
    reduce, summary = selection.group_reduce, page_format.summary
    of_tokens = {}
    if SUMMARIES[summary].scores_tokens or reduce == "softmax":
        of_tokens = {"attn_mask": attn_mask, "scale": scale}
    scores = score(
        query, page_summary, seq_lens, group_reduce=reduce, **of_tokens, **page_format.as_kwargs()
    )
    score_scale = score_scale_of(
        query.shape[1] // page_summary.shape[1], query.shape[3], group_reduce=reduce,
        summary=summary, scale=scale
    )  # fmt: skip
    settings = selection.in_pages(page_format.page_size)
    pages = select(scores, seq_lens, attn_mask, score_scale=score_scale, **settings)
    return scores, pages


def _sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask, selection, page_format, scale
):
    page_size, max_seq_len = page_format.page_size, key_cache.shape[2]
    fits_B11 = fits_budget(seq_lens, max_seq_len, selection, page_size)
    if fits_B11 is True or (fits_B11.is_cpu and fits_B11.all()):
        out = attend_all(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
        return out, None, fits_B11
    _, pages = score_and_select(
        query, page_summary, seq_lens, attn_mask, selection, page_format, scale
    )
    out, _ = attend_pages(
        query, key_cache, value_cache, pages, seq_lens, attn_mask, page_size=page_size, scale=scale
    )
    if fits_B11.is_cpu and not fits_B11.any():
        return out, pages, fits_B11
    # A row that fits lies in the first tiles; whole ones, as dense_decode would cut them.
    end = -(-selection.budget // page_size * page_size // TILE_SIZE) * TILE_SIZE
    mask = None if attn_mask is None else attn_mask[..., :end]
    keys, values = key_cache[:, :, :end], value_cache[:, :, :end]
    dense = attend_all(query, keys, values, seq_lens.clamp(max=end), mask, scale=scale)
    return torch.where(fits_B11[..., None], dense, out), pages, fits_B11


def sparse_decode_step(
    query, key_cache, value_cache, cache_position, page_summary, num_sealed, seq_lens,
    attn_mask=None, **settings
):  # fmt: skip
    """The results of sparse_decode, and those of the update before it."""
    of_rows = {k: v for k, v in settings.items() if k in FormatSettings.__annotations__}
    updated = update_page_summary(key_cache, cache_position, page_summary, num_sealed, **of_rows)
    caches = (key_cache, value_cache, page_summary)
    return *sparse_decode(query, *caches, seq_lens, attn_mask, **settings), updated


def share_mask(attn_mask):
    return attn_mask.clone(memory_format=torch.contiguous_format)
