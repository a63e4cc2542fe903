"""What the operators did in this process, whichever kernels served."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.native import native_status
from quest_compile.ops.settings import SummaryFormat

# The order is that of quest::native_counters.
_NAMES = (
    "update_calls",
    "pages_sealed",
    "summaries_rebuilt",
    "sparse_calls",
    "sparse_calls_covered",
    "dense_calls",
    "sparse_rows",
    "tokens_attended",
    "max_tokens_attended",
    "bytes_read",
    "linear_calls",
    "weight_bytes_read",
    "prefill_calls",
)
_counts = dict.fromkeys(_NAMES, 0)


def counters() -> dict[str, int]:
    """Counts since the start or the last reset_counters().

    On devices other than the CPU, where values are not looked at, only calls are counted: a
    sparse_decode as sparse unless max_seq_len itself fits the budget.

    Returns:
        update_calls: calls of update_page_summary.
        pages_sealed: pages summarised by them, per row and KV head.
        summaries_rebuilt: rows and KV heads in which a foreign write was found.
        sparse_calls: calls of sparse_decode with a row that did not fit the budget.
        sparse_calls_covered: the other calls of sparse_decode.
        dense_calls: calls of dense_decode.
        sparse_rows: rows, queries and query heads that did not fit the budget.
        tokens_attended: positions below seq_len in the pages that those selected.
        max_tokens_attended: most of them for one query of one query head.
        bytes_read: of page summaries, keys and values, by sparse_decode and dense_decode.
        linear_calls: calls of linear_decode.
        weight_bytes_read: of weights, by linear_decode.
        prefill_calls: calls of dense_prefill.
    """
    counts = dict(_counts)
    if native_status().loaded:
        for name, count in zip(_NAMES, torch.ops.quest.native_counters(False), strict=True):
            counts[name] = _join(name, counts[name], count)
    return counts


def reset_counters() -> None:
    _counts.update(dict.fromkeys(_NAMES, 0))
    if native_status().loaded:
        torch.ops.quest.native_counters(True)


def count_update_call(num_stale: Tensor, is_new: Tensor) -> None:
    _add(update_calls=1)
    if num_stale.is_cpu:
        _add(summaries_rebuilt=int(num_stale), pages_sealed=int(is_new.sum()))


def count_prefill_call() -> None:
    _add(prefill_calls=1)


def count_dense_call(key_cache: Tensor, value_cache: Tensor, seq_lens: Tensor) -> None:
    _add(dense_calls=1)
    if seq_lens.is_cpu:
        num_tokens = int(seq_lens.expand(key_cache.shape[0]).sum())
        _add(bytes_read=num_tokens * _bytes_of_token(key_cache, value_cache) * key_cache.shape[1])


def count_linear_call(weight: Tensor) -> None:
    _add(linear_calls=1, weight_bytes_read=weight.nbytes)


def count_sparse_call(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_summary: Tensor,
    selected: list[tuple[Tensor, Tensor | None, Any]],
    page_size: int,
) -> None:
    """``selected``: per query its seq_lens, pages [batch, num_select_heads, page_budget], None
    when every row was dense, and which rows were."""
    if all(page_indices is None for _, page_indices, _ in selected):
        _add(sparse_calls_covered=1)
    else:
        _add(sparse_calls=1)
    for seq_lens, page_indices, fits in selected:
        if seq_lens.is_cpu:
            row_bytes = page_summary[0, 0, 0].numel() * page_summary.element_size()
            _count_query(
                query,
                key_cache,
                value_cache,
                row_bytes,
                seq_lens,
                page_indices,
                fits,
                page_size,
            )


def count_cuda_call(name: str, arguments: tuple, settings: dict) -> None:
    """A call on CUDA kernels that leave counting to Python: values are not looked at."""
    if name in ("update_page_summary", "sparse_decode_step"):
        _add(update_calls=1)
    if name == "dense_decode":
        _add(dense_calls=1)
    if name in ("sparse_decode", "sparse_decode_step"):
        page_size = settings.get("page_size", SummaryFormat.page_size)
        is_covered = arguments[1].shape[2] <= settings["budget"] // page_size * page_size
        _add(**{"sparse_calls_covered" if is_covered else "sparse_calls": 1})


def _count_query(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    row_bytes: int,
    seq_lens: Tensor,
    page_indices: Tensor | None,
    fits: Any,
    page_size: int,
) -> None:
    batch, num_q_heads = query.shape[:2]
    num_kv_heads = key_cache.shape[1]
    seq_len = seq_lens.long().expand(batch)
    is_sparse = torch.zeros(batch, dtype=torch.bool)
    num_bytes = 0
    if page_indices is not None:
        is_sparse = ~fits.reshape(-1).expand(batch)
        first = page_indices[is_sparse].long() * page_size
        in_page = (seq_len[is_sparse][:, None, None] - first).clamp(0, page_size)
        tokens = torch.where(first >= 0, in_page, 0).sum(-1)
        heads_per_selection = num_q_heads // page_indices.shape[1]
        _add(
            sparse_rows=int(is_sparse.sum()) * num_q_heads,
            tokens_attended=int(tokens.sum()) * heads_per_selection,
            max_tokens_attended=int(tokens.max()),
        )
        num_summaries = int((seq_len[is_sparse] // page_size).sum()) * num_kv_heads
        num_bytes += num_summaries * row_bytes
        num_bytes += int(tokens.sum()) * _bytes_of_token(key_cache, value_cache)
    num_dense_tokens = int(seq_len[~is_sparse].sum()) * num_kv_heads
    _add(bytes_read=num_bytes + num_dense_tokens * _bytes_of_token(key_cache, value_cache))


def _bytes_of_token(key_cache: Tensor, value_cache: Tensor) -> int:
    return (key_cache.shape[3] + value_cache.shape[3]) * key_cache.element_size()


def _add(**amounts: int) -> None:
    for name, amount in amounts.items():
        _counts[name] = _join(name, _counts[name], amount)


def _join(name: str, a: int, b: int) -> int:
    return max(a, b) if name.startswith("max_") else a + b
