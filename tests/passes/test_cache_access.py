"""Reads of a cache that are no more than the cache itself, and operands that are more."""

import pytest
import torch
from passes_layers import capture, enable_gqa_layer, inputs, repeat_kv
from torch.nn.functional import scaled_dot_product_attention as sdpa

from quest_compile.config import QuestConfig
from quest_compile.passes import Treatment, run_passes
from quest_compile.passes.match_attention import match_attention
from quest_compile.passes.reasons import Reason


def written(read):
    """A layer that writes its caches, then attends ``read(cache)``."""

    def layer(query, key, value, key_cache, value_cache, position, mask):
        key_cache.index_copy_(2, position, key)
        value_cache.index_copy_(2, position, value)
        return sdpa(query, read(key_cache), read(value_cache), mask)

    return layer


def attended_before_write(read):
    """A layer that attends what ``read(cache)`` was before the new keys came."""

    def layer(query, key, value, key_cache, value_cache, position, mask):
        keys, values = read(key_cache), read(value_cache)
        key_cache.index_copy_(2, position, key)
        value_cache.index_copy_(2, position, value)
        return sdpa(query, keys, values, mask, enable_gqa=True)

    return layer


def edited(edit):
    """A site, but for what ``edit(key_cache)`` does."""

    def layer(query, key, value, key_cache, value_cache, position, mask):
        edit(key_cache)
        return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)

    return layer


def two_layers_share_a_cache(query, key, value, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    first = sdpa(query, repeat_kv(key_cache, 2), repeat_kv(value_cache, 2), mask)
    keys, values = key_cache.to("cpu"), value_cache.to("cpu")
    return first + sdpa(query.tanh(), repeat_kv(keys, 2), repeat_kv(values, 2), mask)


def latent_attention(query, key, value, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    latent = key_cache.flatten(0, 1).matmul(torch.eye(16)).view(2, 2, 64, 16)
    keys = latent.new_empty(2, 2, 64, 16)
    keys[..., :8].copy_(latent[..., :8])
    keys[..., 8:].copy_(value_cache[..., :8])
    return sdpa(query, keys, latent, mask, enable_gqa=True)


def match(layer, *args):
    gm, _ = capture(torch.no_grad()(layer), *args)
    return match_attention(gm.graph)


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: repeat_kv(cache.to("cpu"), 2),
        lambda cache: repeat_kv(cache.to(torch.float32), 2),
        lambda cache: repeat_kv(cache, 2).contiguous(),
        lambda cache: cache.to(device="cpu").repeat_interleave(2, dim=1),
    ],
)
def test_a_conversion_that_changes_nothing_is_a_read(read):
    (call,) = match(written(read), *inputs())
    assert call.reason is None


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: repeat_kv(cache.to(torch.float64).to(torch.float32), 2),
        lambda cache: repeat_kv(cache * 0.5, 2),
        lambda cache: repeat_kv(cache.roll(1, 2), 2),
    ],
)
def test_keys_made_from_a_cache_are_not_the_cache(read):
    (call,) = match(written(read), *inputs())
    assert call.reason is Reason.COMPUTED_FROM_CACHE


def test_latent_attention_is_not_taken_for_a_new_cache():
    (call,) = match(latent_attention, *inputs())
    assert call.reason is Reason.COMPUTED_FROM_CACHE


@pytest.mark.parametrize(
    "read", [lambda cache: cache.to("cpu", copy=True), lambda cache: cache.contiguous()]
)
def test_a_copy_taken_before_the_write_is_a_reason(read):
    (call,) = match(attended_before_write(read), *inputs())
    assert call.reason is Reason.READ_BEFORE_WRITE


@pytest.mark.parametrize(
    "edit",
    [
        lambda cache: cache.to("cpu").mul_(2),
        lambda cache: cache.to("cpu")[:, :, :4].zero_(),
        lambda cache: cache.contiguous().to(torch.float32).add_(1),
    ],
)
def test_a_write_through_a_conversion_is_found(edit):
    (call,) = match(edited(edit), *inputs())
    assert call.reason is Reason.UNKNOWN_CACHE_WRITE


def test_a_layer_that_shares_a_cache_has_the_number_of_its_module():
    class Layer(torch.nn.Module):
        def forward(self, query, key_cache, value_cache, mask):
            return sdpa(query, key_cache, value_cache, mask, enable_gqa=True)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(8))

        def forward(self, query, key, value, caches, position, mask):
            caches[4][0].index_copy_(2, position, key)
            caches[4][1].index_copy_(2, position, value)
            return self.layers[7](self.layers[4](query, *caches[4], mask), *caches[4], mask)

    query, key, value, *caches, position, mask = inputs()
    of_layers = [[cache.clone() for cache in caches] for _ in range(5)]
    calls = match(Model(), query, key, value, of_layers, position, mask)
    assert [call.layer for call in calls] == [4, 7]


def test_a_layer_that_says_nowhere_which_it_is_has_no_number():
    """The number in ``kv[0]`` and ``kv[1]`` tells keys from values."""

    def layer(query, key, value, kv, position, mask):
        return enable_gqa_layer(query, key, value, *kv, position, mask)

    query, key, value, *kv, position, mask = inputs()
    (call,) = match(layer, query, key, value, kv, position, mask)
    assert call.layer is None


def test_one_kv_head_is_broadcast_without_being_repeated():
    def multi_query_layer(query, key, value, key_cache, value_cache, position, mask):
        key_cache.index_copy_(2, position, key)
        value_cache.index_copy_(2, position, value)
        return sdpa(query, key_cache, value_cache, mask)

    (call,) = match(multi_query_layer, *inputs(num_kv_heads=1))
    assert call.reason is None
    with torch.no_grad():
        arguments = inputs(position=40, num_kv_heads=1)
        expected = multi_query_layer(*[a.clone() for a in arguments])
        gm, example_inputs = capture(multi_query_layer, *[a.clone() for a in arguments])
        rewritten = run_passes(gm, config=QuestConfig(budget=48, num_dense_layers=0))
        state = [torch.zeros(v.shape, dtype=v.dtype) for v in rewritten.state_values()]
        (out,) = rewritten.gm(*example_inputs, *state)
    assert rewritten.decisions[0].treatment is Treatment.SPARSE
    torch.testing.assert_close(out, expected)


def test_a_shared_cache_has_one_summary_and_every_call_reads_it():
    with torch.no_grad():
        arguments = inputs(position=40)
        expected = two_layers_share_a_cache(*[a.clone() for a in arguments])
        gm, example_inputs = capture(two_layers_share_a_cache, *[a.clone() for a in arguments])
        rewritten = run_passes(gm, config=QuestConfig(budget=48, num_dense_layers=0))
        assert len(rewritten.summaries) == 1
        targets = [node.target for node in rewritten.gm.graph.nodes]
        assert targets.count(torch.ops.quest.update_page_summary.default) == 1
        assert targets.count(torch.ops.quest.sparse_decode.default) == 2
        state = [torch.zeros(v.shape, dtype=v.dtype) for v in rewritten.state_values()]
        (out,) = rewritten.gm(*example_inputs, *state)
    torch.testing.assert_close(out, expected)
