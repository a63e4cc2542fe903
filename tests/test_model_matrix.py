"""Every family of families.json decodes what it decodes uncompiled, and the report says how.

Decoded at a budget that covers the context, over a static cache that is larger, so that the sparse
operator runs. tests/snapshots/ has the report of every family for each transformers version;
QUEST_COMPILE_SNAPSHOTS=write rewrites the one of the version at hand, for review.
"""

import dataclasses
import functools
import json
import os
import pathlib

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import step_inputs
from quest_compile.report import Report

PROMPT_LENGTH, NUM_NEW_TOKENS, MAX_SEQ_LEN = 100, 12, 256
SETTINGS = SHORT | {"budget": 128, "inner": "eager"}
# Rounding moves the logits by up to 4e-6 of the largest; one page left out, by 1e-2 and more.
LOGIT_TOLERANCE = 1e-4
# transformers 4 knows fewer families, makes other graphs while a window fills, and no static cache
# that is longer than the call needs: there only the tokens of a direct call are compared.
VERSION = int(transformers.__version__.split(".")[0])
IS_TRANSFORMERS_4 = VERSION < 5
SNAPSHOT = pathlib.Path(__file__).parent / "snapshots" / f"{transformers.__version__}.json"
IS_WRITING = os.environ.get("QUEST_COMPILE_SNAPSHOTS") == "write"

PRESENT = [
    name
    for name, line in FAMILIES.items()
    if hasattr(transformers, line.model) and line.since <= VERSION
]
GENERATING = [
    pytest.param(name, marks=[] if FAMILIES[name].generate == "always" else pytest.mark.nightly)
    for name in PRESENT
    if FAMILIES[name].generate != "never" and not IS_TRANSFORMERS_4
]


@dataclasses.dataclass
class Run:
    tokens: list[int]
    logits: torch.Tensor | None
    report: Report
    counters: dict[str, int]

    def graphs(self):
        """What every attention call became, one list per graph; graphs that are alike are one."""
        graphs = {tuple(map(_describe, graph.rows)): None for graph in self.report.graphs}
        return [list(graph) for graph in graphs if graph]

    def calls(self):
        return sorted(call for graph in self.graphs() for call in graph)


def _describe(row):
    return f"{row.layer} {row.treatment.value} {row.reason.name} {row.attention}"


def _model(family):
    model = tiny_model(family)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, 0 if name == "pad_token_id" else None)
    return model


@functools.cache
def eager(family):
    """Tokens and logits of the uncompiled model with its default cache."""
    return _generate(_model(family))


def _generate(model, **settings):
    prompt = random_prompt(1, PROMPT_LENGTH)
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    return out.sequences[0, PROMPT_LENGTH:].tolist(), torch.cat(out.logits)


@functools.cache
def direct(family):
    """Prefill eagerly, then decode by calls of the compiled model."""
    line, model = FAMILIES[family], _model(family)
    torch._dynamo.reset()
    ops.reset_counters()
    backend = QuestBackend(QuestConfig(**SETTINGS))
    call, step = model, torch.compile(model, backend=backend)
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    tokens, position, logits = random_prompt(1, PROMPT_LENGTH), 0, []
    with torch.no_grad():
        for _ in range(NUM_NEW_TOKENS):
            inputs = step_inputs(cache, tokens, position)
            end = position + tokens.shape[1]
            if line.full_mask:
                inputs["attention_mask"] = (torch.arange(MAX_SEQ_LEN) < end).long()[None]
            if line.positions:
                inputs["position_ids"] = torch.arange(position, end)[None]
            logits.append(call(**inputs).logits[:, -1])
            call, position, tokens = step, end, logits[-1].argmax(-1)[:, None]
    tokens = [int(step_logits.argmax()) for step_logits in logits]
    return Run(tokens, torch.cat(logits), backend.report(), ops.counters())


@functools.cache
def generated(family):
    model = _model(family)
    torch._dynamo.reset()
    ops.reset_counters()
    quest_compile.compile_for_generate(model, **SETTINGS)
    tokens, logits = _generate(model, max_cache_len=MAX_SEQ_LEN)
    return Run(tokens, logits, quest_compile.backend(**SETTINGS).report(), ops.counters())


def _check_tokens(run, family):
    tokens, logits = eager(family)
    assert run.tokens == tokens
    assert (run.logits - logits).abs().max() <= LOGIT_TOLERANCE * logits.abs().max()


def _check_counters(run, calls):
    """The operators ran as often as the report says."""
    num_steps = NUM_NEW_TOKENS - 1
    num_sparse = sum("quest::sparse_decode" in call for call in calls)
    num_dense = sum("quest::dense_decode" in call for call in calls)
    assert run.counters["sparse_calls"] == 0
    assert run.counters["sparse_calls_covered"] == num_steps * num_sparse
    assert run.counters["dense_calls"] == num_steps * num_dense


def _check_text(run):
    """Who reads the report learns why a call is not sparse, or that there is none."""
    text = str(run.report)
    for row in run.report.rows:
        assert row.reason.value in text
    if not run.report.rows:
        assert "No attention call was found" in text or "no graph was compiled" in text
    elif not run.report.count("sparse"):
        # In transformers 4, keys computed from a cache do not look like it.
        assert "No attention call is sparse" in text or IS_TRANSFORMERS_4


@pytest.mark.parametrize("family", PRESENT)
def test_a_direct_call_decodes_what_the_uncompiled_model_does(family):
    run = direct(family)
    _check_tokens(run, family)
    _check_counters(run, run.calls())
    _check_text(run)


@pytest.mark.parametrize("family", [] if IS_TRANSFORMERS_4 else PRESENT)
def test_the_report_is_the_one_on_record(family):
    found = {
        "attention": _model(family).config._attn_implementation,
        "graphs": direct(family).graphs(),
    }
    if IS_WRITING:
        _write_snapshot(family, found)
    assert json.loads(SNAPSHOT.read_text()).get(family) == found


@pytest.mark.parametrize("family", GENERATING)
def test_generate_decodes_the_same_with_the_same_calls(family):
    run = generated(family)
    _check_tokens(run, family)
    _check_counters(run, run.calls())
    _check_text(run)
    assert run.calls() == direct(family).calls()


def _write_snapshot(family, found):
    lines = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    lines = {name: line for name, line in lines.items() if name in PRESENT} | {family: found}
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(lines[name])}" for name in sorted(lines))
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(f"{{\n{text}\n}}\n")
