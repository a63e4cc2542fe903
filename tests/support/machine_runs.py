"""A cache of the state machine, what it should hold, and a fresh one that holds the same."""

import copy
import functools

import torch
from tiny_models import FEW_PAGES, random_prompt, tiny_model

import quest_compile
from quest_compile import state
from quest_compile.decoding import prefill, step_inputs

BATCH = 2
NUM_LAYERS, SPARSE_LAYER = 2, 1
MAX_SEQ_LEN = 96
BACKENDS = {
    name: quest_compile.backend(**FEW_PAGES, num_dense_layers=1, inner="eager", **settings)
    for name, settings in {
        "minmax": {"budget": 32, "page_size": 8, "summary": "minmax", "group_reduce": "sum"},
        "sketch": {"budget": 32, "page_size": 8},
        "large pages": {"budget": 48, "page_size": 16},
        "covering": {"budget": 88, "page_size": 8},
    }.items()
}
MAX_LENGTH = BACKENDS["covering"].config.budget
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}


@functools.cache
def model():
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@functools.cache
def compiled(name):
    return torch.compile(model(), backend=BACKENDS[name])


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
            for page_format, theirs in getattr(old.keys, state._ATTRIBUTE, {}).items():
                states[page_format] = mine = state.PageSummaryState(new.keys, page_format)
                for ours, others in zip(mine.tensors(), theirs.tensors(), strict=True):
                    ours.copy_(others)
                if theirs.has_version and theirs.version == old.keys._version:
                    mine.version = new.keys._version
            setattr(new.keys, state._ATTRIBUTE, states)
        return cache


def logits_of(call, cache, tokens, position):
    return call(**step_inputs(cache, tokens, position)).logits[:, -1]
