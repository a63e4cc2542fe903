"""What the backend itself costs: rewriting a graph, and finding the state in every step."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quest_compile.backend import with_state
from quest_compile.bench.identity import print_table, write_json
from quest_compile.config import QuestConfig
from quest_compile.decoding import prefill, step_inputs
from quest_compile.passes import Treatment, run_passes

LAYER_COUNTS = (4, 8, 16, 32)
ROUNDS = 7


def decode_graph(num_layers: int) -> torch.fx.GraphModule:
    """The Dynamo graph of one decode step of a tiny Llama with this many layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    graphs: list[torch.fx.GraphModule] = []

    def capture(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        cache = prefill(model, token, max_seq_len=4096)
        torch.compile(model, backend=capture)(**step_inputs(cache, token, position=1))
    return graphs[0]


def rewrite_row(num_layers: int) -> dict[str, Any]:
    """Seconds for all passes, median over rounds, with proof that they did their work."""
    gm = decode_graph(num_layers)
    with torch.no_grad():
        rewrites = [run_passes(gm, config=QuestConfig()) for _ in range(ROUNDS)]
    replaced = [d.treatment is Treatment.SPARSE for d in rewrites[0].decisions].count(True)
    assert replaced == num_layers - 2, "the passes did not replace what they should"
    seconds = statistics.median(r.seconds for r in rewrites)
    return {
        "layers": num_layers,
        "nodes": len(gm.graph.nodes),
        "sparse": replaced,
        "seconds": seconds,
        "ms/layer": 1e3 * seconds / num_layers,
    }


def wrapper_row(num_layers: int, *, steps: int = 2000) -> dict[str, Any]:
    """Microseconds per step that finding, checking and recording the state adds to a call."""
    caches = [torch.zeros(1, 8, 256, 128) for _ in range(num_layers)]
    arguments = [*caches, *(torch.zeros(1) for _ in range(9 * num_layers))]

    def compiled(*args: Any) -> None:
        return None

    step = with_state(compiled, list(range(num_layers)), page_size=16)
    step(*arguments)
    times: dict[str, list[float]] = {"plain": [], "wrapped": []}
    for _ in range(ROUNDS):
        for name, call in (("plain", compiled), ("wrapped", step)):
            start = time.perf_counter()
            for _ in range(steps):
                call(*arguments)
            times[name].append((time.perf_counter() - start) / steps)
    plain, wrapped = (1e6 * statistics.median(times[name]) for name in ("plain", "wrapped"))
    return {
        "layers": num_layers,
        "plain us": plain,
        "wrapped us": wrapped,
        "added us": wrapped - plain,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; ``--output FILE`` keeps them as JSON."""
    parser = argparse.ArgumentParser(prog="quest-compile bench overhead", description=__doc__)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    rewrites = [rewrite_row(n) for n in LAYER_COUNTS]
    print_table(rewrites)
    wrappers = [wrapper_row(n) for n in LAYER_COUNTS]
    print()
    print_table(wrappers)
    if args.output:
        write_json(args.output, rewrites + wrappers, rounds=ROUNDS)
    return 0
