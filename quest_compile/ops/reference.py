"""Quest decoding (arXiv 2406.10774) in plain torch: what the operators mean.

Kernels answer to these functions. In float64 they are the oracle of the tests; as they are, they
serve where no kernel is installed. Only the CPU is asked for values: no other device is waited for.

Decoding is below; its parts are in
    reference_summaries.py   what is kept of each page, and when it is made again
    reference_sketch.py      the rows and scores of sketches
    reference_scores.py      the score of each page
    reference_selection.py   the pages to attend
    reference_attention.py   attention over these, or over everything
    reference_positions.py   which positions count for a query

Shape suffixes: B batch, Q query heads, K KV heads, G query heads per KV head, S heads that select,
H heads that share what they attend (K or Q), M heads of the mask (1 or Q), P pages, T positions,
N gathered positions, D head_dim, E head_dim of the values, W both halves of a row (2*D).
"""

import torch

from quest_compile.ops.reference_attention import (
    TILE_SIZE,
    attend_all,
    attend_pages,
    dense_decode,
    full_attention,
)
from quest_compile.ops.reference_positions import each_query, join_queries, seq_len_B11
from quest_compile.ops.reference_scores import score_pages
from quest_compile.ops.reference_selection import page_budget_of, score_scale_of, select_pages
from quest_compile.ops.reference_summaries import update_page_summary

__all__ = [
    "attend_pages",
    "dense_decode",
    "each_query",
    "fits_budget",
    "full_attention",
    "score_pages",
    "select_pages",
    "share_mask",
    "sparse_decode",
    "sparse_decode_step",
    "update_page_summary",
]


def sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None, channel_scale=None, *,
    budget, page_size=16, num_sink_pages=1, num_recent_pages=2, group_reduce="sum",
    summary="minmax", sketch_bits=1, scale=None, budget_fraction=1.0, top_p=1.0
):  # fmt: skip
    """Score, select, attend; a row that fits the budget is dense.

    Returns out, and per query its seq_lens, the selected pages, None if every row was dense, and
    which rows were, [B, 1, 1].
    """
    settings = {
        "budget": budget, "page_size": page_size, "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages, "group_reduce": group_reduce, "summary": summary,
        "sketch_bits": sketch_bits, "scale": scale, "budget_fraction": budget_fraction,
        "top_p": top_p,
    }  # fmt: skip
    outs, selected = [], []
    for query_i, seq_lens_i, mask_i in each_query(query, seq_lens, attn_mask):
        caches = (key_cache, value_cache, page_summary)
        arguments = (query_i, *caches, seq_lens_i, mask_i, channel_scale)
        out, pages, fits_B11 = _sparse_decode(*arguments, **settings)
        outs.append(out)
        selected.append((seq_lens_i, pages, fits_B11))
    return join_queries(outs), selected


def fits_budget(
    seq_lens, max_seq_len, *, budget, page_size=16, num_sink_pages=1, num_recent_pages=2,
    budget_fraction=1.0
):  # fmt: skip
    """Rows that attend every page, bool [B or 1, 1, 1]; True if a cache of this length does so."""
    limits = {
        "page_budget": budget // page_size, "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages, "budget_fraction": budget_fraction,
    }  # fmt: skip
    most = -(-max_seq_len // page_size)
    if most <= page_budget_of(most, **limits):
        return True
    num_used_B11 = (seq_len_B11(seq_lens, max_seq_len) + page_size - 1) // page_size
    return num_used_B11 <= page_budget_of(num_used_B11, **limits)


def _sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale, *, budget,
    page_size, num_sink_pages, num_recent_pages, group_reduce, summary, sketch_bits, scale,
    budget_fraction, top_p
):  # fmt: skip
    page_budget, max_seq_len = budget // page_size, key_cache.shape[2]
    limits = {
        "page_size": page_size, "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages, "budget_fraction": budget_fraction,
    }  # fmt: skip
    fits_B11 = fits_budget(seq_lens, max_seq_len, budget=budget, **limits)
    if fits_B11 is True or (fits_B11.is_cpu and fits_B11.all()):
        out = attend_all(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
        return out, None, fits_B11
    scores = score_pages(
        query, page_summary, seq_lens, channel_scale, page_size=page_size,
        group_reduce=group_reduce, summary=summary, sketch_bits=sketch_bits, scale=scale,
        attn_mask=attn_mask if summary == "sketch" else None
    )  # fmt: skip
    score_scale = score_scale_of(
        query.shape[1] // key_cache.shape[1], query.shape[3], group_reduce=group_reduce,
        summary=summary, scale=scale
    )  # fmt: skip
    pages = select_pages(
        scores, seq_lens, attn_mask, page_budget=page_budget, top_p=top_p, score_scale=score_scale,
        **limits
    )  # fmt: skip
    out, _ = attend_pages(
        query, key_cache, value_cache, pages, seq_lens, attn_mask, page_size=page_size, scale=scale
    )
    if fits_B11.is_cpu and not fits_B11.any():
        return out, pages, fits_B11
    # A row that fits lies in the first tiles; whole ones, as dense_decode would cut them.
    end = -(-page_budget * page_size // TILE_SIZE) * TILE_SIZE
    mask = None if attn_mask is None else attn_mask[..., :end]
    keys, values = key_cache[:, :, :end], value_cache[:, :, :end]
    dense = attend_all(query, keys, values, seq_lens.clamp(max=end), mask, scale=scale)
    return torch.where(fits_B11[..., None], dense, out), pages, fits_B11


def sparse_decode_step(
    query, key_cache, value_cache, cache_position, page_summary, num_sealed, seq_lens,
    attn_mask=None, channel_scale=None, **settings
):  # fmt: skip
    """The results of sparse_decode, and those of the update before it."""
    updated = update_page_summary(
        key_cache, cache_position, page_summary, num_sealed, channel_scale,
        page_size=settings.get("page_size", 16), summary=settings.get("summary", "minmax"),
        sketch_bits=settings.get("sketch_bits", 1)
    )  # fmt: skip
    caches = (key_cache, value_cache, page_summary)
    results = sparse_decode(query, *caches, seq_lens, attn_mask, channel_scale, **settings)
    return *results, updated


def share_mask(attn_mask):
    return attn_mask.clone(memory_format=torch.contiguous_format)
