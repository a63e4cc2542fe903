"""The rewritten graph: what is in it, what is not, and that it computes the same."""

import operator

import pytest
import torch
from passes_layers import SUPPORTED, capture, enable_gqa_layer, inputs, transformers_layer

from quest_compile.config import QuestConfig
from quest_compile.passes import Reason, Treatment, run_passes

SPARSE = QuestConfig(budget=48, num_dense_layers=0, prefill="sdpa")
QUEST = torch.ops.quest


def rewrite(function, *args, config=SPARSE):
    with torch.no_grad():
        gm, example_inputs = capture(function, *args)
        return gm, example_inputs, run_passes(gm, config=config)


def count(gm, target):
    return sum(node.target == target for node in gm.graph.nodes)


def run(rewritten, example_inputs):
    """Run a rewritten graph on real tensors with zeroed state."""
    state = [torch.zeros(v.shape, dtype=v.dtype) for v in rewritten.state_values()]
    return rewritten.gm(*example_inputs, *state)


@pytest.mark.parametrize("layer", SUPPORTED)
@pytest.mark.parametrize("q_len", [1, 2, 8])
def test_decode_becomes_update_and_sparse_decode(layer, q_len):
    _, example_inputs, rewritten = rewrite(layer, *inputs(q_len))
    gm = rewritten.gm
    assert count(gm, QUEST.sparse_decode.default) == 1
    assert count(gm, QUEST.update_page_summary.default) == 1
    assert count(gm, torch.nn.functional.scaled_dot_product_attention) == 0
    assert not [n for n in gm.graph.nodes if n.target in ("expand", "reshape", "flatten")]
    (decision,) = rewritten.decisions
    assert decision.treatment is Treatment.SPARSE


@pytest.mark.parametrize("layer", SUPPORTED)
@pytest.mark.parametrize("q_len", [1, 5])
def test_same_numbers_while_the_budget_covers_the_context(layer, q_len):
    arguments = inputs(q_len, position=40)
    expected = layer(*[a.clone() for a in arguments])
    again = [a.clone() for a in arguments]
    _, example_inputs, rewritten = rewrite(layer, *again)
    # Tracing ran the layer once on ``again``; writing the same keys twice changes nothing.
    (out,) = run(rewritten, example_inputs)
    torch.testing.assert_close(out, expected)


def mask_edited_in_place(query, key, value, key_cache, value_cache, position, attn_mask):
    mask = attn_mask.clone()
    first = enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)
    mask[:, :, :, :16] = False
    return first + torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, mask, enable_gqa=True
    )


def int32_positions(query, key, value, key_cache, value_cache, position, attn_mask):
    position = position.int()
    key_cache[:, :, position] = key
    value_cache[:, :, position] = value
    return torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, attn_mask, enable_gqa=True
    )


@pytest.mark.parametrize("layer", [mask_edited_in_place, int32_positions])
def test_unusual_layers_compute_the_same(layer):
    arguments = inputs(position=40)
    expected = layer(*[a.clone() for a in arguments])
    again = [a.clone() for a in arguments]
    _, example_inputs, rewritten = rewrite(layer, *again)
    assert count(rewritten.gm, QUEST.sparse_decode.default) >= 1
    (out,) = run(rewritten, example_inputs)
    torch.testing.assert_close(out, expected)


def test_the_update_follows_the_write_and_comes_before_the_read():
    _, _, rewritten = rewrite(transformers_layer, *inputs())
    names = [str(n.target) for n in rewritten.gm.graph.nodes]
    assert (
        names.index("index_copy_")
        < names.index("quest.update_page_summary.default")
        < names.index("quest.sparse_decode.default")
    )


def test_dynamos_graph_is_not_edited():
    gm, _, rewritten = rewrite(transformers_layer, *inputs())
    assert rewritten.gm is not gm
    assert count(gm, torch.nn.functional.scaled_dot_product_attention) == 1
    assert len(list(rewritten.gm.graph.find_nodes(op="placeholder"))) == 2 + len(
        list(gm.graph.find_nodes(op="placeholder"))
    )


def test_a_graph_with_nothing_to_rewrite_comes_back_as_it_was():
    gm, _, rewritten = rewrite(lambda x: x + 1, torch.ones(3))
    assert rewritten.gm is gm
    assert rewritten.state_values() == []


def test_prefill_updates_the_summaries():
    _, _, rewritten = rewrite(transformers_layer, *inputs(q_len=9))
    assert_is_prefill(rewritten)


def assert_is_prefill(rewritten, reason=Reason.PREFILL):
    assert count(rewritten.gm, torch.nn.functional.scaled_dot_product_attention) == 1
    assert count(rewritten.gm, QUEST.update_page_summary.default) == 1
    (decision,) = rewritten.decisions
    assert (decision.treatment, decision.reason) == (Treatment.DENSE, reason)


