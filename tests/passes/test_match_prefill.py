"""Attention calls with many queries: what becomes quest::dense_prefill, and that it is the same."""

import pytest
import torch
from passes_layers import (
    MAX_SEQ_LEN,
    SUPPORTED,
    capture,
    enable_gqa_layer,
    inputs,
    repeat_kv,
    transformers_layer,
)
from torch.nn.functional import scaled_dot_product_attention as sdpa

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.passes import Reason, Treatment, run_passes

DENSE = QuestConfig(budget=48, num_dense_layers=0, prefill="dense")
PREFILL = torch.ops.quest.dense_prefill.default

pytestmark = pytest.mark.skipif(
    not ops.native_status().loaded, reason="plain torch serves: prefill stays with SDPA"
)


def rewrite(layer, arguments, config=DENSE):
    with torch.no_grad():
        gm, example_inputs = capture(layer, *[a.clone() for a in arguments])
        return run_passes(gm, config=config), example_inputs


def count(rewritten, target):
    return sum(node.target == target for node in rewritten.gm.graph.nodes)


def assert_same(layer, arguments, config=DENSE):
    """It is rewritten, once, and computes what it did."""
    arguments = [a for a in arguments]
    expected = layer(*[a.clone() for a in arguments])
    rewritten, example_inputs = rewrite(layer, arguments, config)
    assert count(rewritten, PREFILL) == 1 and count(rewritten, sdpa) == 0
    # Tracing ran the layer once on these; writing the same keys twice changes nothing.
    state = [torch.zeros(v.shape, dtype=v.dtype) for v in rewritten.state_values()]
    (out,) = rewritten.gm(*example_inputs, *state)
    torch.testing.assert_close(out, expected)
    (decision,) = rewritten.decisions
    assert decision.treatment is Treatment.DENSE
    return decision, rewritten


@pytest.mark.parametrize("position", [0, 20])
@pytest.mark.parametrize("layer", SUPPORTED)
def test_over_a_static_cache(layer, position):
    decision, rewritten = assert_same(layer, inputs(24, position))
    assert decision.reason is Reason.PREFILL
    assert count(rewritten, torch.ops.quest.update_page_summary.default) == 1
    assert not [n for n in rewritten.gm.graph.nodes if n.target in ("expand", "reshape")][1:]


def created_layer(query, key, value, key_cache, value_cache, position, attn_mask):
    shape = (*key.shape[:2], MAX_SEQ_LEN, key.shape[3])
    caches = [torch.zeros(shape).index_copy_(2, position, x) for x in (key, value)]
    return sdpa(query, repeat_kv(caches[0], 2), repeat_kv(caches[1], 2), attn_mask)


def dynamic_layer(query, key, value, key_cache, value_cache, position, attn_mask):
    keys, values = torch.cat([key_cache, key], 2), torch.cat([value_cache, value], 2)
    mask = torch.cat([torch.ones_like(attn_mask), attn_mask[..., 20 : 20 + key.shape[2]]], -1)
    return sdpa(query, repeat_kv(keys, 2), repeat_kv(values, 2), mask)


def causal_layer(query, key, value, key_cache, value_cache, position, attn_mask):
    return sdpa(query, key, value, is_causal=True, enable_gqa=True)


