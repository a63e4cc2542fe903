"""What each rank of test_tensor_parallel.py runs: torchrun ... FOLDER_OF_MODEL FOLDER_OF_RESULTS.

``decode_all`` is also what the single process runs.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tiny_models import SHORT, random_prompt

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill

LENGTH, NUM_NEW_TOKENS, MAX_SEQ_LEN = 200, 8, 512


def decode_all(model):
    """Name of a way to decode -> what came out of it."""
    results = {"dense": {"tokens": _decode(model, model)}}
    for name, budget, inner in (("covering", 256, "eager"), ("sparse", 64, "aot_eager")):
        backend = quest_compile.backend(**SHORT, budget=budget, inner=inner)
        step = torch.compile(model, backend=backend, fullgraph=True)
        results[name] = _measured(backend, lambda step=step: _decode(step, model))
    settings = SHORT | {"budget": 80, "inner": "eager"}
    quest_compile.compile_for_generate(model, **settings)
    quest_compile.warmup(model, MAX_SEQ_LEN)
    results["generate"] = _measured(
        quest_compile.backend(**settings),
        lambda: _new_tokens(
            model.generate(_prompt(), max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        ),
    )
    return results


def _measured(backend, decode):
    ops.reset_counters()
    tokens = decode()
    graphs = backend.report().graphs
    return {
        "tokens": tokens,
        "treatments": [[row.treatment.value for row in graph.rows] for graph in graphs],
        **ops.counters(),
    }


def _prompt():
    return random_prompt(1, LENGTH)


def _new_tokens(tokens):
    return tokens[0, LENGTH:].tolist()


def _decode(step, model):
    prompt = _prompt()
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        tokens = [prompt]
        for i in range(NUM_NEW_TOKENS):
            tokens.append(greedy_step(step, cache, tokens[-1][:, -1:], LENGTH - 1 + i))
    return _new_tokens(torch.cat(tokens, 1))


def main(folder, results):
    from transformers.distributed import DistributedConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    rank = torch.distributed.get_rank()
    found = decode_all(model)
    found["num_local_parameters"] = model.model.layers[0].self_attn.k_proj.weight.to_local().numel()
    Path(results, f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
