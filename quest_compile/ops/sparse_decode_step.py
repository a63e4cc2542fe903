"""What a decode step does after the write to the cache, in one operator:

    update_page_summary(key_cache, cache_position, page_summary, num_sealed, channel_scale)
    out = sparse_decode(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, ...)

with the same bits, so that a GPU needs fewer launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, registration
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.counters import count_sparse_call, count_update_call
from quest_compile.ops.native import announce_reference
from quest_compile.ops.sparse_decode import _check as check_sparse_decode
from quest_compile.ops.update_page_summary import _check as check_update

registration.define(
    "sparse_decode_step",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position, "
    "Tensor(a!) page_summary, Tensor(b!) num_sealed, Tensor seq_lens, Tensor? attn_mask=None, "
    "Tensor(c!)? channel_scale=None, *, "
    "int budget, int page_size=16, int num_sink_pages=1, int num_recent_pages=2, "
    'str group_reduce="sum", str summary="minmax", int sketch_bits=1, float? scale=None, '
    "float budget_fraction=1.0, float top_p=1.0) -> Tensor",
)


def _check(
    query,
    key_cache,
    value_cache,
    cache_position,
    page_summary,
    num_sealed,
    seq_lens,
    attn_mask=None,
    channel_scale=None,
    **settings,
):
    caches = (key_cache, value_cache, page_summary)
    check_sparse_decode(query, *caches, seq_lens, attn_mask, channel_scale, **settings)
    shared = {
        key: settings[key] for key in ("page_size", "summary", "sketch_bits") if key in settings
    }
    check_update(key_cache, cache_position, page_summary, num_sealed, channel_scale, **shared)


@registration.reference("sparse_decode_step")
def _sparse_decode_step_reference(*arguments, **settings):
    _check(*arguments, **settings)
    query, key_cache, value_cache, _, page_summary = arguments[:5]
    announce_reference(query)
    out, selected, updated = reference.sparse_decode_step(*arguments, **settings)
    count_update_call(*updated)
    page_size = settings.get("page_size", 16)
    caches = (key_cache, value_cache, page_summary)
    count_sparse_call(query, *caches, selected, page_size)
    return out


@registration.fake("sparse_decode_step")
def _sparse_decode_step_fake(*arguments, **settings):
    _check(*arguments, **settings)
    query, _, value_cache = arguments[:3]
    batch, num_q_heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, num_q_heads, value_cache.shape[3])
    return out.transpose(1, 2)


_sparse_decode_step = torch.ops.quest.sparse_decode_step.default


def sparse_decode_step(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_position: Tensor,
    page_summary: Tensor,
    num_sealed: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    channel_scale: Tensor | None = None,
    *,
    budget: int,
    page_size: int = 16,
    num_sink_pages: int = 1,
    num_recent_pages: int = 2,
    group_reduce: str = "sum",
    summary: str = "minmax",
    sketch_bits: int = 1,
    scale: float | None = None,
    budget_fraction: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """update_page_summary and then sparse_decode.

    Args:
        query, key_cache, value_cache, seq_lens, attn_mask, budget, num_sink_pages,
            num_recent_pages, group_reduce, scale, budget_fraction, top_p: of sparse_decode.
        cache_position: of update_page_summary: the positions that were written to the caches.
        page_summary, num_sealed, channel_scale: of update_page_summary, written in place.
        page_size, summary, sketch_bits: of both.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    arguments = (
        query,
        key_cache,
        value_cache,
        cache_position,
        page_summary,
        num_sealed,
        seq_lens,
        attn_mask,
        channel_scale,
    )
    settings = {
        "budget": budget,
        "page_size": page_size,
        "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages,
        "group_reduce": group_reduce,
        "summary": summary,
        "sketch_bits": sketch_bits,
        "scale": scale,
        "budget_fraction": budget_fraction,
        "top_p": top_p,
    }
    return checked_call(_sparse_decode_step, _check, arguments, settings)
