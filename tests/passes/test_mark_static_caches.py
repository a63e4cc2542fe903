"""Caches a graph writes are inputs of fixed address, wherever they were created."""

import torch
from passes_layers import capture, inputs, transformers_layer

from quest_compile.config import QuestConfig
from quest_compile.passes import run_passes

CONFIG = QuestConfig(budget=48, num_dense_layers=0)


def counting_layer(query, key, value, key_cache, value_cache, length, attn_mask):
    """As transformers 5: the cache counts its tokens in a tensor."""
    position = torch.arange(1) + length
    length.add_(1)
    return transformers_layer(query, key, value, key_cache, value_cache, position, attn_mask)


def marked(gm):
    """The names of the inputs of a graph that are marked static."""
    return {
        node.name.removeprefix("l_").removesuffix("_")
        for node in gm.graph.find_nodes(op="placeholder")
        if node.meta["tensor_dict"].get("_dynamo_static_input_type") == "unguarded"
    }


def rewrite(layer, arguments, config=CONFIG):
    with torch.no_grad():
        gm, _ = capture(layer, *arguments)
        return gm, run_passes(gm, config=config)


def test_written_caches_and_their_counter_are_marked():
    *before, _, attn_mask = inputs()
    gm, rewritten = rewrite(counting_layer, (*before, torch.tensor(20), attn_mask))
    states = {"quest_0_page_summary", "quest_0_num_sealed"}
    assert marked(rewritten.gm) == {"key_cache", "value_cache", "length"} | states
    assert marked(gm) == set()


def test_positions_given_with_each_call_are_not_marked():
    _, rewritten = rewrite(transformers_layer, inputs())
    assert marked(rewritten.gm) >= {"key_cache", "value_cache"}
    assert "cache_position" not in marked(rewritten.gm)


def test_caches_of_dense_layers_and_of_prefill_are_marked_too():
    dense = QuestConfig(budget=48, num_dense_layers=1)
    for arguments, config in ((inputs(), dense), (inputs(q_len=12), CONFIG)):
        _, rewritten = rewrite(transformers_layer, arguments, config)
        assert marked(rewritten.gm) >= {"key_cache", "value_cache"}


def test_a_cache_without_a_known_write_is_not_marked():
    def written_twice(query, key, value, key_cache, value_cache, position, attn_mask):
        key_cache.index_copy_(2, position + 1, key)
        return transformers_layer(query, key, value, key_cache, value_cache, position, attn_mask)

    gm, rewritten = rewrite(written_twice, inputs())
    assert rewritten.gm is gm
    assert marked(gm) == set()
