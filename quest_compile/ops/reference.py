"""Quest decoding (arXiv 2406.10774) in plain torch: what the operators mean.

Kernels answer to these functions. In float64 they are the oracle of the tests; as they are, they
serve where no kernel is installed. Only the CPU is asked for values: no other device is waited for.

Shape suffixes: B batch, Q query heads, K KV heads, G query heads per KV head, S heads that select,
H heads that share what they attend (K or Q), M heads of the mask (1 or Q), P pages, T positions,
N gathered positions, D head_dim, E head_dim of the values, W both halves of a row (2*D).
"""

import torch
from torch.nn.functional import pad

from quest_compile.ops import reference_means, reference_selection, reference_sketch
from quest_compile.ops.limits import FLOAT_SUMMARIES, NUM_SCALE_PAGES, int8_row_bytes

_TILE_SIZE = 512


def update_page_summary(
    key_cache, cache_position, page_summary, num_sealed, channel_scale=None, *, page_size=16,
    summary="minmax", sketch_bits=1
):  # fmt: skip
    """Recompute what a write may have changed. Returns (stale heads, recomputed pages) to count,
    and whether nothing before the page of the first written position was recomputed."""
    max_seq_len = key_cache.shape[2]
    written = cache_position.clamp(0, max_seq_len - 1)
    first_written, num_complete = written.min(), (written.max() + 1) // page_size
    start = torch.minimum(num_sealed[0].clamp(min=0), first_written // page_size)
    if len(num_sealed) == 2:
        is_next = (num_sealed[1] < 0) | (num_sealed[1] == first_written)
        start = torch.where(is_next, start, 0)
        num_sealed[1] = torch.where(num_sealed[1] < 0, -1, written.max() + 1)
    num_scaled = _floor_to_power_of_two(num_complete)
    if channel_scale is not None:
        # Taken from these pages, scales depend on the keys alone and not on how they came in.
        is_scaled = (_floor_to_power_of_two(num_sealed[0]) == num_scaled) & (start >= num_scaled)
        start = torch.where(is_scaled, start, 0)
    # Somebody else may have written the cache: compare some sealed pages with the keys, bit by bit.
    spread = first_written * 2654435761 % 2**32 + 40503 * _arange(3, start)
    sampled = torch.cat([(start - 1)[None], spread % start.clamp(min=1)]).clamp(min=0)
    tokens = (sampled[:, None] * page_size + _arange(page_size, start)).clamp(max=max_seq_len - 1)
    expected = _page_rows(key_cache[:, :, tokens], summary, channel_scale, sketch_bits)
    stored = page_summary[:, :, sampled]
    differs = expected.view(torch.uint8) != stored.view(torch.uint8)
    is_stale_BK = differs.flatten(2).any(-1) & (start > 0)
    start_BK = torch.where(is_stale_BK, 0, start)
    if channel_scale is not None and not (start.is_cpu and start_BK.all()):
        _scale_channels(key_cache, channel_scale, num_scaled, start_BK == 0, page_size, summary)
    low, high = 0, max_seq_len // page_size
    if start.is_cpu:
        low, high = min(int(start_BK.min()), int(num_complete)), int(num_complete)
    page = _arange(high, start)[low:]
    is_new_BKP = (page >= start_BK[..., None]) & (page < num_complete)
    keys = key_cache[:, :, low * page_size : high * page_size].unflatten(2, (high - low, page_size))
    stored = page_summary[:, :, low:high]
    rows = _page_rows(keys, summary, channel_scale, sketch_bits)
    is_new = is_new_BKP.unflatten(-1, (high - low, *[1] * (stored.ndim - 3)))
    stored.copy_(torch.where(is_new, rows, stored))
    num_sealed[0] = num_complete
    continues = (start_BK == first_written // page_size).all()
    return is_stale_BK.sum(), is_new_BKP, continues


def score_pages(
    query, page_summary, seq_lens, channel_scale=None, *, page_size=16, group_reduce="sum",
    summary="minmax", sketch_bits=1, attn_mask=None, scale=None
):  # fmt: skip
    """Upper bound of query.key over each complete page, for means an estimate of that, for sketches
    the log of the sum of its exp over the page's live tokens; -inf for the others."""
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    head_dim = query.shape[-1]
    query_BKGD = _widen(query.contiguous().view(batch, num_kv_heads, -1, head_dim))
    num_complete_B11 = _seq_len_B11(seq_lens, num_pages * page_size) // page_size
    is_open_B1P = _arange(num_pages, seq_lens) >= num_complete_B11
    if summary == "sketch":
        live_BKGPT = None
        if attn_mask is not None:
            live_BMT = _live_positions(seq_lens, attn_mask, num_pages * page_size)
            num_groups = query.shape[1] if group_reduce == "none" else num_kv_heads
            if live_BMT.shape[1] > 1:
                live_BMT = live_BMT.unflatten(1, (num_groups, -1)).any(2)
                live_BMT = live_BMT.unflatten(1, (num_kv_heads, -1))
            else:
                live_BMT = live_BMT[:, None]
            live_BKGPT = live_BMT.unflatten(-1, (num_pages, page_size))
        score_BSP = reference_sketch.score_pages(
            query_BKGD, page_summary, channel_scale, live_BKGPT, page_size=page_size,
            sketch_bits=sketch_bits, group_reduce=group_reduce,
            scale=head_dim**-0.5 if scale is None else scale
        )  # fmt: skip
        return score_BSP.masked_fill(is_open_B1P, -torch.inf)
    if summary == "minmax_int8":
        query_BKGD = query_BKGD * channel_scale[:, :, None]
    if summary == "meanstd":
        weight_BKGW = torch.cat([query_BKGD, query_BKGD.abs()], -1)
    else:
        # max(q*min, q*max) = min(q, 0)*min + max(q, 0)*max as min <= max: one dot product.
        weight_BKGW = torch.cat([query_BKGD.clamp(max=0), query_BKGD.clamp(min=0)], -1)
    if group_reduce == "sum":
        weight_BKGW = weight_BKGW.sum(2, keepdim=True)
    row_BKPW, page_scale_BKP = _bounds_of(page_summary, head_dim, summary)
    bound_BKGP = _dot_products(weight_BKGW, row_BKPW.to(weight_BKGW.dtype))
    if page_scale_BKP is not None:
        bound_BKGP = bound_BKGP * page_scale_BKP[:, :, None]
    score_BSP = bound_BKGP.amax(2) if group_reduce == "max" else bound_BKGP.flatten(1, 2)
    return score_BSP.masked_fill(is_open_B1P, -torch.inf)


def select_pages(
    scores, seq_lens, attn_mask=None, *, page_budget, page_size=16, num_sink_pages=1,
    num_recent_pages=2, budget_fraction=1.0, top_p=1.0, score_scale=1.0
):  # fmt: skip
    """Sinks, recents and the highest scores: ascending indices of live pages, -1 behind them."""
    _, num_select_heads, num_pages = scores.shape
    live_BMT = _live_positions(seq_lens, attn_mask, num_pages * page_size)
    live_BMP = live_BMT.unflatten(-1, (num_pages, page_size)).any(-1)
    num_groups = min(live_BMP.shape[1], num_select_heads)
    live_BSP = live_BMP.unflatten(1, (num_groups, -1)).any(2).expand_as(scores)
    num_used_B11 = (_seq_len_B11(seq_lens, num_pages * page_size) + page_size - 1) // page_size
    is_sink_BSP = live_BSP.cumsum(-1) <= num_sink_pages
    is_recent_B1P = _arange(num_pages, scores) >= num_used_B11 - num_recent_pages
    # Rank by kind (forced, live, dead), then by score, NaN being the highest, then by index.
    kind_BSP = live_BSP.int() + (live_BSP & (is_sink_BSP | is_recent_B1P)).int()
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_kind = kind_BSP.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    ranked = by_score.gather(-1, by_kind)
    row_budget_B11 = reference_selection.page_budget_of(
        num_used_B11, page_budget=page_budget, num_sink_pages=num_sink_pages,
        num_recent_pages=num_recent_pages, budget_fraction=budget_fraction
    )  # fmt: skip
    kind_BSP = kind_BSP.gather(-1, ranked)
    is_kept_BSP = (kind_BSP > 0) & (_arange(num_pages, scores) < row_budget_B11)
    if top_p < 1:
        scores = scores.gather(-1, ranked)
        is_kept_BSP &= (kind_BSP == 2) | reference_selection.is_in_top_p(
            scores, kind_BSP == 1, top_p, score_scale
        )
    chosen = ranked.masked_fill(~is_kept_BSP, num_pages)[..., :page_budget].sort(-1).values
    chosen = pad(chosen, (0, page_budget - chosen.shape[-1]), value=num_pages)
    return chosen.masked_fill(chosen == num_pages, -1).int()


def attend_pages(
    query, key_cache, value_cache, page_indices, seq_lens, attn_mask=None, *, page_size=16,
    scale=None
):  # fmt: skip
    """Attention over the live positions of the listed pages: out, log of the softmax's sum."""
    batch, max_seq_len = query.shape[0], key_cache.shape[2]
    live_BMT = _live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(page_indices.shape[1], live_BMT.shape[1])
    page_BHP = page_indices.long().repeat_interleave(num_heads // page_indices.shape[1], 1)
    position_BHN = (page_BHP[..., None] * page_size + _arange(page_size, page_BHP)).flatten(-2)
    in_cache_BHN = position_BHN.clamp(0, max_seq_len - 1)
    live_BHN = live_BMT.expand(batch, num_heads, -1).gather(-1, in_cache_BHN)
    live_BHN &= in_cache_BHN == position_BHN
    row = _arange(batch, query)[:, None, None]
    kv_head = (_arange(num_heads, query) * key_cache.shape[1] // num_heads)[:, None]
    key_BHND, value_BHNE = (cache[row, kv_head, in_cache_BHN] for cache in (key_cache, value_cache))
    out_BHGE, lse_BHG = _attend(query, key_BHND, value_BHNE, live_BHN, scale)
    return _join_queries([out_BHGE.flatten(1, 2)[:, :, None].to(query.dtype)]), lse_BHG.flatten(
        1, 2
    )[..., None]


def each_query(query, seq_lens, attn_mask=None):
    """Operators that take several queries treat each as if it came alone: query [B, Q, 1, D], its
    seq_lens and its mask, one after the other.

    Without a mask query i of n stands at position seq_len - n + i and attends what is before it.
    With one, the mask says what it attends: positions at the end that the mask forbids, behind that
    position, do not count for its seq_len.
    """
    num_queries = query.shape[2]
    for i in range(num_queries):
        seq_lens_i, mask_i = seq_lens - (num_queries - 1 - i), None
        if attn_mask is not None:
            mask_i = attn_mask[:, :, min(i, attn_mask.shape[2] - 1), None]
            if i < num_queries - 1:
                end = _last_live_position(seq_lens, mask_i) + 1
                seq_lens_i = torch.maximum(seq_lens_i, end)
        yield query[:, :, i : i + 1], seq_lens_i, mask_i


def dense_decode(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    """Attention over all live positions."""
    outs = [
        _dense_decode(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
        for query, seq_lens, attn_mask in each_query(query, seq_lens, attn_mask)
    ]
    return _join_queries(outs)


def _join_queries(outs):
    """In memory [B, queries, Q, E], as attention gives it for a query that is a projection."""
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2)


def _dense_decode(query, key_cache, value_cache, seq_lens, attn_mask, *, scale):
    """A tile at a time; a tile without any live position changes no bit."""
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    live_BMT = _live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(num_kv_heads, live_BMT.shape[1])
    out, lse = query.new_zeros(()), query.new_full((), -torch.inf, dtype=torch.float32)
    for first in range(0, int(seq_lens.max()) if seq_lens.is_cpu else max_seq_len, _TILE_SIZE):
        live_BHT = live_BMT[..., first : first + _TILE_SIZE].expand(-1, num_heads, -1)
        key_BHTD, value_BHTE = (
            cache[:, :, first : first + _TILE_SIZE].repeat_interleave(num_heads // num_kv_heads, 1)
            for cache in (key_cache, value_cache)
        )
        part, part_lse = _attend(query, key_BHTD, value_BHTE, live_BHT, scale)
        old_lse, lse = lse, torch.logaddexp(lse, part_lse)
        out = out * _exp(old_lse, lse)[..., None] + part * _exp(part_lse, lse)[..., None]
    return out.flatten(1, 2)[:, :, None].to(query.dtype)


def full_attention(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    """Of one query: out [B, Q, E] in float32, and the probability of every position [B, Q, T]."""
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    live_BMT = _live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(num_kv_heads, live_BMT.shape[1])
    live_BHT = live_BMT.expand(len(query), num_heads, -1)
    key_BHTD, value_BHTE = (
        cache.repeat_interleave(num_heads // num_kv_heads, 1).where(live_BHT[..., None], 0)
        for cache in (key_cache, value_cache)
    )
    logit_BHGT = _logits(query, key_BHTD, live_BHT, scale)
    weight_BHGT = _exp(logit_BHGT, logit_BHGT.logsumexp(-1, keepdim=True))
    return (weight_BHGT @ _widen(value_BHTE)).flatten(1, 2), weight_BHGT.flatten(1, 2)


def sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None, channel_scale=None, *,
    budget, page_size=16, num_sink_pages=1, num_recent_pages=2, group_reduce="sum",
    summary="minmax", sketch_bits=1, scale=None, budget_fraction=1.0, top_p=1.0, stored=None
):  # fmt: skip
    """Score, select, attend; a row that fits the budget is dense.

    ``stored``: of sparse_decode_step, whether the scores of an earlier step are taken, and those.
    Returns out, and per query its seq_lens, the selected pages, None if every row was dense, and
    which rows were, [B, 1, 1].
    """
    settings = {
        "budget": budget, "page_size": page_size, "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages, "group_reduce": group_reduce, "summary": summary,
        "sketch_bits": sketch_bits, "scale": scale, "budget_fraction": budget_fraction,
        "top_p": top_p, "stored": stored,
    }  # fmt: skip
    outs, selected = [], []
    for query_i, seq_lens_i, mask_i in each_query(query, seq_lens, attn_mask):
        caches = (key_cache, value_cache, page_summary)
        arguments = (query_i, *caches, seq_lens_i, mask_i, channel_scale)
        out, pages, fits_B11 = _sparse_decode(*arguments, **settings)
        outs.append(out)
        selected.append((seq_lens_i, pages, fits_B11))
    return _join_queries(outs), selected


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
    if most <= reference_selection.page_budget_of(most, **limits):
        return True
    num_used_B11 = (_seq_len_B11(seq_lens, max_seq_len) + page_size - 1) // page_size
    return num_used_B11 <= reference_selection.page_budget_of(num_used_B11, **limits)


def _sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale, *, budget,
    page_size, num_sink_pages, num_recent_pages, group_reduce, summary, sketch_bits, scale,
    budget_fraction, top_p, stored
):  # fmt: skip
    page_budget, max_seq_len = budget // page_size, key_cache.shape[2]
    limits = {
        "page_size": page_size, "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages, "budget_fraction": budget_fraction,
    }  # fmt: skip
    fits_B11 = fits_budget(seq_lens, max_seq_len, budget=budget, **limits)
    if fits_B11 is True or (fits_B11.is_cpu and fits_B11.all()):
        out = _dense_decode(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
        return out, None, fits_B11
    if stored is None or not (stored[0].is_cpu and stored[0]):
        scores = score_pages(
            query, page_summary, seq_lens, channel_scale, page_size=page_size,
            group_reduce=group_reduce, summary=summary, sketch_bits=sketch_bits, scale=scale,
            attn_mask=attn_mask if summary == "sketch" else None
        )  # fmt: skip
        if stored is not None:
            stored[1].copy_(torch.where(stored[0], stored[1], scores))
    if stored is not None:
        scores = stored[1]
    score_scale = reference_selection.score_scale_of(
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
    end = -(-page_budget * page_size // _TILE_SIZE) * _TILE_SIZE
    mask = None if attn_mask is None else attn_mask[..., :end]
    keys, values = key_cache[:, :, :end], value_cache[:, :, :end]
    dense = _dense_decode(query, keys, values, seq_lens.clamp(max=end), mask, scale=scale)
    return torch.where(fits_B11[..., None], dense, out), pages, fits_B11


def sparse_decode_step(
    query, key_cache, value_cache, cache_position, page_summary, num_sealed, seq_lens,
    attn_mask=None, channel_scale=None, page_scores=None, scored_at=None, *, select_every=1,
    **settings
):  # fmt: skip
    """The results of sparse_decode, those of the update before it, and whether it scored nothing.

    Scores are those of an earlier step if both belong to the same run of steps of one query, and
    seq_len is no multiple of select_every.
    """
    *updated, continues = update_page_summary(
        key_cache, cache_position, page_summary, num_sealed, channel_scale,
        page_size=settings.get("page_size", 16), summary=settings.get("summary", "minmax"),
        sketch_bits=settings.get("sketch_bits", 1)
    )  # fmt: skip
    caches = (key_cache, value_cache, page_summary)
    stored, is_reused = None, False
    if select_every > 1:
        names = ("budget", "page_size", "num_sink_pages", "num_recent_pages", "budget_fraction")
        limits = {name: settings[name] for name in names if name in settings}
        length = seq_lens[0].long()
        fits = fits_budget(seq_lens, key_cache.shape[2], **limits)
        if fits is True or query.shape[2] > 1:
            keeps = torch.zeros_like(length, dtype=torch.bool)
        else:
            keeps = ~fits.reshape(())
        is_next = (scored_at[0] > 0) & (scored_at[1] == length - 1)
        is_reused = keeps & continues & is_next & (length % select_every != 0)
        last_scored = torch.where(is_reused, scored_at[0], torch.where(keeps, length, -1))
        scored_at.copy_(torch.stack([last_scored, length]))
        stored = (is_reused, page_scores) if query.shape[2] == 1 else None
    arguments = (query, *caches, seq_lens, attn_mask, channel_scale)
    results = sparse_decode(*arguments, stored=stored, **settings)
    return *results, updated, is_reused


def share_mask(attn_mask):
    return attn_mask.clone(memory_format=torch.contiguous_format)


def _attend(query, key_BHND, value_BHNE, live_BHN, scale):
    """Softmax attention: out [B, H, G, E], lse [B, H, G]; 0 and -inf where nothing is live."""
    key_BHND, value_BHNE = _widen(key_BHND), _widen(value_BHNE)
    if not (live_BHN.is_cpu and live_BHN.all()):
        # Dead entries are zeroed as well as masked: 0 * NaN is NaN.
        key_BHND, value_BHNE = (x.where(live_BHN[..., None], 0) for x in (key_BHND, value_BHNE))
    logit_BHGN = _logits(query, key_BHND, live_BHN, scale)
    lse_BHG = logit_BHGN.logsumexp(-1)
    weight_BHGN = _exp(logit_BHGN, lse_BHG[..., None])
    return torch.stack([w @ v for w, v in zip(weight_BHGN, value_BHNE, strict=True)]), lse_BHG


def _logits(query, key_BHND, live_BHN, scale):
    """[B, H, G, N]; -inf where not live."""
    query_BHGD = _widen(query.contiguous().view(*key_BHND.shape[:2], -1, query.shape[-1]))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logit_BHGN = _dot_products(query_BHGD, _widen(key_BHND)) * scale
    return logit_BHGN.masked_fill(~live_BHN[:, :, None], -torch.inf)


def _dot_products(query_BHGD, key_BHND):
    """[B, H, G, N]. BLAS rounds by shape: row by row, no bit depends on the rest of the batch; keys
    first, none on how threads share the queries."""
    return torch.stack([k @ q.mT for q, k in zip(query_BHGD, key_BHND, strict=True)]).mT


def _live_positions(seq_lens, attn_mask, num_positions):
    """What may be attended: bool [B or 1, M, T]."""
    live_BMT = _arange(num_positions, seq_lens) < _seq_len_B11(seq_lens, num_positions)
    if attn_mask is not None:
        missing = num_positions - attn_mask.shape[-1] if attn_mask.shape[-1] > 1 else 0
        live_BMT = live_BMT & pad(attn_mask[:, :, 0], (0, missing))
    return live_BMT


def _last_live_position(seq_lens, attn_mask):
    """[B]: below seq_lens, for any head; -1 where there is none."""
    allowed_BT = attn_mask[:, :, 0].any(1)
    if allowed_BT.shape[-1] == 1:
        return torch.where(allowed_BT[:, 0], seq_lens - 1, -1)
    position = _arange(allowed_BT.shape[-1], seq_lens)
    return torch.where(allowed_BT & (position < seq_lens[:, None]), position, -1).amax(-1)


def _seq_len_B11(seq_lens, max_seq_len):
    return seq_lens.long().clamp(1, max_seq_len)[:, None, None]


def _page_rows(keys, summary, channel_scale, sketch_bits):
    """What is kept of pages [B, K, P, page_size, D]: [B, K, P, ...]."""
    if summary == "meanstd":
        return reference_means.page_rows(keys)
    if summary == "sketch":
        return reference_sketch.page_rows(keys, channel_scale, sketch_bits)
    bounds = _page_min_max(keys)
    return bounds if summary == "minmax" else _int8_rows(bounds.float(), channel_scale)


def _int8_rows(bounds, channel_scale):
    """[B, K, P, 2, D] -> uint8 [B, K, P, bytes]: int8 bounds rounded outward, and the page's scale.

    126 leaves room for the rounding of the factors themselves. NaN or infinity: the scale is NaN.
    """
    size = bounds.abs().amax(-2) / channel_scale[:, :, None]
    page_scale = (size.amax(-1, keepdim=True) / 126.0).clamp(min=1e-15)
    page_scale = page_scale.masked_fill(~page_scale.isfinite(), torch.nan)
    scale = page_scale * channel_scale[:, :, None]
    low, high = (bounds / scale[..., None, :]).unbind(-2)
    low, high = low.floor(), high.ceil()
    low = low - (low * scale > bounds[..., 0, :]).float()
    high = high + (high * scale < bounds[..., 1, :]).float()
    bytes_ = [torch.cat([low, high], -1).nan_to_num(0).to(torch.int8), page_scale]
    row = torch.cat([x.contiguous().view(torch.uint8) for x in bytes_], -1)
    return pad(row, (0, int8_row_bytes(bounds.shape[-1]) - row.shape[-1]))


def _scale_channels(key_cache, channel_scale, num_pages, is_wanted_BK, page_size, summary):
    """channel_scale, in place, from pages that are spread over the first num_pages."""
    page = _arange(NUM_SCALE_PAGES, num_pages) * num_pages // NUM_SCALE_PAGES
    tokens = page[:, None] * page_size + _arange(page_size, page)
    keys = key_cache[:, :, tokens.clamp(max=key_cache.shape[2] - 1)]
    if summary == "sketch":
        new = reference_sketch.channel_scales(keys, page != torch.cat([page[:1] - 1, page[:-1]]))
    else:
        new = _largest_keys(keys)
    is_wanted = (is_wanted_BK & (num_pages > 0)).view(*is_wanted_BK.shape, *[1] * (new.ndim - 2))
    channel_scale.copy_(torch.where(is_wanted, new, channel_scale))


def _largest_keys(keys):
    """[B, K, D]: about the largest key of each channel in pages [B, K, P, page_size, D].

    Scales stay far from the ends of float32; no channel gets less than 1/1024 of the largest.
    """
    size = _page_min_max(keys).abs().amax(-2).float()
    scale_BKD = size.where(size.isfinite(), 0).amax(2)
    smallest = (scale_BKD.amax(-1, keepdim=True) * 2.0**-10).clamp(min=1e-20)
    return torch.maximum(scale_BKD, smallest).clamp(max=1e20)


def _floor_to_power_of_two(x):
    powers = 2 ** _arange(31, x)
    return powers.where(powers <= x, 0).amax()


def _bounds_of(page_summary, head_dim, summary):
    """Both halves of the rows side by side [B, K, P, W], and what they are multiplied with."""
    if summary in FLOAT_SUMMARIES:
        return page_summary.flatten(-2), None
    bounds = page_summary[..., : 2 * head_dim].view(torch.int8)
    page_scale = page_summary[..., 2 * head_dim : 2 * head_dim + 4].contiguous()
    return bounds, page_scale.view(torch.float32)[..., 0]


def _page_min_max(keys):
    """[B, K, P, page_size, D] -> [B, K, P, 2, D]. Adding 0 leaves one zero: -0.0 becomes 0.0."""
    return torch.stack([keys.amin(3), keys.amax(3)], 3) + 0.0


def _exp(x, total):
    """exp(x - total), 0 where total is -inf."""
    return (x - total.clamp(min=torch.finfo(x.dtype).min)).exp()


def _arange(end, like):
    return torch.arange(end, device=like.device)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
