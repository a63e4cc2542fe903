"""attend_pages and dense_decode by FlashInfer's batch decode, chosen explicitly; not for graphs.

FlashInfer plans a call on the host, from the number of pages of every row: that waits for the
device, and cannot be part of a CUDA graph. It knows no mask.

A row of a batch and KV head (or query head, where each has pages of its own) is a request for
FlashInfer, with caches of one head. Its pages are views of our caches, whatever their strides are:
page i of FlashInfer begins i units into the memory, a unit being what divides all strides.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

NAMES = ("attend_pages", "dense_decode")
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# What FlashInfer recommends; it has to be zero at first.
_WORKSPACE_BYTES = 128 * 2**20
_LN2 = math.log(2)
_wrappers: dict[tuple[Any, ...], Any] = {}


def is_installed() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("flashinfer") is not None


def why_not(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, seq_lens: Tensor,
    attn_mask: Tensor | None, page_size: int
) -> str:  # fmt: skip
    """What of a checked call FlashInfer does not take; empty where it takes all.

    Waits for the device where there is a mask: one that allows every valid position is none.
    """
    head_dim, max_seq_len = key_cache.shape[3], key_cache.shape[2]
    if not is_installed():
        return "flashinfer is not installed: pip install 'quest_compile[flashinfer]'"
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return "FlashInfer plans on the host, which no CUDA graph can hold"
    if query.shape[2] > 1:
        return f"{query.shape[2]} queries at once"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if head_dim not in _HEAD_DIMS or value_cache.shape[3] != head_dim:
        return f"head_dim {head_dim} of keys and {value_cache.shape[3]} of values"
    if key_cache.stride() != value_cache.stride():
        return "strides of key_cache and value_cache that differ"
    if max_seq_len % page_size:
        return f"max_seq_len {max_seq_len}, which is no multiple of page_size {page_size}"
    if _pages_of(key_cache, page_size).shape[0] >= 2**31:
        return "a cache of too many pages for 32-bit indices"
    if attn_mask is not None and not _allows_all(attn_mask, seq_lens, max_seq_len):
        return "a mask that forbids valid positions"
    return ""


def attend_pages(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, page_indices: Tensor, seq_lens: Tensor,
    attn_mask: Tensor | None = None, *, page_size: int = 16, scale: float | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attend(query, key_cache, value_cache, page_indices, seq_lens, page_size, scale)


def dense_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, seq_lens: Tensor,
    attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:  # fmt: skip
    page_size = page_size_of(key_cache)
    batch, num_kv_heads, max_seq_len = key_cache.shape[:3]
    pages = torch.arange(max_seq_len // page_size, dtype=torch.int32)
    pages = pages.expand(batch, num_kv_heads, -1)
    return _attend(query, key_cache, value_cache, pages, seq_lens, page_size, scale)[0]


def page_size_of(key_cache: Tensor) -> int:
    """Of dense_decode: pages have to fill the cache."""
    return math.gcd(key_cache.shape[2], 16)


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, page_indices: Tensor, seq_lens: Tensor,
    page_size: int, scale: float | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, Q, 1, D] and lse [B, Q, 1]; page_indices [B, K or Q, pages]."""
    batch, num_q_heads, _, head_dim = query.shape
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    num_lists = page_indices.shape[1]
    heads = num_q_heads // num_lists
    # On the host: where each row's pages begin, in units, and how much of the last one is valid.
    pages, length = page_indices.cpu().long(), seq_lens.cpu().long().clamp(1, max_seq_len)
    length = length.expand(batch)[:, None, None]
    is_used = (pages >= 0) & (pages * page_size < length)
    pages = torch.where(is_used, pages, max_seq_len).sort(-1).values
    count = is_used.sum(-1, keepdim=True)
    is_empty = count == 0
    last = pages.gather(-1, (count - 1).clamp(min=0))
    last_len = torch.where(is_empty, 1, (length - last * page_size).clamp(max=page_size))
    # A row without any page reads one position, which is overwritten.
    pages = torch.where(is_empty, 0, pages)
    count = count.clamp(min=1)
    unit, strides = _unit_of(key_cache, page_size), key_cache.stride()
    kv_head = torch.arange(num_lists) * num_kv_heads // num_lists
    first = (torch.arange(batch) * strides[0])[:, None] + kv_head * strides[1]
    indices = (first[..., None] + pages * page_size * strides[2]) // unit
    indices = indices[torch.arange(pages.shape[-1]) < count]
    indptr = torch.nn.functional.pad(count.flatten().cumsum(0), (1, 0))
    wrapper = _wrapper_of(query.device, use_tensor_cores=heads > 2)
    wrapper.plan(
        indptr.int(), indices.int(), last_len.flatten().int(), heads, 1, head_dim, page_size,
        q_data_type=query.dtype, kv_data_type=query.dtype,
        sm_scale=head_dim**-0.5 if scale is None else scale
    )  # fmt: skip
    caches = (_pages_of(key_cache, page_size), _pages_of(value_cache, page_size))
    rows = query.reshape(batch * num_lists, heads, head_dim)
    out, lse = wrapper.run(rows, caches, return_lse=True)
    # FlashInfer's is of base 2.
    out, lse = out.view(batch, num_q_heads, 1, head_dim), lse.view(batch, num_q_heads, 1) * _LN2
    if is_empty.any():
        is_empty = is_empty.to(query.device).repeat_interleave(heads, 1)
        out = out.masked_fill(is_empty[..., None], 0)
        lse = lse.masked_fill(is_empty, -torch.inf)
    return out, lse


def _unit_of(cache: Tensor, page_size: int) -> int:
    strides = cache.stride()
    return math.gcd(strides[0], strides[1], page_size * strides[2])


def _pages_of(cache: Tensor, page_size: int) -> Tensor:
    """[pages, 1, page_size, D] ("HND"): a view, in which pages overlap."""
    unit, (batch, num_heads, max_seq_len, head_dim) = _unit_of(cache, page_size), cache.shape
    stride_b, stride_h, stride_t, _ = cache.stride()
    last = (batch - 1) * stride_b + (num_heads - 1) * stride_h
    last += (max_seq_len - page_size) * stride_t
    return cache.as_strided(
        (last // unit + 1, 1, page_size, head_dim), (unit, head_dim, stride_t, 1)
    )


def _allows_all(attn_mask: Tensor, seq_lens: Tensor, max_seq_len: int) -> bool:
    if attn_mask.shape[3] == 1:
        return bool(attn_mask.all())
    position = torch.arange(attn_mask.shape[3], device=seq_lens.device)
    is_valid = position < seq_lens.clamp(max=max_seq_len)[:, None, None, None]
    return bool((attn_mask | ~is_valid).all())


def _wrapper_of(device: torch.device, use_tensor_cores: bool) -> Any:
    """One per stream: a plan is kept in the wrapper's memory until its run is over."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, use_tensor_cores)
    if key not in _wrappers:
        import flashinfer

        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        _wrappers[key] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="HND", use_tensor_cores=use_tensor_cores
        )
    return _wrappers[key]
