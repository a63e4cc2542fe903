"""FlashInfer's dense decode kernels, where the package is installed (quest_compile[flashinfer]).

FlashInfer may compile its kernels at the first call, which takes minutes where it has none ready.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

_PAGE_SIZE = 16


def is_installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def peers_of(x: Any) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """(method, whose kernels, call) for inputs with query and caches [B, heads, positions, D]."""
    if not is_installed() or not x.query.is_cuda:
        return []
    return [("flashinfer decode", "flashinfer", PagedDecode())]


class PagedDecode:
    """BatchDecodeWithPagedKVCacheWrapper over a static cache, whose pages are views of it.

    A cache [B, H, positions, D] is B * H caches of one head for FlashInfer, with the query heads of
    a group as its query heads: no copy of the cache is made.
    """

    def __init__(self) -> None:
        self._wrappers: dict[tuple, Any] = {}

    def __call__(self, x: Any) -> torch.Tensor:
        batch, num_kv_heads, length, head_dim = x.key_cache.shape
        group_size = x.query.shape[1] // num_kv_heads
        wrapper = self._planned(batch * num_kv_heads, group_size, length, head_dim, x.query)
        query = x.query.reshape(batch * num_kv_heads, group_size, head_dim)
        # [pages, heads, page_size, D], "HND".
        pages = tuple(
            cache.view(-1, 1, _PAGE_SIZE, head_dim) for cache in (x.key_cache, x.value_cache)
        )
        return wrapper.run(query, pages).view(x.query.shape)

    def _planned(
        self, rows: int, group_size: int, length: int, head_dim: int, query: torch.Tensor
    ) -> Any:
        """The wrapper of these sizes; planning is done on the host, before any graph."""
        import flashinfer

        key = (rows, group_size, length, head_dim, query.dtype)
        if key not in self._wrappers:
            device, num_pages = query.device, length // _PAGE_SIZE
            indptr = torch.arange(rows + 1, dtype=torch.int32, device=device) * num_pages
            indices = torch.arange(rows * num_pages, dtype=torch.int32, device=device)
            last = torch.full((rows,), _PAGE_SIZE, dtype=torch.int32, device=device)
            workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace,
                kv_layout="HND",
                use_cuda_graph=True,
                use_tensor_cores=group_size >= 4,
                paged_kv_indptr_buffer=indptr.clone(),
                paged_kv_indices_buffer=indices.clone(),
                paged_kv_last_page_len_buffer=last.clone(),
            )
            wrapper.plan(
                indptr,
                indices,
                last,
                group_size,
                1,
                head_dim,
                _PAGE_SIZE,
                q_data_type=query.dtype,
                kv_data_type=query.dtype,
            )
            self._wrappers[key] = wrapper
        return self._wrappers[key]
