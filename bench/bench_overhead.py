"""What the backend itself costs: rewriting a graph, and finding the state in every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from quest_compile.bench import options, parsers
from quest_compile.bench.load import LoadMeter, load_facts
from quest_compile.bench.progress import Progress
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.config import QuestConfig
from quest_compile.decoding import prefill, step_inputs
from quest_compile.ops import SummaryFormat
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
    decisions = rewrites[0].decisions
    num_sparse = [d.treatment is Treatment.SPARSE for d in decisions].count(True)
    if num_sparse != num_layers - 2:
        raise RefusedError(f"{num_sparse} of {num_layers} layers are sparse, not all but two")
    replaced = num_sparse + sum(d.operator == "dense_decode" for d in decisions)
    facts = {"layers": num_layers, "replaced_layers": replaced, "sparse_layers": num_sparse}
    return [r.seconds for r in rewrites], facts | {"nodes": len(gm.graph.nodes)}


def state_seconds(
    num_layers: int, *, steps: int = 2000
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of a step that does nothing, and of one that finds, checks and records the state;
    with proof that it did. Nothing is decoded and no cache is read."""
    caches = [torch.zeros(1, 8, 256, 128) for _ in range(num_layers)]
    arguments = [*caches, *(torch.zeros(1) for _ in range(9 * num_layers))]

    def compiled(*args: Any) -> None:
        return None

    step = with_state(compiled, [(i, i) for i in range(num_layers)], SummaryFormat())
    step(*arguments)
    times: dict[str, list[float]] = {"nothing": [], "state": []}
    for _ in range(ROUNDS):
        for name, call in (("nothing", compiled), ("state", step)):
            start = time.perf_counter()
            for _ in range(steps):
                call(*arguments)
            times[name].append((time.perf_counter() - start) / steps)
    num_states = sum(hasattr(cache, "_quest_page_summaries") for cache in caches)
    if num_states != num_layers:
        raise RefusedError(f"{num_states} of {num_layers} layers have a state")
    return times, {"layers": num_layers, "layers_with_state": num_states}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; ``--output FOLDER`` keeps pyperf JSON."""
    args = parsers.overhead().parse_args(argv)
    recorder = options.recorder_of("overhead", args)
    status = None
    try:
        with Progress("bench overhead", len(LAYER_COUNTS), "graph") as progress:
            for num_layers in LAYER_COUNTS:
                progress.doing(f"{num_layers} layers")
                _measure(num_layers, recorder, args.max_load)
                progress.update()
                progress.done(f"{num_layers} layers")
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(quantities(recorder.results))
    return status or recorder.status()


def _measure(num_layers: int, recorder: Recorder, max_load: float) -> None:
    name = f"overhead/{num_layers} layers"

    def passes() -> list[Result]:
        seconds, facts = passes_seconds(num_layers)
        return [Result(f"{name}/passes", "quest", seconds, facts)]

    def state() -> list[Result]:
        times, facts = state_seconds(num_layers)
        return [
            Result(f"{name}/a step with {what}", "quest", values, dict(facts))
            for what, values in times.items()
        ]

    for measured, measure in ((f"{name}/passes", passes), (f"{name}/a step with state", state)):
        if recorder.has(measured):
            continue
        meter = LoadMeter()
        try:
            results = measure()
        except RefusedError as error:
            recorder.refuse(measured, error)
            continue
        facts = {"device": "cpu", "threads": torch.get_num_threads()}
        facts |= load_facts(meter, max_load)
        for result in results:
            result.metadata |= facts
        recorder.add(results)
