"""Time of a decode step of one attention layer with each way to select pages.

    python -m quest_compile.bench selection --out results.json

32 query and 8 KV heads of 128, bfloat16, 16,384 tokens: random keys with RoPE ("random walk, heavy
channels" of sketch_keys.py) and queries that point at some of them, twice as sharp, so that top_p
finds something to leave out. A sample is eight consecutive steps, with other queries each, over
four copies of the cache in turn, as four layers would be, which leaves them cold. Methods take
turns in one process. The result is JSON: medians, and the tokens that a query reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.identity import identity, print_table
from quest_compile.bench.rounds import Rounds, measure_rounds
from quest_compile.bench.sketch_keys import synthetic_heads

KEYS = "random walk, heavy channels"
SHARPNESS = 2.0
_NUM_STEPS, _NUM_COPIES = 8, 4
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    'summary="minmax_int8"': {"summary": "minmax_int8"},
    'summary="meanstd"': {"summary": "meanstd"},
    'summary="sketch"': {"summary": "sketch"},
    'group_reduce="max"': {"group_reduce": "max"},
    'group_reduce="none"': {"group_reduce": "none"},
    "num_sink_pages=0, num_recent_pages=1": {"num_sink_pages": 0, "num_recent_pages": 1},
    "budget=0.125": {"budget": 16384, "budget_fraction": 0.125},
    "top_p=0.9": {"top_p": 0.9},
    "top_p=0.99": {"top_p": 0.99},
    'top_p=0.9, summary="sketch"': {"top_p": 0.9, "summary": "sketch"},
    "select_every=2": {"select_every": 2},
    "select_every=4": {"select_every": 4},
    "select_every=8": {"select_every": 8},
    'select_every=8, summary="sketch"': {"select_every": 8, "summary": "sketch"},
}


def way(
    settings: dict[str, Any], budget: int, queries: list[torch.Tensor], caches: list[torch.Tensor]
) -> Callable[[int], float]:
    """A sampler: seconds of a step, the mean over steps and caches."""
    settings = {"budget": budget, **settings}
    last = caches[0].shape[2] - 1
    # The first length is a multiple of every select_every, and no page is completed on the way.
    positions = [torch.tensor([last - _NUM_STEPS + i]) for i in range(_NUM_STEPS)]
    states = []
    for cache in caches:
        rows, scale = ops.empty_page_summary(cache, 16, settings.get("summary", "minmax"))
        scored: tuple[Any, Any] = (None, None)
        if settings.get("select_every", 1) > 1:
            scored = ops.empty_page_scores(cache, cache.shape[1])
            scored[1].fill_(-1)
        states.append((rows, torch.tensor([0, -1]), scale, scored))
    step = torch.ops.quest.sparse_decode_step.default

    def sample(number: int) -> float:
        start = time.perf_counter()
        for query, position in zip(queries, positions):
            for cache, (rows, num_sealed, scale, scored) in zip(caches, states):
                seq_lens = position + 1
                tensors = (query, cache, cache, position, rows, num_sealed, seq_lens, None)
                step(*tensors, scale, *scored, **settings)
        return (time.perf_counter() - start) / (_NUM_STEPS * len(caches))

    return sample


def tokens_read(sample: Callable[[int], float]) -> float:
    ops.reset_counters()
    sample(0)
    counted = ops.counters()
    return counted["tokens_attended"] / counted["sparse_rows"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quest-compile bench selection")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--max-load", type=float, default=0.25, help="cores others may use")
    parser.add_argument("--out", type=Path, default=Path("selection.json"))
    args = parser.parse_args(argv)
    heads = [*synthetic_heads(KEYS), *synthetic_heads(KEYS, seed=3)]
    queries = [(SHARPNESS * query).bfloat16() for query, _ in heads[:_NUM_STEPS]]
    keys = heads[0][1].bfloat16()
    caches = [keys.clone() for _ in range(_NUM_COPIES)]
    rows = []
    for budget in args.budgets:
        ways = {name: way(settings, budget, queries, caches) for name, settings in WAYS.items()}
        samples = measure_rounds(ways, Rounds(args.rounds, 600.0, args.max_load), f"{budget}")
        for name, sample in ways.items():
            values = samples.values[name]
            rows.append(
                {
                    "budget": budget,
                    "way": name,
                    "tokens_read": round(tokens_read(sample), 1),
                    "median_us": round(1e6 * samples.median(name), 1),
                    "of_default": round(samples.median(name) / samples.median("default"), 3),
                    "quartiles_us": [round(1e6 * q, 1) for q in statistics.quantiles(values)[::2]],
                }
            )
    facts = {"threads": torch.get_num_threads(), "rounds": args.rounds, "marked": samples.marked}
    result = {
        "identity": identity(),
        "keys": KEYS,
        "sharpness": SHARPNESS,
        "tokens": keys.shape[2],
        **facts,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows)
    return 0
