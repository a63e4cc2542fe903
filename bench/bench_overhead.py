"""What the backend itself costs: rewriting a graph, and finding the state in every step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from quest_compile.bench import options
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.config import QuestConfig
from quest_compile.decoding import prefill, step_inputs
from quest_compile.passes import Treatment, run_passes
from quest_compile.step_state import with_state

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


def passes_seconds(num_layers: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds for all passes, with proof that they did their work."""
    gm = decode_graph(num_layers)
    with torch.no_grad():
        rewrites = [run_passes(gm, config=QuestConfig()) for _ in range(ROUNDS)]
    replaced = [d.treatment is Treatment.SPARSE for d in rewrites[0].decisions].count(True)
    if replaced != num_layers - 2:
        raise RefusedError(f"{replaced} of {num_layers} layers are sparse, not all but two")
    return [r.seconds for r in rewrites], {"nodes": len(gm.graph.nodes), "sparse_layers": replaced}


def state_seconds(num_layers: int, *, steps: int = 2000) -> dict[str, list[float]]:
    """Seconds of a step that does nothing, and of one that finds, checks and records the state."""
    caches = [torch.zeros(1, 8, 256, 128) for _ in range(num_layers)]
    arguments = [*caches, *(torch.zeros(1) for _ in range(9 * num_layers))]

    def compiled(*args: Any) -> None:
        return None

    step = with_state(compiled, [(i, i) for i in range(num_layers)], page_size=16)
    step(*arguments)
    times: dict[str, list[float]] = {"nothing": [], "state": []}
    for _ in range(ROUNDS):
        for name, call in (("nothing", compiled), ("state", step)):
            start = time.perf_counter()
            for _ in range(steps):
                call(*arguments)
            times[name].append((time.perf_counter() - start) / steps)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = argparse.ArgumentParser(prog="quest-compile bench overhead", description=__doc__)
    options.add_output_arguments(parser)
    recorder = options.recorder_of("overhead", parser.parse_args(argv))
    status = None
    try:
        for num_layers in LAYER_COUNTS:
            _measure(num_layers, recorder)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(quantities(recorder.results))
    return status or recorder.status()


def _measure(num_layers: int, recorder: Recorder) -> None:
    name = f"overhead/{num_layers} layers"
    if not recorder.has(f"{name}/passes"):
        try:
            seconds, facts = passes_seconds(num_layers)
        except RefusedError as error:
            recorder.refuse(name, error)
        else:
            recorder.add([Result(f"{name}/passes", "quest", seconds, facts)])
    if not recorder.has(f"{name}/a step with state"):
        for what, values in state_seconds(num_layers).items():
            recorder.add([Result(f"{name}/a step with {what}", "quest", values, {})])
