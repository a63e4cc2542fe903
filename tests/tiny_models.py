"""Tiny random-weight transformers models of many families, the same weights on every run."""

from __future__ import annotations

from typing import Any

import torch

VOCAB_SIZE = 257
NUM_LAYERS = 4

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}

# family -> (config class, model class, settings that differ)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_mha": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24, "use_sliding_window": False}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
}


def tiny_model(family: str, **settings: Any) -> Any:
    """An eval() model with SDPA attention and well separated logits."""
    import transformers

    config_name, model_name, differences = FAMILIES[family]
    config = getattr(transformers, config_name)(**(_COMMON | differences | settings))
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model = getattr(transformers, model_name)(config).eval()
    # The default initialisation attends almost uniformly and ignores the context: make it matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def random_prompt(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]; id 0 is padding and does not occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=generator)


def left_padded_prompt(lengths: list[int], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, max(lengths)] with the padding in front."""
    longest = max(lengths)
    tokens = random_prompt(len(lengths), longest, seed=seed)
    mask = torch.arange(longest) >= torch.tensor([[longest - n] for n in lengths])
    return tokens.masked_fill(~mask, 0), mask.long()
