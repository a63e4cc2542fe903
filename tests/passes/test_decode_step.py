"""Where an operator costs a launch, update and decode are one: quest::sparse_decode_step."""

import pytest
import torch
from passes_layers import SUPPORTED, capture, enable_gqa_layer, inputs, transformers_layer
from test_rewrite import QUEST, SPARSE, count, rewrite, run
from tiny_models import random_prompt, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import quest_compile
from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill
from quest_compile.passes import AttentionCall, AttentionSite, decide, run_passes


@pytest.fixture
def fuses_on_cpu(monkeypatch):
    monkeypatch.setattr(decide, "_STEP_DEVICES", frozenset({"cpu"}))


def shared_cache_layer(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    """Two attention calls over one cache, as in models whose layers share it."""
    arguments = (key_cache, value_cache, cache_position, attn_mask)
    first = transformers_layer(query, key, value, *arguments)
    keys, values = key_cache.repeat_interleave(2, 1), value_cache.repeat_interleave(2, 1)
    return torch.nn.functional.scaled_dot_product_attention(first, keys, values, attn_mask)


@pytest.mark.parametrize("layer", SUPPORTED)
@pytest.mark.parametrize("q_len", [1, 8])
def test_decode_becomes_one_operator(layer, q_len, fuses_on_cpu):
    _, _, rewritten = rewrite(layer, *inputs(q_len))
    gm = rewritten.gm
    assert count(gm, QUEST.sparse_decode_step.default) == 1
    assert count(gm, QUEST.sparse_decode.default) == 0
    assert count(gm, QUEST.update_page_summary.default) == 0
    (decision,) = rewritten.decisions
    assert decision.updates_summary


@pytest.mark.parametrize("layer", [*SUPPORTED, shared_cache_layer])
@pytest.mark.parametrize("q_len", [1, 5])
def test_same_bits_as_two_operators(layer, q_len, monkeypatch):
    outs = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(decide, "_STEP_DEVICES", frozenset(devices))
        _, example_inputs, rewritten = rewrite(layer, *inputs(q_len, position=57))
        (out,) = run(rewritten, example_inputs)
        outs.append(out)
    assert torch.equal(*outs)


def test_first_reader_of_a_shared_cache_updates_it(fuses_on_cpu):
    _, _, rewritten = rewrite(shared_cache_layer, *inputs())
    assert [d.updates_summary for d in rewritten.decisions] == [True, False]
    targets = [n.target for n in rewritten.gm.graph.nodes if n.op == "call_function"]
    step, decode = QUEST.sparse_decode_step.default, QUEST.sparse_decode.default
    assert targets.count(step) == targets.count(decode) == 1
    assert targets.index(step) < targets.index(decode)
    assert count(rewritten.gm, QUEST.update_page_summary.default) == 0


def test_prefill_keeps_the_update(fuses_on_cpu):
    _, _, rewritten = rewrite(enable_gqa_layer, *inputs(q_len=9))
    assert count(rewritten.gm, QUEST.update_page_summary.default) == 1
    assert count(rewritten.gm, QUEST.sparse_decode_step.default) == 0


def test_int32_positions_are_widened(fuses_on_cpu):
    *tensors, position, mask = inputs()
    _, _, rewritten = rewrite(gpt_fast_int32, *tensors, position.int(), mask)
    (step,) = rewritten.gm.graph.find_nodes(
        op="call_function", target=QUEST.sparse_decode_step.default
    )
    assert step.args[3].target == "long"


def gpt_fast_int32(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    key_cache[:, :, cache_position] = key
    value_cache[:, :, cache_position] = value
    return torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, attn_mask, enable_gqa=True
    )


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_model_decodes_the_same_tokens(inner, fuses_on_cpu):
    model, length = tiny_model("llama"), 300
    prompt = random_prompt(2, length)

    def decode(step):
        cache, tokens = prefill(model, prompt[:, :-1], 512), [prompt[:, -1:]]
        with torch.no_grad():
            for i in range(12):
                tokens.append(greedy_step(step, cache, tokens[-1], length - 1 + i))
        return torch.cat(tokens[1:], 1)

    torch._dynamo.reset()
    backend = quest_compile.backend(budget=512 - 16, num_dense_layers=1, inner=inner)
    ops.reset_counters()
    tokens = decode(torch.compile(model, backend=backend))
    assert torch.equal(tokens, decode(model))
    attention = [row.attention for row in backend.report().rows]
    num_sparse = backend.report().count("sparse")
    assert num_sparse and attention.count("quest::sparse_decode_step") == num_sparse
    counts = ops.counters()
    assert counts["update_calls"] == 12 * num_sparse
    assert counts["sparse_calls"] + counts["sparse_calls_covered"] == 12 * num_sparse


def cuda_call(layer, max_seq_len):
    """A decode call over a cache on a (fake) CUDA device."""
    graph = torch.fx.Graph()
    key_cache = graph.placeholder("key_cache")
    with FakeTensorMode():
        key_cache.meta["example_value"] = torch.empty(1, 2, max_seq_len, 64, device="cuda")
    site = AttentionSite(
        None, key_cache, key_cache, key_cache, key_cache, None, None, q_len=1, unfit=None
    )
    return AttentionCall(key_cache, layer, "", 1, site, None)


@pytest.mark.parametrize("provider", ["native", "triton", "torch"])
def test_cuda_dense_layers_use_the_kernels_there_are(provider, monkeypatch):
    monkeypatch.setattr(ops, "provider_of", lambda name: provider)
    dense, covered, sparse = decide.decide(
        [cuda_call(0, 4096), cuda_call(2, 2048), cuda_call(2, 4096)], QuestConfig()
    )
    assert sparse.updates_summary and not dense.updates_summary
    operator = "" if provider == "torch" else "dense_decode"
    assert dense.operator == covered.operator == operator


def test_unfused_by_default_on_a_cpu():
    gm, _ = capture(transformers_layer, *inputs())
    with torch.no_grad():
        (decision,) = run_passes(gm, config=SPARSE).decisions
    assert not decision.updates_summary
