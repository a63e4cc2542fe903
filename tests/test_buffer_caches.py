"""Models in the style of gpt-fast, with buffers for caches, decode sparsely and right."""

import pytest
import torch
from tiny_models import SHORT
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig

VOCAB_SIZE, DIM, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 61, 64, 4, 2, 16
NUM_LAYERS, MAX_SEQ_LEN, PROMPT_LENGTH, NUM_NEW_TOKENS = 4, 256, 100, 12


class Attention(nn.Module):
    """``write``: how new rows come into the buffers; ``read``: how KV heads are repeated."""

    def __init__(self, write, read):
        super().__init__()
        self.write, self.read = write, read
        self.qkv = nn.Linear(DIM, (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(NUM_Q_HEADS * HEAD_DIM, DIM, bias=False)
        shape = (1, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x, mask, input_pos):
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        query, key, value = heads.split([NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
        for cache, new in ((self.k_cache, key), (self.v_cache, value)):
            if self.write == "setitem":
                cache[:, :, input_pos] = new
            else:
                cache.index_copy_(2, input_pos, new)
        keys, values, settings = self.k_cache, self.v_cache, {}
        if self.read == "enable_gqa":
            settings["enable_gqa"] = True
        else:
            group_size = NUM_Q_HEADS // NUM_KV_HEADS
            keys = keys.repeat_interleave(group_size, dim=1)
            values = values.repeat_interleave(group_size, dim=1)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, **settings)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class Transformer(nn.Module):
    def __init__(self, write, read):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, DIM)
        self.positions = nn.Embedding(MAX_SEQ_LEN, DIM)
        self.layers = nn.ModuleList(Attention(write, read) for _ in range(NUM_LAYERS))
        causal = torch.tril(torch.ones(MAX_SEQ_LEN, MAX_SEQ_LEN, dtype=torch.bool))
        self.register_buffer("causal_mask", causal)

    def forward(self, tokens, input_pos):
        mask = self.causal_mask[None, None, input_pos]
        x = self.embedding(tokens) + self.positions(input_pos)
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (DIM,)), mask, input_pos)
        return nn.functional.rms_norm(x, (DIM,)) @ self.embedding.weight.T


@torch.no_grad()
def decode(model, call):
    """Logits of every step; the prefill is ``model``'s own."""
    tokens = torch.arange(PROMPT_LENGTH)[None] * 7 % VOCAB_SIZE
    logits = [model(tokens, torch.arange(PROMPT_LENGTH))[:, -1]]
    for position in range(PROMPT_LENGTH, PROMPT_LENGTH + NUM_NEW_TOKENS - 1):
        token = logits[-1].argmax(-1)[:, None]
        logits.append(call(token, torch.tensor([position]))[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("write", ["setitem", "index_copy_"])
@pytest.mark.parametrize("read", ["repeat_interleave", "enable_gqa"])
def test_buffers_are_caches(write, read):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(write, read).eval()
    expected = decode(model, model)
    for budget, counter in ((128, "sparse_calls_covered"), (48, "sparse_calls")):
        ops.reset_counters()
        backend = QuestBackend(QuestConfig(**SHORT, budget=budget, inner="aot_eager"))
        out = decode(model, torch.compile(model, backend=backend))
        assert ops.counters()[counter] == 2 * (NUM_NEW_TOKENS - 1)
        assert [row.treatment.value for row in backend.report().rows] == ["dense"] * 2 + [
            "sparse"
        ] * 2
        is_equal = (out - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert is_equal == (budget == 128), "the smaller budget is seen in the logits"
        torch._dynamo.reset()
