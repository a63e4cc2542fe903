"""Decode attention of one layer: our operators against scaled_dot_product_attention.

All methods run in one process, in interleaved rounds; every call takes another copy of the caches
and comes after a read of other memory, so that all begin with the same cold caches and with threads
that are awake. Medians; beside each time the bytes that had to move, and the fraction this is of a
plain read of as many bytes as the caches have, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops
from quest_compile.bench.identity import print_table, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Larger than the last-level cache of the machine together.
_ROTATED_BYTES = 256 * 2**20
_FLUSHED_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Layer:
    """The attention shape of one decoder layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "llama-3-8b": Layer(32, 8, 128),
    "llama-3.2-1b": Layer(32, 8, 64),
    "qwen3-4b": Layer(32, 8, 128),
    "llama-2-7b": Layer(32, 32, 128),
}


@dataclasses.dataclass
class Step:
    """The tensors of one call: one of several copies."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_summary: torch.Tensor
    int8_summary: tuple[torch.Tensor, torch.Tensor]
    seq_lens: torch.Tensor
    attn_mask: torch.Tensor


def make_steps(layer: Layer, context: int, dtype: torch.dtype) -> list[Step]:
    """As many copies of a full cache as it takes to leave the last-level cache."""
    size = 2 * layer.num_kv_heads * context * layer.head_dim * dtype.itemsize
    steps = []
    for seed in range(max(2, -(-_ROTATED_BYTES // size))):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, layer.num_kv_heads, context, layer.head_dim)
        key_cache, value_cache = (
            torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for _ in range(2)
        )
        query = torch.randn(1, layer.num_q_heads, 1, layer.head_dim, generator=generator).to(dtype)
        seq_lens = torch.tensor([context])
        steps.append(
            Step(
                query,
                key_cache,
                value_cache,
                ops.build_page_summary(key_cache, seq_lens),
                ops.build_page_summary(key_cache, seq_lens, summary="minmax_int8"),
                seq_lens,
                torch.ones(1, 1, 1, context, dtype=torch.bool),
            )
        )
    return steps


def sdpa_as_transformers(s: Step) -> torch.Tensor:
    """repeat_kv and a mask: what a compiled transformers model runs."""
    group_size = s.query.shape[1] // s.key_cache.shape[1]
    keys, values = (x.repeat_interleave(group_size, 1) for x in (s.key_cache, s.value_cache))
    return scaled_dot_product_attention(s.query, keys, values, attn_mask=s.attn_mask)


def sdpa_enable_gqa(s: Step) -> torch.Tensor:
    return scaled_dot_product_attention(s.query, s.key_cache, s.value_cache, enable_gqa=True)


def sdpa_group_as_q_len(s: Step) -> torch.Tensor:
    """The fastest form of torch: the query heads of a group as positions of one head."""
    grouped = s.query.view(1, s.key_cache.shape[1], -1, s.query.shape[-1])
    return scaled_dot_product_attention(grouped, s.key_cache, s.value_cache).view_as(s.query)


def dense_decode(s: Step) -> torch.Tensor:
    return ops.dense_decode(s.query, s.key_cache, s.value_cache, s.seq_lens)


def sparse_decode(budget: int) -> Callable[[Step], torch.Tensor]:
    def call(s: Step) -> torch.Tensor:
        return ops.sparse_decode(
            s.query, s.key_cache, s.value_cache, s.page_summary, s.seq_lens, budget=budget
        )

    return call


def sparse_decode_int8(budget: int) -> Callable[[Step], torch.Tensor]:
    def call(s: Step) -> torch.Tensor:
        rows, channel_scale = s.int8_summary
        tensors = (s.query, s.key_cache, s.value_cache, rows, s.seq_lens, None, channel_scale)
        return ops.sparse_decode(*tensors, budget=budget, summary="minmax_int8")

    return call


def read_loop(num_bytes: int) -> Callable[[Step], torch.Tensor]:
    """A plain read of so many bytes: torch.sum over float32."""
    data = torch.ones(num_bytes // 4)
    return lambda _: data.sum()


def measure(
    methods: dict[str, Callable[[Step], torch.Tensor]], steps: list[Step], rounds: int
) -> dict[str, float]:
    """Median seconds per call of each method, rounds interleaved."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    other_memory = torch.ones(_FLUSHED_BYTES // 4)
    for round_number in range(rounds + 1):
        for name, method in methods.items():
            other_memory.sum()
            seconds = _seconds(method, steps[round_number % len(steps)])
            if round_number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(call: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def rows_of(
    layer: Layer, context: int, dtype: torch.dtype, budget: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per method, checked for activity and agreement before anything is timed."""
    steps = make_steps(layer, context, dtype)
    dense_bytes = 2 * layer.num_kv_heads * context * layer.head_dim * dtype.itemsize
    methods: dict[str, Callable[[Step], torch.Tensor]] = {
        "read loop": read_loop(dense_bytes),
        "sparse_decode": sparse_decode(budget),
        "sparse_decode minmax_int8": sparse_decode_int8(budget),
        "dense_decode": dense_decode,
        "sdpa group as q_len": sdpa_group_as_q_len,
        "sdpa enable_gqa": sdpa_enable_gqa,
        "sdpa repeat_kv + mask": sdpa_as_transformers,
    }
    moved = dict.fromkeys(methods, dense_bytes)
    for name in ("sparse_decode", "sparse_decode minmax_int8"):
        ops.reset_counters()
        methods[name](steps[0])
        counted = ops.counters()
        if context > budget and counted["sparse_calls"] != 1:
            raise RuntimeError(f"{name} was not sparse: nothing to measure")
        moved[name] = counted["bytes_read"]
    torch.testing.assert_close(
        dense_decode(steps[0]), sdpa_enable_gqa(steps[0]), atol=2e-2, rtol=2e-2
    )
    seconds = measure(methods, steps, rounds)
    bandwidth = dense_bytes / seconds["read loop"]
    rows = []
    for name in methods:
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "context": context,
                "method": name,
                "us": 1e6 * seconds[name],
                "MiB": moved[name] / 2**20,
                "GB/s": moved[name] / seconds[name] / 1e9,
                "of read": moved[name] / seconds[name] / bandwidth,
                "dense / this": seconds["dense_decode"] / seconds[name],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; ``--output FILE`` keeps it as JSON."""
    parser = argparse.ArgumentParser(prog="quest-compile bench ops", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    print(f"kernels: {ops.native_status().info}")
    rows = []
    for dtype in args.dtypes:
        for context in args.contexts:
            rows += rows_of(SHAPES[args.shape], context, DTYPES[dtype], args.budget, args.rounds)
    print_table(rows)
    if args.output:
        write_json(args.output, rows, shape=args.shape, budget=args.budget, rounds=args.rounds)
    return 0
