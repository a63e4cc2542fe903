"""A GGUF file of a tiny Llama, as llama.cpp lays it out, and the wheel that brings it."""

from __future__ import annotations

import struct
import zipfile

import numpy as np

_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 6
F32, Q4_1, Q8_0 = 0, 3, 8
_ALIGNMENT = 32

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else _UINT32
        items = [_string(v) if kind == _STRING else struct.pack("<I", v) for v in value]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(items)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)


def gguf_bytes(settings, tensors):
    """``tensors``: name to (shape as in torch, type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(_string(name) + _value(value) for name, value in settings.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % _ALIGNMENT)
    return head + bytes(-len(head) % _ALIGNMENT) + data


def of_model(model, symbols, architecture="llama"):
    """``model`` a LlamaForCausalLM; a token per symbol, one of them ``ab``, the first special."""
    config = model.config
    settings = {
        "general.architecture": architecture,
        "llama.vocab_size": config.vocab_size,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.rope.freq_base": 10000.0,
        "llama.context_length": config.max_position_embeddings,
        "tokenizer.ggml.tokens": symbols,
        "tokenizer.ggml.token_type": [3] + [1] * (len(symbols) - 1),
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "unknown", "padding")},
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    tensors = {}
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if module in name:
                halves = array.reshape(getattr(config, heads), 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        tensors[_their(name)] = (array.shape, F32, array.astype("<f4").tobytes())
    return gguf_bytes(settings, tensors)


def _their(name):
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name = name.removesuffix(".weight")
    if name in ends:
        return f"{ends[name]}.weight"
    _, _, layer, module = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[module]}.weight"


def write_wheel(folder, requirement, member, content):
    """What pip finds in ``folder``."""
    name, _, version = requirement.partition("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
