"""Prefill attention of one layer: quest::dense_prefill, and what torch has for the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.results import RefusedError
from quest_compile.bench.shapes import Layer

# Any: its stub takes no unpacked tensors.
sdpa: Any = torch.nn.functional.scaled_dot_product_attention
# Of the result that is checked, at its end.
_CHECKED_QUERIES = 16
# Rows of the matrix whose product with another says what the process can do.
_GEMM_SIZE = 512

Call = Callable[[], torch.Tensor]


def useful_flops(layer: Layer, context: int, batch: int) -> int:
    """Of causal attention: two products with half of all pairs."""
    return 2 * batch * layer.num_q_heads * context * context * layer.head_dim


def make_calls(layer: Layer, context: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    """By method; what a call prepares per prompt, as repeating heads, is part of it.

    Raises:
        RefusedError: plain torch serves, or the result is wrong.
    """
    check_kernels("cpu")
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int) -> torch.Tensor:
        # Heads of a token side by side, as projections leave them.
        shape = (batch, context, heads, layer.head_dim)
        return torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2)

    query, keys, values = map(randn, (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads))
    keys, values = keys.contiguous(), values.contiguous()
    position = torch.arange(context)
    mask = (position <= position[:, None])[None, None]

    def repeated(call: Callable[..., torch.Tensor]) -> torch.Tensor:
        return call(query, *(x.repeat_interleave(layer.group_size, 1) for x in (keys, values)))

    calls: dict[str, Call] = {
        "dense_prefill": lambda: ops.dense_prefill(query, keys, values, position),
        # Compiled models hand over a mask.
        "dense_prefill_mask": lambda: ops.dense_prefill(query, keys, values, position, mask),
        "sdpa_causal": lambda: repeated(lambda *x: sdpa(*x, is_causal=True)),
        "sdpa_enable_gqa": lambda: sdpa(query, keys, values, is_causal=True, enable_gqa=True),
        "sdpa_mask": lambda: repeated(lambda *x: sdpa(*x, mask)),
    }
    _check(calls, query, keys, values)
    return calls


def _check(calls: dict[str, Call], query: Any, keys: Any, values: Any) -> None:
    last = slice(-min(_CHECKED_QUERIES, query.shape[2]), None)
    end = keys.shape[2]
    live = torch.arange(end) <= torch.arange(end)[last, None]
    tensors = [x.double() for x in (query[:, :, last], keys, values)]
    exact = sdpa(*tensors, live, enable_gqa=True)
    plain = (sdpa(query[:, :, last], keys, values, live, enable_gqa=True).double() - exact).abs()
    allowed = 2 * plain.max() + 4 * torch.finfo(query.dtype).eps * exact.abs().max()
    for name in ("dense_prefill", "dense_prefill_mask"):
        before = ops.counters()["prefill_calls"]
        error = (calls[name]()[:, :, last].double() - exact).abs().max()
        if ops.counters()["prefill_calls"] != before + 1:
            raise RefusedError(f"{name}: quest::dense_prefill did not run")
        if not error <= allowed:
            raise RefusedError(f"{name}: error {error:.3g}, allowed {allowed:.3g}")


def gemm_sampler(flops: int, dtype: torch.dtype) -> Callable[[int], float]:
    """Seconds that so many operations take in products of matrices, in this process."""
    a, b = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE).to(dtype)
    repeats = 20

    def sample(number: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        return (time.perf_counter() - start) / repeats * flops / (2 * _GEMM_SIZE**3)

    return sample


def sampler_of(call: Call) -> Callable[[int], float]:
    def sample(number: int) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample
