"""Ways to select pages, as steps of one attention layer that can be timed and proven."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from quest_compile import ops
from quest_compile.bench.results import RefusedError
from quest_compile.bench.rounds import Sampler
from quest_compile.bench.sketch_keys import synthetic_heads
from quest_compile.huge_pages import use_huge_pages

KEYS = "random walk, heavy channels"
SHARPNESS = 2.0
NUM_STEPS, NUM_COPIES = 8, 4
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    'summary="sketch"': {"summary": "sketch"},
    'group_reduce="max"': {"group_reduce": "max"},
    'group_reduce="none"': {"group_reduce": "none"},
    "num_sink_pages=0, num_recent_pages=1": {"num_sink_pages": 0, "num_recent_pages": 1},
    "budget=0.125": {"budget": 16384, "budget_fraction": 0.125},
    "top_p=0.9": {"top_p": 0.9},
    "top_p=0.99": {"top_p": 0.99},
    'top_p=0.9, summary="sketch"': {"top_p": 0.9, "summary": "sketch"},
}
# Keys and values of one layer.
Cache = tuple[Tensor, Tensor]


def inputs() -> tuple[list[Tensor], list[Cache]]:
    """Queries [1, 32, 1, 128] of the steps, and copies of keys and values [1, 8, 16384, 128]."""
    heads = [*synthetic_heads(KEYS), *synthetic_heads(KEYS, seed=3)]
    queries = [(SHARPNESS * query).bfloat16() for query, _ in heads[:NUM_STEPS]]
    keys = heads[0][1].bfloat16()
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    caches = [(keys.clone(), values.clone()) for _ in range(NUM_COPIES)]
    for tensor in (x for cache in caches for x in cache):
        use_huge_pages(tensor)
    return queries, caches


def way(
    settings: dict[str, Any], budget: int, queries: list[Tensor], caches: list[Cache]
) -> Sampler:
    """Seconds of a step, the mean over steps and caches."""
    settings = {"budget": budget, **settings}
    last = caches[0][0].shape[2] - 1
    # No page is completed on the way.
    positions = [torch.tensor([last - NUM_STEPS + i]) for i in range(NUM_STEPS)]
    states = []
    for keys, _ in caches:
        rows, scale = ops.empty_page_summary(keys, 16, settings.get("summary", "minmax"))
        use_huge_pages(rows)
        states.append((rows, torch.tensor([0, -1]), scale))
    step = torch.ops.quest.sparse_decode_step.default

    def sample(number: int) -> float:
        start = time.perf_counter()
        for query, position in zip(queries, positions):
            for (keys, values), (rows, num_sealed, scale) in zip(caches, states):
                seq_lens = position + 1
                tensors = (query, keys, values, position, rows, num_sealed, seq_lens, None)
                step(*tensors, scale, **settings)
        return (time.perf_counter() - start) / (NUM_STEPS * len(caches))

    return sample


def prove(name: str, sample: Sampler, num_copies: int) -> dict[str, Any]:
    """What a step of the way ``name`` reads, by the counters of the operators.

    Raises:
        RefusedError: its steps are not sparse.
    """
    sample(0)  # Makes the page summaries.
    ops.reset_counters()
    sample(0)
    counted = ops.counters()
    num_calls = NUM_STEPS * num_copies
    expected = {
        "sparse_calls": num_calls,
        "sparse_calls_covered": 0,
        "dense_calls": 0,
        "summaries_rebuilt": 0,
    }
    for counter, count in expected.items():
        if counted[counter] != count:
            raise RefusedError(f"{name}: expected {counter} {count}, got {counted[counter]}")
    tokens_read = counted["tokens_attended"] / counted["sparse_rows"]
    return {"tokens_read": tokens_read, "bytes_moved": counted["bytes_read"] / num_calls}


def method_of(name: str) -> str:
    """A file's name for a way, such as ``top_p=0.9,summary=sketch``."""
    return name.replace('"', "").replace(", ", ",")