def test_max_q_len_says_what_a_prefill_is():
    config = QuestConfig(budget=48, num_dense_layers=0, max_q_len=4, prefill="sdpa")
    assert_is_prefill(rewrite(transformers_layer, *inputs(q_len=5), config=config)[2])
    _, _, rewritten = rewrite(transformers_layer, *inputs(q_len=4), config=config)
    assert rewritten.decisions[0].treatment is Treatment.SPARSE


def causal_layer(query, key, value, key_cache, value_cache, position, mask):
    key_cache[:, :, position] = key
    value_cache[:, :, position] = value
    return torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, is_causal=True, enable_gqa=True
    )


def biased_layer(query, key, value, key_cache, value_cache, position, mask):
    return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask.float())


def unmasked_layer(query, key, value, key_cache, value_cache, position, mask):
    return enable_gqa_layer(query, key, value, key_cache, value_cache, position, None)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (causal_layer, Reason.PREFILL),
        (biased_layer, Reason.MASK_DTYPE),
        (unmasked_layer, Reason.NO_MASK),
    ],
)
def test_few_queries_whose_mask_does_not_tell_what_each_attends_say_so(layer, reason):
    assert_is_prefill(rewrite(layer, *inputs(q_len=5))[2], reason)
    assert_is_prefill(rewrite(layer, *inputs(q_len=9))[2])


def viewing_layer(*args):
    out = transformers_layer(*args)
    return out.transpose(1, 2).view(out.shape[0], out.shape[2], -1)


@pytest.mark.parametrize("q_len", [1, 5])
def test_the_result_has_the_layout_that_models_view(q_len):
    arguments = inputs(q_len, position=40)
    projected = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (projected, *arguments[1:])
    expected = viewing_layer(*[a.clone() for a in arguments])
    _, example_inputs, rewritten = rewrite(viewing_layer, *[a.clone() for a in arguments])
    (out,) = run(rewritten, example_inputs)
    torch.testing.assert_close(out, expected)


def test_several_queries_count_from_the_last_position():
    _, _, rewritten = rewrite(shared_cache_layers, *inputs(q_len=3))
    assert count(rewritten.gm, torch.amax) == 1
    assert count(rewritten.gm, operator.add) == 1


def test_added_inputs_look_like_static_buffers():
    _, _, rewritten = rewrite(transformers_layer, *inputs())
    (summary,) = rewritten.summaries
    # Rows of 16 tokens and 16 channels: 64 bytes of signs, 16 of a mean, 36 of scales, 64 of bits.
    assert rewritten.state_values()[0].shape == (2, 2, 4, 192)
    for node in (summary.page_summary, summary.num_sealed):
        assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
        assert node._dynamo_source is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QuestConfig(budget=48, num_dense_layers=1), Reason.UNKNOWN_LAYER),
        (QuestConfig(budget={0: 48}, num_dense_layers=0), Reason.UNKNOWN_LAYER),
        (QuestConfig(budget=64, num_dense_layers=0), Reason.BUDGET_COVERS_CACHE),
    ],
)
def test_dense_calls_run_dense_decode_without_a_summary(config, reason):
    _, _, rewritten = rewrite(transformers_layer, *inputs(), config=config)
    assert count(rewritten.gm, QUEST.dense_decode.default) == 1
    assert count(rewritten.gm, QUEST.update_page_summary.default) == 0
    assert rewritten.decisions[0].reason is reason


def shared_cache_layers(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    """KV sharing: one cache, written once, read by two layers; the mask is computed here."""
    mask = attn_mask & (torch.arange(64) >= 0)
    out = enable_gqa_layer(query, key, value, key_cache, value_cache, cache_position, mask)
    return torch.nn.functional.scaled_dot_product_attention(
        out, key_cache, value_cache, mask, enable_gqa=True
    )


def test_layers_share_state_length_and_mask():
    _, _, rewritten = rewrite(shared_cache_layers, *inputs())
    gm = rewritten.gm
    assert count(gm, QUEST.sparse_decode.default) == 2
    assert count(gm, QUEST.update_page_summary.default) == 1
    assert count(gm, QUEST.share_mask.default) == 1
    assert count(gm, operator.add) == 1
    masks = {n.args[5] for n in gm.graph.nodes if n.target == QUEST.sparse_decode.default}
    assert len(masks) == 1


def test_a_mask_that_is_an_input_is_used_as_it_is():
    _, _, rewritten = rewrite(transformers_layer, *inputs())
    assert count(rewritten.gm, QUEST.share_mask.default) == 0


def test_settings_reach_the_operator():
    config = QuestConfig(
        budget=48, num_dense_layers=0, page_size=8, group_reduce="none", summary="minmax"
    )
    _, _, rewritten = rewrite(transformers_layer, *inputs(), config=config)
    (node,) = [n for n in rewritten.gm.graph.nodes if n.target == QUEST.sparse_decode.default]
    assert node.kwargs["budget"] == 48
    assert node.kwargs["page_size"] == 8
    assert node.kwargs["group_reduce"] == "none"
    assert node.kwargs["summary"] == "minmax"
    assert node.kwargs["scale"] == 0.2
