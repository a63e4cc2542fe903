import operator

import pytest
import torch
from passes_layers import (
    SUPPORTED,
    capture,
    enable_gqa_layer,
    inputs,
    repeat_kv,
    transformers_layer,
)
from torch.nn.functional import scaled_dot_product_attention as sdpa

from quest_compile.passes.match_attention import match_attention
from quest_compile.passes.reasons import Reason


def match_one(function, *args):
    gm, _ = capture(function, *args)
    (call,) = match_attention(gm.graph)
    return gm, call


@pytest.mark.parametrize("layer", SUPPORTED)
@pytest.mark.parametrize("q_len", [1, 5])
def test_known_spellings_are_sites(layer, q_len):
    gm, call = match_one(torch.no_grad()(layer), *inputs(q_len))
    assert call.reason is None
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    example = [p.meta["example_value"].shape for p in placeholders]
    assert call.site.key_cache in placeholders and call.site.value_cache in placeholders
    assert call.site.key_cache is not call.site.value_cache
    assert call.site.key_cache.meta["example_value"].shape == (2, 2, 64, 16), example
    assert call.site.q_len == q_len
    assert call.site.unfit is None
    assert "layers.py" in call.source


def no_write(query, key, value, key_cache, value_cache, position, mask):
    return sdpa(query, repeat_kv(key_cache, 2), repeat_kv(value_cache, 2), mask)


def not_a_cache(query, key, value, key_cache, value_cache, position, mask):
    keys = torch.cat([key_cache[:, :, :-1], key], 2)
    values = torch.cat([value_cache[:, :, :-1], value], 2)
    return sdpa(query, keys, values, mask, enable_gqa=True)


def created_in_graph(query, key, value, key_cache, value_cache, position, mask):
    return enable_gqa_layer(
        query, key, value, torch.zeros(2, 2, 64, 16), torch.zeros(2, 2, 64, 16), position, mask
    )


def rolled(query, key, value, key_cache, value_cache, position, mask):
    key_cache.copy_(key_cache.roll(-1, 2))
    value_cache.copy_(value_cache.roll(-1, 2))
    return sdpa(query, key_cache, value_cache, mask, enable_gqa=True)


def written_through_a_view(query, key, value, key_cache, value_cache, position, mask):
    key_cache[:, :, 20:21].copy_(key)
    value_cache[:, :, 20:21].copy_(value)
    return sdpa(query, key_cache, value_cache, mask, enable_gqa=True)


def written_twice(query, key, value, key_cache, value_cache, position, mask):
    key_cache[:, :, 0] = 0.0
    return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)


def read_before_write(query, key, value, key_cache, value_cache, position, mask):
    keys, values = repeat_kv(key_cache, 2), repeat_kv(value_cache, 2)
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    return sdpa(query, keys, values, mask)


def sliced(query, key, value, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    return sdpa(
        query, key_cache[:, :, :32], value_cache[:, :, :32], mask[..., :32], enable_gqa=True
    )


def other_positions(query, key, value, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position - 1, value)
    return sdpa(query, key_cache, value_cache, mask, enable_gqa=True)


def with_cache(use):
    """A layer that is a site, but for what ``use(key_cache)`` does to its cache."""

    def layer(query, key, value, key_cache, value_cache, position, mask):
        use(key_cache)
        return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)

    return layer


def at_position(count):
    """A layer that is a site, but for its positions being ``count(position)``."""

    def layer(query, key, value, key_cache, value_cache, position, mask):
        position = count(position)
        return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)

    return layer


def several_keys_for_one_query(query, key, value, key_cache, value_cache, position, mask):
    position = torch.cat([position, position + 1])
    keys, values = torch.cat([key, key], 2), torch.cat([value, value], 2)
    return enable_gqa_layer(query, keys, values, key_cache, value_cache, position, mask)


def written_at_heads(query, key, value, key_cache, value_cache, position, mask):
    heads = torch.arange(2)
    key_cache[None, :, heads] = key[0, :, 0, :1, None]
    value_cache[None, :, heads] = value[0, :, 0, :1, None]
    return sdpa(query, key_cache, value_cache, mask, enable_gqa=True)


def autocast_layer(query, key, value, key_cache, value_cache, position, mask):
    with torch.autocast("cpu", torch.bfloat16):
        return enable_gqa_layer(query, key, value, key_cache, value_cache, position, mask)


