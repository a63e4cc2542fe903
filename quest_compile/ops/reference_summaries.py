"""Page summaries in plain torch: when they are stale, and the rows of minima and maxima.

Sketches are in reference_sketch.py. Shape suffixes: those of reference.py.
"""

import torch

from quest_compile.ops import reference_sketch
from quest_compile.ops.limits import NUM_SCALE_PAGES
from quest_compile.ops.reference_positions import arange


def update_page_summary(
    key_cache, cache_position, page_summary, num_sealed, channel_scale=None, *, page_size=16,
    summary="minmax", sketch_bits=1
):  # fmt: skip
    """Recompute what a write may have changed. Returns (stale heads, recomputed pages) to count."""
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
    spread = first_written * 2654435761 % 2**32 + 40503 * arange(3, start)
    sampled = torch.cat([(start - 1)[None], spread % start.clamp(min=1)]).clamp(min=0)
    tokens = (sampled[:, None] * page_size + arange(page_size, start)).clamp(max=max_seq_len - 1)
    expected = page_rows(key_cache[:, :, tokens], summary, channel_scale, sketch_bits)
    stored = page_summary[:, :, sampled]
    differs = expected.view(torch.uint8) != stored.view(torch.uint8)
    is_stale_BK = differs.flatten(2).any(-1) & (start > 0)
    start_BK = torch.where(is_stale_BK, 0, start)
    if channel_scale is not None and not (start.is_cpu and start_BK.all()):
        _scale_channels(key_cache, channel_scale, num_scaled, start_BK == 0, page_size)
    low, high = 0, max_seq_len // page_size
    if start.is_cpu:
        low, high = min(int(start_BK.min()), int(num_complete)), int(num_complete)
    page = arange(high, start)[low:]
    is_new_BKP = (page >= start_BK[..., None]) & (page < num_complete)
    keys = key_cache[:, :, low * page_size : high * page_size].unflatten(2, (high - low, page_size))
    stored = page_summary[:, :, low:high]
    rows = page_rows(keys, summary, channel_scale, sketch_bits)
    is_new = is_new_BKP.unflatten(-1, (high - low, *[1] * (stored.ndim - 3)))
    stored.copy_(torch.where(is_new, rows, stored))
    num_sealed[0] = num_complete
    return is_stale_BK.sum(), is_new_BKP


def page_rows(keys, summary, channel_scale, sketch_bits):
    """What is kept of pages [B, K, P, page_size, D]: [B, K, P, ...]."""
    if summary == "sketch":
        return reference_sketch.page_rows(keys, channel_scale, sketch_bits)
    return page_min_max(keys)


def _scale_channels(key_cache, channel_scale, num_pages, is_wanted_BK, page_size):
    """channel_scale, in place, from pages that are spread over the first num_pages."""
    page = arange(NUM_SCALE_PAGES, num_pages) * num_pages // NUM_SCALE_PAGES
    tokens = page[:, None] * page_size + arange(page_size, page)
    keys = key_cache[:, :, tokens.clamp(max=key_cache.shape[2] - 1)]
    new = reference_sketch.channel_scales(keys, page != torch.cat([page[:1] - 1, page[:-1]]))
    is_wanted = (is_wanted_BK & (num_pages > 0)).view(*is_wanted_BK.shape, *[1] * (new.ndim - 2))
    channel_scale.copy_(torch.where(is_wanted, new, channel_scale))


def _floor_to_power_of_two(x):
    powers = 2 ** arange(31, x)
    return powers.where(powers <= x, 0).amax()


def page_min_max(keys):
    """[B, K, P, page_size, D] -> [B, K, P, 2, D]. Adding 0 leaves one zero: -0.0 becomes 0.0."""
    return torch.stack([keys.amin(3), keys.amax(3)], 3) + 0.0
