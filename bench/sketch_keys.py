"""Queries and keys to select pages for: random ones with RoPE, and those of a sentence encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

KINDS = (
    "random walk",
    "random walk, heavy channels",
    "topics",
    "topics, heavy channels",
    "isotropic",
    "isotropic, heavy channels",
)
_HEADS, _GROUP, _HEAD_DIM, _TOKENS, _QUERIES = 8, 4, 128, 16384, 4
_POSITIONS = range(4, 512, 8)


def synthetic_heads(kind: str, seed: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries [1, 32, 1, 128] and keys [1, 8, 16384, 128] after RoPE (theta 5e5).

    A query points at three keys, at something its group shares and at something of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    name, _, rest = kind.partition(", ")
    keys = _KEYS[name](normal, generator)
    centre = torch.zeros(_HEADS, 1, _HEAD_DIM)
    if rest:
        for head in range(_HEADS):
            slow = torch.randint(40, 64, (6,), generator=generator)
            slow[3:] += _HEAD_DIM // 2
            centre[head, 0, slow] = 6 * normal(6)
    positions = torch.arange(_TOKENS).float()
    rotated = _rope(keys + centre, positions)[None]
    for _ in range(_QUERIES):
        targets = torch.randint(0, _TOKENS, (_HEADS, 3), generator=generator)
        pointed = keys[torch.arange(_HEADS)[:, None], targets].sum(1, keepdim=True) / 1.7
        own, shared = normal(_HEADS, _GROUP, _HEAD_DIM), normal(_HEADS, 1, _HEAD_DIM)
        query = 1.3 * (0.8 * pointed + 0.6 * own + 0.6 * shared + 0.15 * centre)
        rotated_query = _rope(query, torch.tensor([float(_TOKENS)]))
        yield rotated_query.reshape(1, _HEADS * _GROUP, 1, _HEAD_DIM), rotated


def encoder_heads(folder: Path, book: Path, num_windows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every layer and every eighth position of windows of 512 tokens: [1, H, 1, D] and keys."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    text = book.read_text(encoding="utf-8")[60_000:400_000]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found: list[tuple[Tensor, Tensor]] = []

    def remember(attention, args, kwargs, _out) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        sizes = (attention.num_attention_heads, attention.attention_head_size)
        queries, keys = (
            layer(hidden).unflatten(-1, sizes).transpose(1, 2)
            for layer in (attention.query, attention.key)
        )
        found.append((queries, keys))

    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(remember, with_kwargs=True)
    for first in range(0, num_windows * 510, 510):
        found.clear()
        window = [tokenizer.cls_token_id, *tokens[first : first + 510], tokenizer.sep_token_id]
        with torch.no_grad():
            model(torch.tensor([window]))
        for queries, keys in found:
            for position in _POSITIONS:
                yield queries[:, :, position : position + 1].contiguous(), keys.contiguous()


def num_encoder_heads(folder: Path, num_windows: int) -> int:
    """How many ``encoder_heads`` gives of a book that is long enough."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    return num_windows * layers * len(_POSITIONS)


def _random_walk(normal, _generator) -> Tensor:
    """A step forgets 3 % of the key before it."""
    steps, rate = normal(_TOKENS, _HEADS, _HEAD_DIM), 0.97
    key = torch.zeros(_HEADS, _HEAD_DIM)
    for token in steps:
        key = rate * key + math.sqrt(1 - rate**2) * token
        token.copy_(key)
    return steps.transpose(0, 1).contiguous()


def _topics(normal, generator) -> Tensor:
    """Half of a key is that of its topic, one of 64, which changes every 200 tokens or so."""
    topics = normal(_HEADS, 64, _HEAD_DIM)
    is_change = torch.rand(_TOKENS, generator=generator) < 1 / 200
    topic = torch.randint(0, 64, (_TOKENS,), generator=generator)[is_change.cumsum(0)]
    return 0.7 * topics[:, topic] + 0.7 * normal(_HEADS, _TOKENS, _HEAD_DIM)


def _isotropic(normal, _generator) -> Tensor:
    return normal(_HEADS, _TOKENS, _HEAD_DIM)


_KEYS = {"random walk": _random_walk, "topics": _topics, "isotropic": _isotropic}


def _rope(x: Tensor, positions: Tensor, theta: float = 5e5) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
