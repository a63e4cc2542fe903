"""A Llama in a GGUF file becomes a folder for ``from_pretrained``, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PreTokenizer = Callable[[], Any]

_SPECIAL_TOKEN = 3
_LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(data: bytes, folder: Path, pre_tokenizer: PreTokenizer) -> None:
    """Write the model in ``data`` into ``folder``, in float32.

    Raises:
        ValueError: not the GGUF file of a Llama.
    """
    import torch
    from safetensors.torch import save_file

    from quest_compile.real_model.gguf import read_gguf

    settings, tensors = read_gguf(data)
    if settings.get("general.architecture") != "llama":
        raise ValueError(f"expected a llama, got {settings.get('general.architecture')!r}")
    config = _config(settings, is_tied="output.weight" not in tensors)
    _write_json(folder / "config.json", config)
    weights = _weights(config, {name: torch.from_numpy(t) for name, t in tensors.items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(settings, folder, pre_tokenizer)


def single_digits_then_gpt2() -> Any:
    """How SmolLM2 cuts a text before it merges: each digit for itself, then as GPT-2."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _config(settings: dict[str, Any], is_tied: bool) -> dict[str, Any]:
    theta = settings["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": settings["llama.vocab_size"],
        "hidden_size": settings["llama.embedding_length"],
        "intermediate_size": settings["llama.feed_forward_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "num_attention_heads": settings["llama.attention.head_count"],
        "num_key_value_heads": settings["llama.attention.head_count_kv"],
        "head_dim": settings["llama.rope.dimension_count"],
        "max_position_embeddings": settings["llama.context_length"],
        "rms_norm_eps": settings["llama.attention.layer_norm_rms_epsilon"],
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": is_tied,
        "bos_token_id": settings["tokenizer.ggml.bos_token_id"],
        "eos_token_id": settings["tokenizer.ggml.eos_token_id"],
        "pad_token_id": settings["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _weights(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = tensors["output.weight"]
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER_WEIGHTS.items():
            weight = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in heads:
                weight = _halves_apart(weight, heads[theirs])
            weights[f"model.layers.{layer}.{ours}.weight"] = weight
    return weights


def _halves_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates channels 2i and 2i + 1 together, transformers i and i + head_dim / 2."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_tokenizer(settings: dict[str, Any], folder: Path, pre_tokenizer: PreTokenizer) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = settings["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": settings.get("tokenizer.chat_template"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = settings.get(f"tokenizer.ggml.{theirs}_token_id")
        described[f"{ours}_token"] = None if number is None else tokens[number]
    _write_json(folder / "tokenizer_config.json", described)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
