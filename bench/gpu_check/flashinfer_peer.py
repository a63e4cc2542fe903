"""FlashInfer's decode kernels, where the package is installed (quest_compile[flashinfer]).

FlashInfer may compile its kernels at the first call, which takes minutes where it has none ready.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from quest_compile.bench.ops.inputs import Step, Workload
from quest_compile.bench.ops.methods import Method, quest_methods, selected_pages
from quest_compile.bench.settings import Setting

_PAGE_SIZE = 16
_WORKSPACE_BYTES = 256 * 2**20


def is_installed() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("flashinfer") is not None


def peers_of(workload: Workload, steps: list[Step]) -> list[Method]:
    """The kernels alone, planned ahead: over everything, and over the pages that we select."""
    dense = Method("flashinfer", PagedDecode({}), workload.dense_bytes)
    setting = Setting(budget=min(2048, workload.context // 4))
    pages = {id(s): selected_pages(s, setting) for s in steps}
    (own,) = (m for m in quest_methods(setting, steps, workload) if m.stage == "attend")
    call = PagedDecode(pages)
    return [dense, Method("flashinfer, pages", call, own.bytes_moved, pages=own.pages)]


class PagedDecode:
    """BatchDecodeWithPagedKVCacheWrapper over a static cache, whose pages are views of it.

    A cache [B, H, positions, D] is B * H caches of one head for FlashInfer, with the query heads of
    a group as its query heads: no copy of the cache is made. ``pages``: to attend, by the id of a
    step, full lists [B, H, pages] of a full cache; everything where there is none.
    """

    def __init__(self, pages: dict[int, torch.Tensor]) -> None:
        self._pages = pages
        self._wrappers: dict[tuple, Any] = {}
        self._workspace: torch.Tensor | None = None

    def __call__(self, s: Step) -> torch.Tensor:
        batch, num_kv_heads, length, head_dim = s.key_cache.shape
        rows, group_size = batch * num_kv_heads, s.query.shape[1] // num_kv_heads
        query = s.query.reshape(rows, group_size, head_dim)
        # [pages, heads, page_size, D], "HND".
        caches = tuple(x.view(-1, 1, _PAGE_SIZE, head_dim) for x in (s.key_cache, s.value_cache))
        pages = self._pages.get(id(s))
        # Planning is done on the host, before any graph.
        key = (*query.shape, length, query.dtype, id(s) if pages is not None else 0)
        if key not in self._wrappers:
            num_pages = length // _PAGE_SIZE
            if pages is None:
                pages = torch.arange(num_pages, dtype=torch.int32, device=query.device)
            indices = pages.expand(batch, num_kv_heads, -1).reshape(rows, -1)
            first = torch.arange(rows, dtype=torch.int32, device=query.device) * num_pages
            self._wrappers[key] = self._plan(first[:, None] + indices, query)
        return self._wrappers[key].run(query, caches).view(s.query.shape)

    def _plan(self, indices: torch.Tensor, query: torch.Tensor) -> Any:
        import flashinfer

        (rows, count), (_, group_size, head_dim) = indices.shape, query.shape
        options: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
        tables = (
            torch.arange(rows + 1, **options) * count,
            indices.flatten(),
            torch.full((rows,), _PAGE_SIZE, **options),
        )
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
        names = ("indptr", "indices", "last_page_len")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            kv_layout="HND",
            use_cuda_graph=True,
            use_tensor_cores=group_size >= 4,
            **{f"paged_kv_{name}_buffer": table.clone() for name, table in zip(names, tables)},
        )
        sizes = (group_size, 1, head_dim, _PAGE_SIZE)
        wrapper.plan(*tables, *sizes, q_data_type=query.dtype, kv_data_type=query.dtype)
        return wrapper
