"""Models of a shape with random weights, and caches that look as if a prompt had been read."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from quest_compile.bench.shapes import ModelShape
from quest_compile.context_length import context_length
from quest_compile.decoding import prefill, rewind
from quest_compile.quantize import stored_bytes
from quest_compile.real_model import resolve_model

# Tokens in a row that are about the same thing.
_TOPIC_TOKENS = 64
_RANDOM_POSITIONS = 131072 + 4096


def random_model(shape: ModelShape, dtype: torch.dtype, device: str, num_layers: int | None) -> Any:
    """A transformers model of ``shape`` with random weights, or its first ``num_layers`` layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers or shape.num_layers,
        num_attention_heads=shape.layer.num_q_heads,
        num_key_value_heads=shape.layer.num_kv_heads,
        head_dim=shape.layer.head_dim,
        rope_theta=shape.rope_theta,
        max_position_embeddings=_RANDOM_POSITIONS,
        tie_word_embeddings=shape.is_tied,
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def own_model(path: str, dtype: torch.dtype, device: str) -> Any:
    """The model in a folder, of the hub, or fetched."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(path), dtype=dtype)
    return model.to(device).eval()


def check_context(path: str | None, context: int, num_tokens: int) -> None:
    """Of the model of ``--model``; None: of random weights.

    Raises:
        ValueError: it has no positions for ``num_tokens`` behind ``context`` tokens.
    """
    limit: int | None = _RANDOM_POSITIONS
    if path is not None:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(resolve_model(path))
        limit = context_length(config)
    if limit is not None and context + num_tokens > limit:
        raise ValueError(
            f"--contexts: {path or 'models with random weights'} take at most {limit} tokens, got "
            f"{context} and {num_tokens} to decode"
        )


def with_enable_gqa(model: Any) -> Any:
    """The same weights, with SDPA called as ``enable_gqa=True`` instead of after ``repeat_kv``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("sdpa_enable_gqa", _sdpa_enable_gqa)
    AttentionMaskInterface.register("sdpa_enable_gqa", sdpa_mask)
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    twin.set_attn_implementation("sdpa_enable_gqa")
    return twin


def _sdpa_enable_gqa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # Without a mask, several queries are causal.
    is_causal = attention_mask is None and query.shape[2] > 1
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def filled_cache(model: Any, context: int, capacity: int, batch: int) -> Any:
    """A StaticCache of ``capacity`` positions that holds ``context`` tokens nobody computed.

    Prefill is no part of the measurement and takes longer than all of it. A layer's keys have the
    size of the one key that the model itself computed first; 64 tokens in a row share half of their
    energy, a topic, so that pages differ as those of a text do. Values are independent. How long a
    step takes depends on none of this; it keeps scores and softmax away from special cases.
    """
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    cache = prefill(model, tokens, capacity)
    generator = torch.Generator(model.device).manual_seed(1)
    with torch.no_grad():
        for layer in cache.layers:
            for cached, has_topics in ((layer.keys, True), (layer.values, False)):
                _fill(cached, context, has_topics, generator)
    rewind(cache, context)
    return cache


def _fill(cached: torch.Tensor, context: int, has_topics: bool, generator: torch.Generator) -> None:
    """In place, a row and head at a time: at 128K tokens a copy in float32 would not fit."""
    options: dict[str, Any] = {"generator": generator, "device": cached.device}
    for row in cached.flatten(0, 1):
        size = row[0].float().square().mean().sqrt()
        tokens = torch.randn(context, row.shape[-1], **options)
        if has_topics:
            topics = torch.randn(-(-context // _TOPIC_TOKENS), row.shape[-1], **options)
            topics = topics.repeat_interleave(_TOPIC_TOKENS, 0)[:context]
            tokens = (tokens + topics) * math.sqrt(0.5)
        row[:context] = (tokens * size).to(row.dtype)


def cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def page_summary_bytes(layer: Any) -> int:
    """Of the states that hang on the key cache of a layer (see ``quest_compile.state``)."""
    states = getattr(layer.keys, "_quest_page_summaries", None) or {}
    return sum(tensor.nbytes for state in states.values() for tensor in state.tensors())


def weight_bytes(model: Any) -> int:
    """What a step reads of the weights: all but the embeddings, unless they are the head too."""
    total = sum(stored_bytes(parameter) for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embeddings
    return total if is_tied else total - embeddings.nbytes
