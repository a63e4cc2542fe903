"""FlashInfer's decode kernels, where the package is installed (quest_compile[flashinfer]).

FlashInfer may compile its kernels at the first call, which takes minutes where it has none ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quest_compile.ops import flashinfer_attention

_PAGE_SIZE = 16
_WORKSPACE_BYTES = 256 * 2**20


def is_installed() -> bool:
    return flashinfer_attention.is_installed()


def peers_of(x: Any) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """(method, whose kernels, call) for inputs with query and caches [B, heads, positions, D].

    The kernels alone, planned ahead; and our operators on them, which plan every call.
    """
    if not is_installed() or not x.query.is_cuda:
        return []
    return methods()


def methods() -> list[tuple[str, str, Callable[[Any], Any]]]:
    return [
        ("flashinfer decode", "flashinfer", PagedDecode()),
        ("attend_pages, planned ahead", "flashinfer", PagedDecode(is_sparse=True)),
        ("attend_pages", "flashinfer", _attend_pages),
        ("dense_decode", "flashinfer", _dense_decode),
    ]


def _attend_pages(x: Any) -> Any:
    caches = (x.query, x.key_cache, x.value_cache)
    return flashinfer_attention.attend_pages(*caches, x.pages, x.seq_lens, None)


def _dense_decode(x: Any) -> Any:
    caches = (x.query, x.key_cache, x.value_cache)
    return flashinfer_attention.dense_decode(*caches, x.seq_lens, None)


for _call in (_attend_pages, _dense_decode):
    _call.waits_for_device = True  # type: ignore[attr-defined]


class PagedDecode:
    """BatchDecodeWithPagedKVCacheWrapper over a static cache, whose pages are views of it.

    A cache [B, H, positions, D] is B * H caches of one head for FlashInfer, with the query heads of
    a group as its query heads: no copy of the cache is made. ``is_sparse``: over ``x.pages``, which
    are full lists [B, H, pages] of a full cache.
    """

    def __init__(self, is_sparse: bool = False) -> None:
        self._is_sparse = is_sparse
        self._wrappers: dict[tuple, Any] = {}
        self._workspace: torch.Tensor | None = None

    def __call__(self, x: Any) -> torch.Tensor:
        batch, num_kv_heads, _, head_dim = x.key_cache.shape
        group_size = x.query.shape[1] // num_kv_heads
        query = x.query.reshape(batch * num_kv_heads, group_size, head_dim)
        # [pages, heads, page_size, D], "HND".
        pages = tuple(
            cache.view(-1, 1, _PAGE_SIZE, head_dim) for cache in (x.key_cache, x.value_cache)
        )
        return self._planned(x, group_size).run(query, pages).view(x.query.shape)

    def _planned(self, x: Any, group_size: int) -> Any:
        """The wrapper of these sizes and pages; planning is done on the host, before any graph."""
        batch, num_kv_heads, length, head_dim = x.key_cache.shape
        rows, num_pages, device = batch * num_kv_heads, length // _PAGE_SIZE, x.query.device
        key: tuple[Any, ...] = (rows, group_size, length, head_dim, x.query.dtype)
        if self._is_sparse:
            key += (x.pages.data_ptr(),)
        if key in self._wrappers:
            return self._wrappers[key]
        indices = torch.arange(num_pages, dtype=torch.int32, device=device).expand(rows, -1)
        if self._is_sparse:
            indices = x.pages.view(rows, -1)
        first = torch.arange(rows, dtype=torch.int32, device=device) * num_pages
        count = indices.shape[1]
        self._wrappers[key] = self._plan(
            torch.arange(rows + 1, dtype=torch.int32, device=device) * count,
            (first[:, None] + indices).flatten(),
            torch.full((rows,), _PAGE_SIZE, dtype=torch.int32, device=device),
            group_size,
            head_dim,
            x.query.dtype,
        )
        return self._wrappers[key]

    def _plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        group_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> Any:
        import flashinfer

        if self._workspace is None:
            self._workspace = torch.zeros(
                _WORKSPACE_BYTES, dtype=torch.uint8, device=indices.device
            )
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            kv_layout="HND",
            use_cuda_graph=True,
            use_tensor_cores=group_size >= 4,
            paged_kv_indptr_buffer=indptr.clone(),
            paged_kv_indices_buffer=indices.clone(),
            paged_kv_last_page_len_buffer=last_page_len.clone(),
        )
        wrapper.plan(
            indptr,
            indices,
            last_page_len,
            group_size,
            1,
            head_dim,
            _PAGE_SIZE,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return wrapper