def with_sdpa_arguments(**changes):
    def layer(query, key, value, key_cache, value_cache, position, mask):
        key_cache.index_copy_(2, position, key)
        value_cache.index_copy_(2, position, value)
        arguments = {"attn_mask": mask, "enable_gqa": True}
        for name, change in changes.items():
            arguments[name] = change(mask) if callable(change) else change
        return sdpa(query, key_cache, value_cache, **arguments)

    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (no_write, Reason.NO_CACHE_WRITE),
        (not_a_cache, Reason.NOT_A_CACHE),
        (created_in_graph, Reason.CACHE_CREATED_IN_GRAPH),
        (rolled, Reason.UNKNOWN_CACHE_WRITE),
        (written_through_a_view, Reason.UNKNOWN_CACHE_WRITE),
        (written_twice, Reason.SEVERAL_CACHE_WRITES),
        (read_before_write, Reason.READ_BEFORE_WRITE),
        (sliced, Reason.UNKNOWN_CACHE_READ),
        (with_cache(lambda c: c.split(1, 1)[0].mul_(2)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: c.unbind(1)[0].mul_(2)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: c.movedim(1, 2).mul_(2)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: torch.mul(c, 2, out=c)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: torch._foreach_mul_([c], 2)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: operator.imul(c, 2)), Reason.UNKNOWN_CACHE_USE),
        (with_cache(lambda c: c.mul_(2)), Reason.UNKNOWN_CACHE_WRITE),
        (at_position(lambda p: p % 64), Reason.UNKNOWN_POSITION),
        (at_position(lambda p: p.clamp(max=63)), Reason.UNKNOWN_POSITION),
        (at_position(lambda p: p.add_(20)), Reason.UNKNOWN_POSITION),
        (several_keys_for_one_query, Reason.UNKNOWN_POSITION),
        (written_at_heads, Reason.UNKNOWN_CACHE_WRITE),
        (autocast_layer, Reason.DTYPE),
        (other_positions, Reason.KEY_VALUE_MISMATCH),
        (with_sdpa_arguments(attn_mask=None), Reason.NO_MASK),
        (with_sdpa_arguments(attn_mask=None, is_causal=True), Reason.IS_CAUSAL),
        (with_sdpa_arguments(attn_mask=lambda m: m.float()), Reason.MASK_DTYPE),
        (with_sdpa_arguments(attn_mask=lambda m: m[0, 0]), Reason.MASK_SHAPE),
        (with_sdpa_arguments(dropout_p=0.1), Reason.DROPOUT),
    ],
)
def test_everything_else_is_left_with_its_reason(layer, reason):
    _, call = match_one(torch.no_grad()(layer), *inputs())
    assert call.site is None
    assert call.reason is reason


def test_a_cache_with_scattered_head_dim_is_a_reason():
    arguments = list(inputs())
    for i in (3, 4):
        arguments[i] = arguments[i].mT.contiguous().mT
    _, call = match_one(torch.no_grad()(enable_gqa_layer), *arguments)
    assert call.reason is Reason.LAYOUT


def test_arguments_may_be_passed_by_name():
    def layer(query, key, value, key_cache, value_cache, position, mask):
        key_cache.index_copy_(dim=2, index=position, source=key)
        value_cache.index_copy_(dim=2, index=position, source=value)
        keys = torch.repeat_interleave(key_cache, repeats=2, dim=1)
        values = torch.repeat_interleave(value_cache, repeats=2, dim=1)
        return sdpa(query=query, key=keys, value=values, attn_mask=mask)

    _, call = match_one(torch.no_grad()(layer), *inputs())
    assert call.reason is None


def test_gradients_are_a_reason():
    query, *others = inputs()
    _, call = match_one(enable_gqa_layer, query.requires_grad_(), *others)
    assert call.reason is Reason.GRADIENTS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float64}, Reason.DTYPE)],
)
def test_unsupported_tensors_are_a_reason(changes, reason):
    _, call = match_one(torch.no_grad()(enable_gqa_layer), *inputs(**changes))
    assert call.reason is reason


def test_head_dim_that_is_no_multiple_of_8_is_a_reason():
    query, key, value, key_cache, value_cache, position, mask = inputs()
    narrow = [t[..., :12].contiguous() for t in (query, key, value, key_cache, value_cache)]
    _, call = match_one(torch.no_grad()(enable_gqa_layer), *narrow, position, mask)
    assert call.reason is Reason.HEAD_DIM


def test_dynamic_capacity_is_still_a_site():
    arguments = inputs()
    for i in (3, 4):
        torch._dynamo.mark_dynamic(arguments[i], 2)
    torch._dynamo.mark_dynamic(arguments[6], 3)
    _, call = match_one(torch.no_grad()(transformers_layer), *arguments)
    assert call.reason is None


def test_layers_are_numbered_by_the_source_of_their_cache():
    class Layer:
        def __init__(self):
            _, _, _, self.keys, self.values, _, _ = inputs()

    class Cache:
        def __init__(self):
            self.layers = [Layer() for _ in range(4)]

    cache = Cache()
    query, key, value, _, _, position, mask = inputs()

    @torch.no_grad()
    def last_two_layers(query, cache):
        for i in (2, 3):
            layer = cache.layers[i]
            query = enable_gqa_layer(query, key, value, layer.keys, layer.values, position, mask)
        return query

    gm, _ = capture(last_two_layers, query, cache)
    assert [call.layer for call in match_attention(gm.graph)] == [2, 3]
