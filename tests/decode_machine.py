"""Random programs of everything that may happen to KV caches between two decode steps.

After every rule, the cache in use is compared with a fresh one: new tensors, the same tokens
prefilled eagerly in one go, no page summaries. The first layer is dense, so that the keys of the
second, the sparse one, do not depend on what was selected when they were written.
"""

import copy
import functools
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_models import random_prompt, tiny_model

import quest_compile
from quest_compile import ops, state
from quest_compile.decoding import prefill, rewind, step_inputs

BATCH = 2
NUM_LAYERS, SPARSE_LAYER = 2, 1
MAX_SEQ_LEN = 96
BACKENDS = {
    "sparse": {"budget": 32, "page_size": 8},
    "large pages": {"budget": 48, "page_size": 16},
    "covering": {"budget": 88, "page_size": 8},
}
MAX_LENGTH = BACKENDS["covering"]["budget"]
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}

lengths, seeds, slots = st.integers(9, 40), st.integers(0, 5), st.integers(0, 2)
backends = st.sampled_from(list(BACKENDS))


@functools.cache
def model():
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@functools.cache
def compiled(name):
    backend = quest_compile.backend(num_dense_layers=1, inner="eager", **BACKENDS[name])
    return torch.compile(model(), backend=backend)


class Run:
    """A cache and what it should hold: tokens [B, n] and the signs of their keys."""

    def __init__(self, cache, tokens, signs, is_inference):
        self.cache, self.tokens, self.signs = cache, tokens, signs
        self.is_inference = is_inference

    def mode(self, inference=False):
        return torch.inference_mode() if inference or self.is_inference else torch.no_grad()

    def append(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.signs = torch.cat([self.signs, torch.ones(tokens.shape)], 1)

    def keep(self, length):
        self.tokens, self.signs = self.tokens[:, :length], self.signs[:, :length]

    @property
    def length(self):
        return self.tokens.shape[1]

    def fresh(self):
        """A new cache that holds the same; the rounding of other kernels is taken over."""
        tokens = self.tokens if self.length else random_prompt(BATCH, 1)
        with self.mode():
            cache = prefill(model(), tokens, MAX_SEQ_LEN)
            if not self.length:
                cache.reset()
            cache.layers[SPARSE_LAYER].keys[:, :, : self.length] *= self.signs[:, None, :, None]
            for new, old in zip(cache.layers, self.cache.layers):
                for name in ("keys", "values"):
                    mine, theirs = (getattr(x, name)[:, :, : self.length] for x in (new, old))
                    torch.testing.assert_close(theirs, mine, **ROUNDING)
                    mine.copy_(theirs)
        return cache

    def twin(self):
        """A copy with page summaries, so that looking at them changes nothing."""
        with self.mode():
            cache = copy.deepcopy(self.cache)
        for new, old in zip(cache.layers, self.cache.layers):
            states = state._StatesOfCache()
            for page_size, theirs in getattr(old.keys, state._ATTRIBUTE, {}).items():
                states[page_size] = mine = state.PageSummaryState(new.keys, page_size)
                mine.page_summary.copy_(theirs.page_summary)
                mine.num_sealed.copy_(theirs.num_sealed)
                if theirs.has_version and theirs.version == old.keys._version:
                    mine.version = new.keys._version
            setattr(new.keys, state._ATTRIBUTE, states)
        return cache


def logits_of(call, cache, tokens, position):
    return call(**step_inputs(cache, tokens, position)).logits[:, -1]


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
            call = compiled("sparse") if compiled_call else model()
            logits_of(call, run.cache, tokens, run.length)
        run.append(tokens)

    @initialize(length=lengths, seed=seeds)
    def start(self, length, seed):
        self.new_cache(0, length, seed, False, False)

    @rule(slot=slots, length=lengths, seed=seeds, compiled=st.booleans(), inference=st.booleans())
    def new_cache(self, slot, length, seed, compiled, inference):
        import transformers

        self.slot = slot
        nothing = torch.zeros(BATCH, 0, dtype=torch.int64)
        with torch.inference_mode() if inference else torch.no_grad():
            cache = transformers.StaticCache(config=model().config, max_cache_len=MAX_SEQ_LEN)
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
        before = ops.counters()["sparse_calls"]
        with run.mode():
            twin, fresh = run.twin(), run.fresh()
            found, expected = (
                logits_of(compiled("sparse"), cache, token, run.length) for cache in (twin, fresh)
            )
        is_sparse = run.length + 1 > BACKENDS["sparse"]["budget"]
        assert ops.counters()["sparse_calls"] - before == 2 * is_sparse
        self._assert_summary_is_exact(twin, run)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found, expected, **ROUNDING)

    def _assert_summary_is_exact(self, cache, run):
        keys, page_size = cache.layers[SPARSE_LAYER].keys, BACKENDS["sparse"]["page_size"]
        found = getattr(keys, state._ATTRIBUTE)[page_size].page_summary
        seq_lens = torch.tensor([run.length + 1])
        expected = ops.build_page_summary(keys, seq_lens, page_size=page_size)
        complete = (run.length + 1) // page_size
        # Without a count of writes, keys that differ by rounding only may go unnoticed.
        rounding = ROUNDING if run.is_inference else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[:, :, :complete], expected[:, :, :complete], **rounding)
