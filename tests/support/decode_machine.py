"""Random programs of everything that may happen to KV caches between two decode steps.

After every rule, the cache in use is compared with a fresh one: new tensors, the same tokens
prefilled eagerly in one go, no page summaries. The first layer is dense, so that the keys of the
second, the sparse one, do not depend on what was selected when they were written.
"""

import copy
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machine_runs import (
    BACKENDS,
    BATCH,
    MAX_LENGTH,
    MAX_SEQ_LEN,
    ROUNDING,
    SPARSE_LAYER,
    Run,
    compiled,
    logits_of,
    model,
)
from tiny_models import random_prompt
from transformers import StaticCache

from quest_compile import ops, state
from quest_compile.decoding import rewind

lengths, seeds, slots = st.integers(9, 40), st.integers(0, 5), st.integers(0, 2)
backends = st.sampled_from(list(BACKENDS))


class DecodeMachine(RuleBasedStateMachine):
    """Up to three caches, one of them in use."""

    def __init__(self):
        super().__init__()
        self.runs = {}
        self.slot = 0

    @property
    def run(self):
        return self.runs[self.slot]

    def _feed(self, tokens, compiled_call, inference):
        run = self.run
        tokens = tokens[:, : MAX_LENGTH - run.length]
        with run.mode(inference):
            name = "minmax" if tokens.shape[1] % 2 else "sketch"
            call = compiled(name) if compiled_call else model()
            logits_of(call, run.cache, tokens, run.length)
        run.append(tokens)

    @initialize(length=lengths, seed=seeds)
    def start(self, length, seed):
        self.new_cache(0, length, seed, False, False)

    @rule(slot=slots, length=lengths, seed=seeds, compiled=st.booleans(), inference=st.booleans())
    def new_cache(self, slot, length, seed, compiled, inference):
        self.slot = slot
        nothing = torch.zeros(BATCH, 0, dtype=torch.int64)
        with torch.inference_mode() if inference else torch.no_grad():
            cache = StaticCache(config=model().config, max_cache_len=MAX_SEQ_LEN)
        self.runs[slot] = Run(cache, nothing, nothing.float(), inference)
        self._feed(random_prompt(BATCH, length, seed=seed), compiled, inference)

    @precondition(lambda self: self.run.length <= MAX_LENGTH - 9)
    @rule(length=lengths, seed=seeds, compiled=st.booleans(), inference=st.booleans())
    def prefill(self, length, seed, compiled, inference):
        self._feed(random_prompt(BATCH, length, seed=seed), compiled, inference)

    @rule(length=lengths, seed=seeds, compiled=st.booleans(), same_length=st.booleans())
    def refill(self, length, seed, compiled, same_length):
        self_length = self.run.length
        self.reset()
        length = max(self_length, 9) if same_length else length
        self._feed(random_prompt(BATCH, length, seed=seed), compiled, False)

    @rule()
    def reset(self):
        with self.run.mode():
            self.run.cache.reset()
        self.run.keep(0)

    @precondition(lambda self: self.run.length < MAX_LENGTH)
    @rule(num_tokens=st.integers(1, 12), backend=backends, inference=st.booleans())
    def decode(self, num_tokens, backend, inference):
        run, token = self.run, self._next_token()
        start = run.length
        fresh, dense = run.fresh(), run.fresh()
        for position in range(start, min(start + num_tokens, MAX_LENGTH)):
            with run.mode(inference):
                found = logits_of(compiled(backend), run.cache, token, position)
                expected = logits_of(compiled(backend), fresh, token, position)
                exact = logits_of(model(), dense, token, position)
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
            torch.testing.assert_close(found, expected, **ROUNDING)
            if backend == "covering":
                torch.testing.assert_close(found, exact, **ROUNDING)
            run.append(token)
            token = found.argmax(-1, keepdim=True).clone()

    @precondition(lambda self: self.run.length <= MAX_LENGTH - 8)
    @rule(num_tokens=st.integers(2, 8), seed=seeds, backend=backends, inference=st.booleans())
    def verify_drafts(self, num_tokens, seed, backend, inference):
        run, tokens = self.run, random_prompt(BATCH, num_tokens, seed=seed)
        fresh = run.fresh()
        with run.mode(inference):
            found, expected = (
                logits_of(compiled(backend), cache, tokens, run.length)
                for cache in (run.cache, fresh)
            )
        torch.testing.assert_close(found, expected, **ROUNDING)
        run.append(tokens)

    @precondition(lambda self: self.run.length > 1)
    @rule(num_tokens=st.integers(1, 40))
    def crop(self, num_tokens):
        run = self.run
        run.keep(max(run.length - num_tokens, 1))
        with run.mode():
            rewind(run.cache, run.length)

    @rule(order=st.sampled_from([(1, 0), (0, 0), (1, 1)]), in_place=st.booleans())
    def reorder(self, order, in_place):
        run, order = self.run, torch.tensor(order)
        with run.mode():
            for layer in run.cache.layers:
                keys, values = (x.index_select(0, order) for x in (layer.keys, layer.values))
                if in_place:
                    keys, values = layer.keys.copy_(keys), layer.values.copy_(values)
                layer.keys, layer.values = keys, values
        run.tokens, run.signs = run.tokens[order], run.signs[order]

    @precondition(lambda self: self.run.length)
    @rule(first=st.integers(0, MAX_LENGTH), num_tokens=st.integers(1, 16))
    def edit_keys(self, first, num_tokens):
        """Other code writes some keys: all of them in a cache that counts no writes."""
        run = self.run
        first %= run.length
        edited = slice(None) if run.is_inference else slice(first, first + num_tokens)
        with run.mode():
            run.cache.layers[SPARSE_LAYER].keys[:, :, : run.length][:, :, edited] *= -1
        run.signs = run.signs.clone()
        run.signs[:, edited] *= -1

    @rule(slot=slots)
    def switch(self, slot):
        self.slot = slot if slot in self.runs else self.slot

    @rule(slot=slots, pickled=st.booleans())
    def copy_cache(self, slot, pickled):
        run = self.run
        with run.mode():
            pickled = pickled and not run.is_inference
            new = pickle.loads(pickle.dumps(run.cache)) if pickled else copy.deepcopy(run.cache)
        self.slot, self.runs[slot] = slot, Run(new, run.tokens, run.signs, run.is_inference)

    def _next_token(self):
        return random_prompt(BATCH, 1, seed=self.run.length)

    @invariant()
    def a_step_is_that_of_a_fresh_run(self):
        if not self.runs or self.run.length >= MAX_LENGTH:
            return
        run, token = self.run, self._next_token()
        name = "minmax" if run.length % 3 else "sketch"
        config = BACKENDS[name].config
        before = ops.counters()["sparse_calls"]
        with run.mode():
            twin, fresh = run.twin(), run.fresh()
            found, expected = (
                logits_of(compiled(name), cache, token, run.length) for cache in (twin, fresh)
            )
        is_sparse = run.length + 1 > config.budget
        assert ops.counters()["sparse_calls"] - before == 2 * is_sparse
        self._assert_summary_is_exact(twin, run, config.page_format)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found, expected, **ROUNDING)

    def _assert_summary_is_exact(self, cache, run, page_format):
        keys = cache.layers[SPARSE_LAYER].keys
        found = getattr(keys, state._ATTRIBUTE)[page_format].page_summary
        seq_lens = torch.tensor([run.length + 1])
        expected = ops.build_page_summary(keys, seq_lens, **page_format.as_kwargs())
        complete = (run.length + 1) // page_format.page_size
        found, expected = found[:, :, :complete], expected[:, :, :complete]
        if not run.is_inference:
            assert torch.equal(found, expected)
        elif page_format.summary == "minmax":
            # Without a count of writes, keys that differ by rounding only may go unnoticed.
            torch.testing.assert_close(found, expected, **ROUNDING)
