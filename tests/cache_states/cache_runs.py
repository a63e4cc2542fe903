"""What the tests of cache states share: runs, refills, and what an exact page summary is."""

import pytest
import torch
from tiny_models import FEW_PAGES

from quest_compile import ops, state
from quest_compile.decoding import greedy_step, prefill, rewind

NUM_LAYERS = 2
MAX_SEQ_LEN = 256
LENGTH = 150
STEPS = 20
PAGE_FORMAT = ops.SummaryFormat()
SETTINGS = FEW_PAGES | {"budget": 64, "num_dense_layers": 0, "inner": "aot_eager"}

grad_modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def decode(step, cache, first_token, position, steps=STEPS):
    """Greedy tokens after ``first_token`` [B, 1]: a list of ints, or of lists in a larger batch."""
    tokens = []
    token = first_token
    for i in range(steps):
        token = greedy_step(step, cache, token, position + i)
        tokens.append(token.squeeze().tolist())
    return tokens


def refill(model, cache, prompt, call=None):
    """Reset the cache and put another prompt in, all but its last token."""
    cache.reset()
    greedy_step(model if call is None else call, cache, prompt[:, :-1], 0)


def fresh_run(model, step, prompt, steps=STEPS):
    """The tokens a new cache gives: the prompt prefilled eagerly in one go, then ``step``."""
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        return decode(step, cache, prompt[:, -1:], prompt.shape[1] - 1, steps)


def assert_sparse_calls_since_reset(steps):
    counted = ops.counters()
    assert counted["sparse_calls"] == steps * NUM_LAYERS
    assert counted["sparse_calls_covered"] == 0


def is_exact(caches, page_format=PAGE_FORMAT):
    """Do all complete pages of all layers have the summary of their keys?"""
    for cache in caches:
        for layer in cache.layers:
            length = torch.tensor([int(layer.cumulative_length)])
            found = getattr(layer.keys, state._ATTRIBUTE)[page_format].page_summary
            expected = ops.build_page_summary(layer.keys, length, **page_format.as_kwargs())
            num_complete = int(length) // page_format.page_size
            if not torch.equal(found[:, :, :num_complete], expected[:, :, :num_complete]):
                return False
    return True


def decode_row(step, cache, tokens, row):
    """Greedy tokens of one row of a batch, from the end of the prompt."""
    rewind(cache, LENGTH - 1)
    return [found[row] for found in decode(step, cache, tokens, LENGTH - 1)]