def causal_cache_layer(query, key, value, key_cache, value_cache, position, attn_mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    return sdpa(query, key_cache, value_cache, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("layer", [created_layer, dynamic_layer, causal_layer])
def test_over_anything_else(layer):
    decision, _ = assert_same(layer, inputs(24))
    assert decision.reason is Reason.PREFILL_ALONE


@pytest.mark.parametrize("position", [0, 20])
def test_is_causal_counts_from_the_first_key_wherever_the_queries_stand(position):
    assert_same(causal_cache_layer, inputs(24, position))


def test_a_mask_that_allows_what_is_behind_a_query_is_honoured():
    """As the tokens of an image attend each other."""
    *others, mask = inputs(24)
    mask = mask.clone()
    mask[..., 20:30, 20:30] = True
    assert_same(transformers_layer, [*others, mask])


@pytest.mark.parametrize("kind", ["padding", "window", "heads"])
def test_any_mask(kind):
    *others, position, mask = inputs(24)
    columns = torch.arange(MAX_SEQ_LEN)
    if kind == "padding":
        mask = mask & (columns >= torch.tensor([[7], [25]]))[:, None, None]
    if kind == "window":
        mask = mask & (columns > position[:, None] - 5)
    if kind == "heads":
        mask = mask & (torch.rand(2, 4, 24, MAX_SEQ_LEN) < 0.7)
    live = mask.any(-1, keepdim=True)

    def layer(*arguments):
        return enable_gqa_layer(*arguments).where(live, 0)

    assert_same(layer, [*others, position, mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    arguments = inputs(24, dtype=dtype)
    rewritten, example_inputs = rewrite(transformers_layer, arguments)
    assert count(rewritten, PREFILL) == 1


def float_mask(*arguments):
    *others, mask = arguments
    return transformers_layer(*others, torch.zeros(mask.shape).masked_fill(~mask, -1e9))


def with_dropout(query, key, value, key_cache, value_cache, position, attn_mask):
    return sdpa(query, key, value, dropout_p=0.5, is_causal=True, enable_gqa=True)


def without_mask(query, key, value, key_cache, value_cache, position, attn_mask):
    return sdpa(query, key, value, enable_gqa=True)


def read_before_write(query, key, value, key_cache, value_cache, position, attn_mask):
    keys, values = repeat_kv(key_cache, 2), repeat_kv(value_cache, 2)
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    return sdpa(query, keys, values, attn_mask)


def flat_mask(query, key, value, key_cache, value_cache, position, attn_mask):
    return sdpa(query, key_cache, value_cache, attn_mask[0, 0], enable_gqa=True)


@pytest.mark.parametrize(
    "layer", [float_mask, with_dropout, without_mask, read_before_write, flat_mask]
)
def test_what_the_operator_cannot_take_stays(layer):
    rewritten, _ = rewrite(layer, inputs(24))
    assert count(rewritten, PREFILL) == 0 and count(rewritten, sdpa) == 1


def test_stays_with_sdpa_where_asked_and_where_gradients_are_wanted():
    arguments = inputs(24)
    sdpa_only = QuestConfig(budget=48, num_dense_layers=0, prefill="sdpa")
    assert count(rewrite(transformers_layer, arguments, sdpa_only)[0], PREFILL) == 0
    query, *others = arguments
    gm, _ = capture(causal_layer, query.requires_grad_(), *others)
    assert run_passes(gm, config=DENSE).gm is gm


@pytest.mark.parametrize("is_faster", [True, False])
def test_auto_takes_it_where_it_is_known_to_be_faster(is_faster, monkeypatch):
    monkeypatch.setattr(ops, "is_prefill_faster", lambda device, dtype: is_faster)
    auto = QuestConfig(budget=48, num_dense_layers=0)
    assert count(rewrite(transformers_layer, inputs(24), auto)[0], PREFILL) == is_faster


@pytest.mark.parametrize("q_len", [1, 8])
def test_few_queries_are_no_prefill(q_len):
    assert count(rewrite(transformers_layer, inputs(q_len))[0], PREFILL) == 0
    assert count(rewrite(causal_layer, inputs(q_len))[0], PREFILL) == 0


def test_layers_share_positions_and_mask():
    def two_layers(*arguments):
        return transformers_layer(*arguments) + created_layer(*arguments)

    rewritten, _ = rewrite(two_layers, inputs(24))
    assert count(rewritten, PREFILL) == 2
    first, second = (n for n in rewritten.gm.graph.nodes if n.target == PREFILL)
    assert first.args[3] is second.args[3] and first.args[4] is second.args[4]
