"""Bring the page summary up to date after a write to the key cache."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, registration, require, summary_checks
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.counters import count_update_call
from quest_compile.ops.native import announce_reference

registration.define(
    "update_page_summary",
    "(Tensor key_cache, Tensor cache_position, Tensor(a!) page_summary, Tensor(b!) num_sealed, "
    'Tensor(c!)? channel_scale=None, *, int page_size=16, str summary="minmax", '
    "int sketch_bits=1) -> ()",
)


def _check(
    key_cache,
    cache_position,
    page_summary,
    num_sealed,
    channel_scale,
    *,
    page_size=16,
    summary="minmax",
    sketch_bits=1,
):
    require.tensors(
        key_cache=key_cache,
        cache_position=cache_position,
        page_summary=page_summary,
        num_sealed=num_sealed,
    )
    checks.page_size(page_size)
    checks.key_cache(key_cache)
    summary_checks.page_summary_of(
        page_summary, channel_scale, summary, key_cache, page_size, sketch_bits
    )
    require.rank("cache_position", cache_position, 1, "[num_written]")
    num_written = cache_position.shape[0]
    require.that(num_written >= 1, lambda: "cache_position: expected positions, got none")
    require.rank("num_sealed", num_sealed, 1, "[1] or [2]")
    if num_sealed.shape[0] not in (1, 2):
        raise ValueError(f"num_sealed: expected [1] or [2], got shape {list(num_sealed.shape)}")
    for name, tensor in (("cache_position", cache_position), ("num_sealed", num_sealed)):
        require.dtype(name, tensor, torch.int64)
        require.device(name, tensor, key_cache)
    require.values("cache_position", cache_position, 0, key_cache.shape[2] - 1)


@registration.reference("update_page_summary")
def _update_page_summary_reference(
    key_cache, cache_position, page_summary, num_sealed, channel_scale=None, **settings
):
    arguments = (key_cache, cache_position, page_summary, num_sealed, channel_scale)
    _check(*arguments, **settings)
    announce_reference(key_cache)
    count_update_call(*reference.update_page_summary(*arguments, **settings))


@registration.fake("update_page_summary")
def _update_page_summary_fake(
    key_cache, cache_position, page_summary, num_sealed, channel_scale=None, **settings
):
    _check(key_cache, cache_position, page_summary, num_sealed, channel_scale, **settings)


_update_page_summary = torch.ops.quest.update_page_summary.default


def update_page_summary(
    key_cache: Tensor,
    cache_position: Tensor,
    page_summary: Tensor,
    num_sealed: Tensor,
    channel_scale: Tensor | None = None,
    *,
    page_size: int = 16,
    summary: str = "minmax",
    sketch_bits: int = 1,
) -> None:
    """Summarise, in place, every page that a write completed or changed.

    Pages are always summarised from all of their keys. Pages that were summarised before are
    sampled: where the keys are others than then, that row and KV head start again from page 0.

    Args:
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous, as
            it is after the write.
        cache_position: int64 [n], the positions that were written.
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of key_cache;
            written: elementwise minimum and maximum of the keys of each complete page.
            With summary="sketch" uint8 [batch, num_kv_heads, num_pages, bytes_per_page]
            (reference_sketch.page_rows has the layout): the mean of the keys in 8 bits, and what is
            left of each key as its scale and sketch_bits bits per channel.
        num_sealed: int64 [1] or [2]. First: leading pages whose summary is known to be up to date;
            0 before the first update, and to have everything summarised again. Second, if there:
            the position at which the next write has to begin, or else everything is summarised
            again; -1 for no such check. Written.
        channel_scale: float32 [batch, num_kv_heads, 3, head_dim] with summary="sketch": centre of
            the channel, scale of the means, scale of what is left. Written, from the keys of up to
            128 pages, whenever the number of pages has doubled; all pages are summarised again
            then.
        page_size: positions per page.
        summary: what page_summary holds, "minmax" or "sketch".
        sketch_bits: 1 or 2, with summary="sketch".

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    arguments = (key_cache, cache_position, page_summary, num_sealed, channel_scale)
    settings = {"page_size": page_size, "summary": summary, "sketch_bits": sketch_bits}
    checked_call(_update_page_summary, _check, arguments, settings)
