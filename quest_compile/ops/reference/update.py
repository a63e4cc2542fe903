"""Page summaries in plain torch: when they are stale. Shape suffixes: those of ops/reference."""

import torch

from quest_compile.ops.reference.positions import arange
from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.summaries import SUMMARIES


def update_page_summary(key_cache, cache_position, page_summary, num_sealed, **settings):
    """Recompute what a write may have changed. Returns (stale heads, recomputed pages) to count."""
    page_format = SummaryFormat(**settings)
    page_size, rows_of = page_format.page_size, SUMMARIES[page_format.summary].build
    max_seq_len = key_cache.shape[2]
    written = cache_position.clamp(0, max_seq_len - 1)
    first_written, num_complete = written.min(), (written.max() + 1) // page_size
    start = torch.minimum(num_sealed[0].clamp(min=0), first_written // page_size)
    if len(num_sealed) == 2:
        is_next = (num_sealed[1] < 0) | (num_sealed[1] == first_written)
        start = torch.where(is_next, start, 0)
        num_sealed[1] = torch.where(num_sealed[1] < 0, -1, written.max() + 1)
    # Somebody else may have written the cache: compare some sealed pages with the keys, bit by bit.
    spread = first_written * 2654435761 % 2**32 + 40503 * arange(3, start)
    sampled = torch.cat([(start - 1)[None], spread % start.clamp(min=1)]).clamp(min=0)
    tokens = (sampled[:, None] * page_size + arange(page_size, start)).clamp(max=max_seq_len - 1)
    expected = rows_of(key_cache[:, :, tokens], page_format)
    stored = page_summary[:, :, sampled]
    differs = expected.view(torch.uint8) != stored.view(torch.uint8)
    is_stale_BK = differs.flatten(2).any(-1) & (start > 0)
    start_BK = torch.where(is_stale_BK, 0, start)
    low, high = 0, max_seq_len // page_size
    if start.is_cpu:
        low, high = min(int(start_BK.min()), int(num_complete)), int(num_complete)
    page = arange(high, start)[low:]
    is_new_BKP = (page >= start_BK[..., None]) & (page < num_complete)
    keys = key_cache[:, :, low * page_size : high * page_size].unflatten(2, (high - low, page_size))
    stored = page_summary[:, :, low:high]
    is_new = is_new_BKP.unflatten(-1, (high - low, *[1] * (stored.ndim - 3)))
    stored.copy_(torch.where(is_new, rows_of(keys, page_format), stored))
    num_sealed[0] = num_complete
    return is_stale_BK.sum(), is_new_BKP
