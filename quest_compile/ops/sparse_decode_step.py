"""What a decode step does after the write to the cache, in one operator:

    update_page_summary(key_cache, cache_position, page_summary, num_sealed, channel_scale)
    out = sparse_decode(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, ...)

with the same bits, so that a GPU needs fewer launches. With select_every above 1 it also keeps page
scores from step to step, and most steps select by those of an earlier one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, registration, require
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.counters import count_sparse_call, count_update_call
from quest_compile.ops.native import announce_reference
from quest_compile.ops.sparse_decode import _check as check_sparse_decode
from quest_compile.ops.update_page_summary import _check as check_update

registration.define(
    "sparse_decode_step",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position, "
    "Tensor(a!) page_summary, Tensor(b!) num_sealed, Tensor seq_lens, Tensor? attn_mask=None, "
    "Tensor(c!)? channel_scale=None, Tensor(d!)? page_scores=None, Tensor(e!)? scored_at=None, *, "
    "int budget, int page_size=16, int num_sink_pages=1, int num_recent_pages=2, "
    'str group_reduce="sum", str summary="minmax", int sketch_bits=1, float? scale=None, '
    "float budget_fraction=1.0, float top_p=1.0, int select_every=1) -> Tensor",
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
    page_scores=None,
    scored_at=None,
    *,
    select_every=1,
    **settings,
):
    caches = (key_cache, value_cache, page_summary)
    check_sparse_decode(query, *caches, seq_lens, attn_mask, channel_scale, **settings)
    shared = {
        key: settings[key] for key in ("page_size", "summary", "sketch_bits") if key in settings
    }
    check_update(key_cache, cache_position, page_summary, num_sealed, channel_scale, **shared)
    _check_stored_scores(
        query,
        page_summary,
        seq_lens,
        page_scores,
        scored_at,
        select_every,
        settings.get("group_reduce", "sum"),
    )


def _check_stored_scores(
    query, page_summary, seq_lens, page_scores, scored_at, select_every, group_reduce
):
    require.integer("select_every", select_every, 1)
    state = {"page_scores": page_scores, "scored_at": scored_at}
    if select_every == 1:
        for name, tensor in state.items():
            if tensor is not None:
                raise ValueError(f"{name}: expected None with select_every=1, got a tensor")
        return
    for name, tensor in state.items():
        if tensor is None:
            raise ValueError(f"{name}: expected a tensor with select_every={select_every}")
    require.tensors(**state)
    require.shape("seq_lens", seq_lens, (1,), "[1] with select_every above 1")
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    num_select_heads = query.shape[1] if group_reduce == "none" else num_kv_heads
    layout = "[batch, num_select_heads, num_pages]"
    require.shape("page_scores", page_scores, (batch, num_select_heads, num_pages), layout)
    require.shape("scored_at", scored_at, (2,), "[2]")
    require.dtype("page_scores", page_scores, torch.float32)
    require.dtype("scored_at", scored_at, torch.int64)
    for name, tensor in state.items():
        require.contiguous(name, tensor, tensor.dim())
        require.device(name, tensor, query)


@registration.reference("sparse_decode_step")
def _sparse_decode_step_reference(*arguments, **settings):
    _check(*arguments, **settings)
    query, key_cache, value_cache, _, page_summary = arguments[:5]
    announce_reference(query)
    out, selected, updated, is_unscored = reference.sparse_decode_step(*arguments, **settings)
    count_update_call(*updated)
    page_size = settings.get("page_size", 16)
    caches = (key_cache, value_cache, page_summary)
    count_sparse_call(query, *caches, selected, page_size, is_unscored)
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
    page_scores: Tensor | None = None,
    scored_at: Tensor | None = None,
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
    select_every: int = 1,
) -> Tensor:
    """update_page_summary and then sparse_decode.

    With select_every above 1 a call of one query scores pages only if seq_len is a multiple of it,
    or if the stored scores are not of the calls right before: the last call had one query and was
    at seq_len - 1, a call since the last one that fitted the budget has scored, and no page before
    the one written was summarised again. Other calls select by the stored scores, where pages that
    were not complete then have none (-inf). Sinks, recents and masks are always those of the call.
    Who writes the cache or its page summaries in another way has to set scored_at to -1.

    Args:
        query, key_cache, value_cache, seq_lens, attn_mask, budget, num_sink_pages,
            num_recent_pages, group_reduce, scale, budget_fraction, top_p: of sparse_decode. With
            select_every above 1 seq_lens is [1].
        cache_position: of update_page_summary: the positions that were written to the caches.
        page_summary, num_sealed, channel_scale: of update_page_summary, written in place.
        page_size, summary, sketch_bits: of both.
        page_scores: float32 [batch, num_select_heads, num_pages] with select_every above 1, else
            None: what score_pages gave. Written.
        scored_at: int64 [2] with select_every above 1, else None: seq_len of the call that scored,
            and of the last call; -1 before the first one. Written.
        select_every: 1 or more.

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
        page_scores,
        scored_at,
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
        "select_every": select_every,
    }
    return checked_call(_sparse_decode_step, _check, arguments, settings)
