"""How much a sparse attention call loses against full attention, summed up on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, require
from quest_compile.ops.audit_totals import TOTALS
from quest_compile.ops.operator import operator
from quest_compile.ops.settings import take_sparse
from quest_compile.ops.sparse_decode import SETTINGS_SCHEMA


def new_audit_totals(device: torch.device) -> Tensor:
    """float64 [8], zeros: what ``torch.ops.quest.audit`` adds to."""
    return torch.zeros(len(TOTALS), dtype=torch.float64, device=device)


def _check(*tensors, every, **settings):
    totals = tensors[-1]
    require.integer("every", every, 1)
    require.shape("totals", totals, (len(TOTALS),), "[8]")
    require.dtype("totals", totals, torch.float64)


def _audit(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask,
    out,
    totals,
    *,
    every,
    scale=None,
    **settings,
):
    """Every ``every``-th call from the first on. The CPU returns early from the others; other
    devices, which are not waited for, do the same work and count nothing."""
    selection, page_format = take_sparse(settings)
    is_due = totals[0] % every == 0
    totals[0] += 1
    if is_due.is_cpu and not is_due:
        return
    totals[1] += is_due
    queries = reference.each_query(query, seq_lens, attn_mask)
    for i, (query_i, seq_lens_i, mask_i) in enumerate(queries):
        call = (query_i, key_cache, value_cache, page_summary, seq_lens_i, mask_i)
        _add(totals, is_due, *_losses(*call, out[:, :, i], scale, selection, page_format))


def _losses(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask,
    out,
    scale,
    selection,
    page_format,
):
    """Of one query: is it counted, kept mass, output error, page recall; all [batch, num_q_heads].

    The selection is made again, by the operators that sparse_decode consists of.
    """
    page_size, max_seq_len = page_format.page_size, key_cache.shape[2]
    scores, pages = reference.score_and_select(
        query, page_summary, seq_lens, attn_mask, selection, page_format, scale, torch.ops.quest
    )
    full, mass_BQT = reference.full_attention(
        query, key_cache, value_cache, seq_lens, attn_mask, scale=scale
    )
    num_pages, num_q_heads = scores.shape[2], query.shape[1]
    padding = num_pages * page_size - max_seq_len
    mass_BQP = torch.nn.functional.pad(mass_BQT, (0, padding)).unflatten(2, (-1, page_size)).sum(-1)
    # Empty slots (-1) mark a page behind the last.
    chosen_BSP = torch.zeros(*scores.shape[:2], num_pages + 1, device=scores.device)
    slots = torch.where(pages < 0, num_pages, pages).long()
    chosen_BSP = chosen_BSP.scatter(2, slots, 1.0)[..., :num_pages]
    heads_per_selection = num_q_heads // chosen_BSP.shape[1]
    kept_BQ = (mass_BQP * chosen_BSP.repeat_interleave(heads_per_selection, 1)).sum(-1)

    # The pages with the most mass, as many as were chosen; ties go to the lowest index.
    mass_BSP = mass_BQP.unflatten(1, (-1, heads_per_selection)).sum(2)
    by_mass = mass_BSP.argsort(dim=-1, descending=True, stable=True)
    num_chosen_BS1 = chosen_BSP.sum(-1, keepdim=True)
    is_top = torch.arange(num_pages, device=scores.device) < num_chosen_BS1
    found_BS = (chosen_BSP.gather(2, by_mass) * is_top).sum(-1)
    recall_BS = found_BS / num_chosen_BS1[..., 0].clamp(min=1)

    norm_BQ = torch.linalg.vector_norm(full, dim=-1)
    error_BQ = torch.linalg.vector_norm(out.float() - full, dim=-1)
    error_BQ = error_BQ / norm_BQ.clamp(min=torch.finfo(norm_BQ.dtype).tiny)
    fits = reference.fits_budget(seq_lens, max_seq_len, selection, page_size)
    is_sparse = seq_lens.new_zeros(1, dtype=torch.bool) if fits is True else ~fits.reshape(-1)
    is_sparse_B1 = is_sparse.expand(len(query))[:, None]
    is_counted = is_sparse_B1 & (mass_BQT.sum(-1) != 0)
    return is_counted, kept_BQ, error_BQ, recall_BS.repeat_interleave(heads_per_selection, 1)


def _add(totals, is_due, is_counted, kept_mass, output_error, page_recall):
    is_counted = is_counted & is_due
    losses = [torch.ones_like(kept_mass), kept_mass, output_error, page_recall]
    totals[2:6] += torch.stack([x.double().where(is_counted, 0).sum() for x in losses])
    largest = [x.double().where(is_counted, 0).amax() for x in (1 - kept_mass, output_error)]
    totals[6:8] = torch.maximum(totals[6:8], torch.stack(largest))


operator(
    "audit",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary, Tensor seq_lens, "
    "Tensor? attn_mask, Tensor out, Tensor(a!) totals, "
    f"*, int every, {SETTINGS_SCHEMA}) -> ()",
    check=_check,
    reference=_audit,
    fake=lambda *tensors, **settings: None,
    kernels=(),
)
