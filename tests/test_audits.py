"""backend(audit=N): inside the compiled graph, in the report, and nowhere when it is off."""

import dataclasses
import json

import pytest
import torch
from test_backend import LENGTH, MAX_SEQ_LEN, decode
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill
from quest_compile.passes import run_passes

CONFIG = QuestConfig(**SHORT, budget=64, inner="aot_eager")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def sparse_audits(backend):
    (graph,) = backend.report().graphs
    return [audit for row, audit in graph.audited_rows() if row.treatment.value == "sparse"]


def test_off_the_graph_is_the_same(model):
    codes = {}

    def keep(gm, example_inputs):
        for every in (0, 3):
            rewrite = run_passes(gm, config=dataclasses.replace(CONFIG, audit=every))
            names = [node.name for node in rewrite.gm.graph.nodes if "audit" in str(node)]
            codes[every] = ([str(node) for node in rewrite.gm.graph.nodes], names, rewrite)
        return gm.forward

    decode(torch.compile(model, backend=keep), model, steps=1)
    plain, audited = codes[0], codes[3]
    assert plain[1] == [] and plain[2].audits == []
    # An input and a call for each of the two sparse layers.
    assert len(audited[1]) == 4 and len(audited[2].audits) == 2
    assert [name for name in audited[0] if "audit" not in name] == plain[0]
    assert len(audited[2].state_values()) == len(plain[2].state_values()) + 2


@pytest.mark.parametrize("settings", [{"summary": "minmax"}, {"summary": "sketch"}], ids=str)
def test_audits_change_no_token_and_no_count(model, settings):
    found = {}
    for every in (0, 2):
        torch._dynamo.reset()
        ops.reset_counters()
        backend = quest_compile.backend(
            **SHORT, budget=64, inner="aot_eager", audit=every, max_q_len=7, **settings
        )
        tokens = decode(torch.compile(model, backend=backend), model, steps=5)
        found[every] = (tokens, ops.counters())
    assert found[0] == found[2]
    assert found[2][1]["sparse_calls"] == 2 * 5
    for audit in sparse_audits(backend):
        assert (audit.calls, audit.audited_calls, audit.queries) == (5, 3, 3 * 4)
        assert 0 < audit.kept_mass_min <= audit.kept_mass < 1
        assert 0 < audit.output_error <= audit.output_error_max
        assert 0 < audit.page_recall <= 1


def test_figures_are_columns_and_data(model):
    backend = quest_compile.backend(**SHORT, budget=64, inner="eager", audit=1)
    decode(torch.compile(model, backend=backend), model)
    text = str(backend.report())
    header = next(line for line in text.splitlines() if line.startswith("layer"))
    assert "audited  kept mass  output error  page recall" in header
    rows = json.loads(json.dumps(backend.report().as_dict()))["graphs"][0]["rows"]
    assert [row["audit"] is None for row in rows] == [True, True, False, False]
    assert rows[2]["audit"]["audited_calls"] == 3
    assert f"{rows[2]['audit']['kept_mass']:.4f}" in text
    decode(
        torch.compile(model, backend=quest_compile.backend(**SHORT, budget=64, inner="eager")),
        model,
    )
    assert "kept mass" not in str(quest_compile.backend(**SHORT, budget=64, inner="eager").report())


def test_a_larger_budget_keeps_more(model):
    kept = []
    for budget in (48, 96, 176):
        torch._dynamo.reset()
        backend = quest_compile.backend(**SHORT, budget=budget, inner="eager", audit=1)
        decode(torch.compile(model, backend=backend), model)
        kept.append([audit.kept_mass for audit in sparse_audits(backend)])
    assert all(few < some < many for few, some, many in zip(*kept))


def test_a_budget_that_covers_the_context_has_nothing_to_audit(model):
    backend = quest_compile.backend(**SHORT, budget=256, inner="eager", audit=1)
    decode(torch.compile(model, backend=backend), model)
    for audit in sparse_audits(backend):
        assert (audit.audited_calls, audit.queries, audit.kept_mass) == (3, 0, None)


def test_drafts_are_audited(model):
    backend = quest_compile.backend(**SHORT, budget=64, inner="aot_eager", audit=1)
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-5], MAX_SEQ_LEN)
        greedy_step(step, cache, prompt[:, -5:], LENGTH - 5)
    assert ops.counters()["sparse_calls"] == 2
    assert [audit.queries for audit in sparse_audits(backend)] == [5 * 4] * 2


def test_through_generate():
    model = tiny_model("llama")
    settings = SHORT | {"budget": 64, "inner": "aot_eager", "audit": 4}
    quest_compile.compile_for_generate(model, **settings)
    with torch.inference_mode():
        model.generate(random_prompt(1, LENGTH), max_new_tokens=10, min_new_tokens=10)
    assert ops.counters()["sparse_calls"] > 0
    graphs = quest_compile.backend(**settings).report().graphs
    audits = [a for g in graphs if g.is_decode for _, a in g.audited_rows() if a is not None]
    assert len(audits) == 2
    assert all(a.audited_calls == -(-a.calls // 4) >= 2 for a in audits)
    assert all(0 < a.kept_mass < 1 for a in audits)


@pytest.mark.inductor
def test_inductor_keeps_the_audits(model):
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        backend = quest_compile.backend(**SHORT, budget=64, inner=inner, audit=2)
        decode(torch.compile(model, backend=backend), model)
        found.append(sparse_audits(backend))
    for eager, compiled in zip(*found, strict=True):
        assert compiled.audited_calls == eager.audited_calls == 2
        assert compiled.kept_mass == pytest.approx(eager.kept_mass, rel=1e-3)
        assert compiled.output_error == pytest.approx(eager.output_error, rel=1e-2)


@pytest.mark.parametrize("value", [-1, True, 1.5, "2"])
def test_bad_settings_name_themselves(value):
    with pytest.raises((ValueError, TypeError), match="audit"):
        quest_compile.backend(audit=value)
