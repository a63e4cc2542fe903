"""Dense attention by others, on the inputs of attention.py; what is not there is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Peer = tuple[str, str, Callable[[Any], Any]]


def peers_of(x: Any) -> list[Peer]:
    """(method, whose kernels, call); a call that does not work here says so when it is tried."""
    peers: list[Peer] = [
        ("sdpa flash, enable_gqa", "torch", _sdpa(SDPBackend.FLASH_ATTENTION)),
        ("sdpa cudnn, enable_gqa", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        ("sdpa flash, group as queries", "torch", _grouped(SDPBackend.FLASH_ATTENTION)),
        ("sdpa compiled, repeat_kv + mask", "torch", _compiled_repeat_kv()),
    ]
    if not x.query.is_cuda:
        peers = [
            ("sdpa, enable_gqa", "torch", _sdpa(None)),
            ("sdpa, group as queries", "torch", _grouped(None)),
            ("sdpa, repeat_kv + mask", "torch", _repeat_kv),
        ]
    return peers


def _choose(backend: SDPBackend | None, *tensors: Any, **settings: Any) -> torch.Tensor:
    if backend is None:
        return scaled_dot_product_attention(*tensors, **settings)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*tensors, **settings)


def _sdpa(backend: SDPBackend | None) -> Callable[[Any], torch.Tensor]:
    return lambda x: _choose(backend, x.query, x.key_cache, x.value_cache, enable_gqa=True)


def _grouped(backend: SDPBackend | None) -> Callable[[Any], torch.Tensor]:
    """The query heads of a group as positions of one head: they all see all keys."""

    def call(x: Any) -> torch.Tensor:
        grouped = x.query.unflatten(1, (x.key_cache.shape[1], -1)).squeeze(3)
        return _choose(backend, grouped, x.key_cache, x.value_cache).flatten(1, 2).unsqueeze(2)

    return call


def _repeat_kv(x: Any) -> torch.Tensor:
    """What a transformers model runs."""
    return _repeat_kv_tensors(x.query, x.key_cache, x.value_cache, x.attn_mask)


def _repeat_kv_tensors(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    group_size = query.shape[1] // keys.shape[1]
    keys, values = (
        x[:, :, None].expand(-1, -1, group_size, -1, -1).flatten(1, 2) for x in (keys, values)
    )
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def _compiled_repeat_kv() -> Callable[[Any], torch.Tensor]:
    compiled = _compile_repeat_kv()
    return lambda x: compiled(x.query, x.key_cache, x.value_cache, x.attn_mask)


@functools.cache
def _compile_repeat_kv() -> Callable[..., torch.Tensor]:
    return torch.compile(torch.no_grad()(_repeat_kv_tensors), dynamic=True)
