"""Tiny random-weight transformers models of many families, the same weights on every run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
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

# Settings of backends in tests, whose contexts are short, whatever the defaults are.
FEW_PAGES = {"num_sink_pages": 1, "num_recent_pages": 2}
SHORT = FEW_PAGES | {"num_dense_layers": 2}

# What several families of families.json have in common.
_TRAITS: dict[str, dict[str, Any]] = {
    "moe": {
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "hybrid": {
        "head_dim": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mla": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 8,
    },
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of families.json: a tiny configuration of a transformers model.

    ``text``: model type of the text configuration that takes the settings (multimodal models).
    ``full_mask``: with a static cache the model wants a mask as long as the cache.
    ``positions``: without position_ids the model counts from 0 at every call.
    ``generate``: run it through generate "always", "nightly", or "never": transformers fails there.
    ``since``: version of transformers; before, the configuration or a static cache fails.
    """

    model: str
    traits: tuple[str, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str | None = None
    vision_config: dict[str, Any] | None = None
    full_mask: bool = False
    positions: bool = False
    generate: str = "nightly"
    since: int = 4

    def config(self, **settings: Any) -> Any:
        """The transformers configuration."""
        import transformers

        config_class = getattr(transformers, self.model).config_class
        merged = dict(_COMMON)
        for trait in self.traits:
            merged |= _TRAITS[trait]
        merged |= self.settings | settings
        if self.text is None:
            return config_class(**merged)
        text = merged | {"model_type": self.text}
        token = {"image_token_id": VOCAB_SIZE - 1, "image_token_index": VOCAB_SIZE - 1}
        return config_class(text_config=text, vision_config=self.vision_config, **token)


FAMILIES = {
    name: Family(**line)
    for name, line in json.loads(
        pathlib.Path(__file__).with_name("families.json").read_text()
    ).items()
}


def tiny_model(family: str, **settings: Any) -> Any:
    """An eval() model with transformers' default attention and well separated logits."""
    import transformers

    line = FAMILIES[family]
    config = line.config(**settings)
    torch.manual_seed(1)
    model = getattr(transformers, line.model)(config).eval()
    # The default initialisation attends almost uniformly and ignores the context: make it matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def tiny_tokenizer() -> Any:
    """One token per byte, for ``tiny_model``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    assert len(vocabulary) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


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
