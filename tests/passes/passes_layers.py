"""Small attention layers, as models spell them, and the Dynamo graph of a call."""

import torch
from torch.nn.functional import scaled_dot_product_attention

BATCH, NUM_Q_HEADS, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM = 2, 4, 2, 64, 16


def capture(function, *args):
    """The graph module and inputs Dynamo hands to a backend for ``function(*args)``."""
    found = []

    def backend(gm, example_inputs):
        found.append((gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    (captured,) = found
    return captured


def inputs(q_len=1, position=20, num_kv_heads=NUM_KV_HEADS, **kwargs):
    """query, key, value, key_cache, value_cache, cache_position, attn_mask of one call."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, NUM_Q_HEADS, q_len, HEAD_DIM, **kwargs)
    key, value = torch.randn(2, BATCH, num_kv_heads, q_len, HEAD_DIM, **kwargs)
    caches = torch.randn(2, BATCH, num_kv_heads, MAX_SEQ_LEN, HEAD_DIM, **kwargs)
    cache_position = torch.arange(position, position + q_len)
    attn_mask = torch.arange(MAX_SEQ_LEN) <= cache_position[:, None]
    return query, key, value, *caches.unbind(), cache_position, attn_mask.expand(BATCH, 1, -1, -1)


def repeat_kv(x, group_size):
    batch, heads, length, head_dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, group_size, length, head_dim)
    return x.reshape(batch, heads * group_size, length, head_dim)


def transformers_layer(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    key_cache.index_copy_(2, cache_position, key)
    value_cache.index_copy_(2, cache_position, value)
    keys, values = repeat_kv(key_cache, 2), repeat_kv(value_cache, 2)
    return scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask, scale=0.2)


def gpt_fast_layer(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    key_cache[:, :, cache_position] = key
    value_cache[:, :, cache_position] = value
    keys = key_cache.repeat_interleave(2, dim=1)
    values = value_cache.repeat_interleave(2, dim=1)
    return scaled_dot_product_attention(query, keys, values, attn_mask, 0.0)


def enable_gqa_layer(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    keys = key_cache.index_copy_(2, cache_position, key)
    values = value_cache.index_copy_(2, cache_position, value)
    return scaled_dot_product_attention(query, keys, values, attn_mask, enable_gqa=True)


def unsqueeze_layer(query, key, value, key_cache, value_cache, cache_position, attn_mask):
    key_cache.index_copy_(-2, cache_position, key)
    value_cache.index_copy_(-2, cache_position, value)
    keys = key_cache.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
    values = value_cache.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
    return scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask)


SUPPORTED = [transformers_layer, gpt_fast_layer, enable_gqa_layer, unsqueeze_layer]
