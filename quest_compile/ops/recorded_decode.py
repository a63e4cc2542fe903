"""sparse_decode in the three steps that it consists of, with the selected pages kept:

    scores = score_pages(query, page_summary, seq_lens, ...)
    pages = select_pages(scores, seq_lens, ...)
    out, lse = attend_pages(query, key_cache, value_cache, pages, seq_lens, attn_mask)

by the operators that serve these. What is attended is what is recorded, rows that fit the budget
too, whose every page is selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, require
from quest_compile.ops.counters import count_sparse_call
from quest_compile.ops.operator import empty_attention, operator
from quest_compile.ops.settings import Selection, take_sparse
from quest_compile.ops.sparse_decode import SETTINGS_SCHEMA
from quest_compile.ops.sparse_decode import check as check_sparse_decode

_LAYOUT = "[max_q_len, batch, num_select_heads, page_budget]"


def new_recording(
    max_q_len: int, query: Tensor, key_cache: Tensor, selection: Selection, page_size: int
) -> Tensor:
    """int32 [max_q_len, batch, num_select_heads, page_budget], all -1: where
    ``torch.ops.quest.recorded_decode`` writes the pages of each of its queries."""
    heads = query if selection.group_reduce == "none" else key_cache
    shape = (max_q_len, *heads.shape[:2], selection.budget // page_size)
    return torch.full(shape, -1, dtype=torch.int32, device=key_cache.device)


def _check(*tensors, **settings):
    *call, recording = tensors
    check_sparse_decode(*call, **settings)
    selection, page_format = take_sparse({k: v for k, v in settings.items() if k != "scale"})
    query, key_cache = call[:2]
    require.rank("recording", recording, 4, _LAYOUT)
    require.integer("recording.shape[0]", recording.shape[0], query.shape[2])
    heads = query if selection.group_reduce == "none" else key_cache
    expected = (*heads.shape[:2], selection.budget // page_format.page_size)
    require.shape("recording", recording, (recording.shape[0], *expected), _LAYOUT)
    require.dtype("recording", recording, torch.int32)


def _recorded_decode(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask,
    recording,
    *,
    scale=None,
    **settings,
):
    selection, page_format = take_sparse(settings)
    page_size, max_seq_len = page_format.page_size, key_cache.shape[2]
    outs, selected = [], []
    recording.fill_(-1)
    queries = reference.each_query(query, seq_lens, attn_mask)
    for kept, (query_i, seq_lens_i, mask_i) in zip(recording, queries):
        _, pages = reference.score_and_select(
            query_i, page_summary, seq_lens_i, mask_i, selection, page_format, scale,
            torch.ops.quest,
        )  # fmt: skip
        out, _ = torch.ops.quest.attend_pages(
            query_i, key_cache, value_cache, pages, seq_lens_i, mask_i, page_size=page_size,
            scale=scale,
        )  # fmt: skip
        kept.copy_(pages)
        outs.append(out)
        fits = reference.fits_budget(seq_lens_i, max_seq_len, selection, page_size)
        is_dense = fits is True or (fits.is_cpu and bool(fits.all()))
        selected.append((seq_lens_i, None if is_dense else pages, fits))
    count_sparse_call(query, key_cache, value_cache, page_summary, selected, page_size)
    return reference.join_queries(outs)


operator(
    "recorded_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary, Tensor seq_lens, "
    f"Tensor? attn_mask, Tensor(a!) recording, *, {SETTINGS_SCHEMA}) -> Tensor",
    check=_check,
    reference=_recorded_decode,
    fake=lambda query, key_cache, value_cache, *rest, **settings: empty_attention(
        query, value_cache
    ),
    kernels=(),
)
