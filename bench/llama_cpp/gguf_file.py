"""A GGUF file of a Llama-shaped model with random weights in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quest_compile.bench.shapes import Layer, ModelShape


def one_layer_shape(layer: Layer) -> ModelShape:
    """A model of one layer with this attention and next to nothing else."""
    return ModelShape(layer, 1, 256, 256, 256, 1e4, is_tied=True)


def write_gguf(path: Path, shape: ModelShape) -> None:
    """Write random weights of ``shape`` to ``path``; there is no tokenizer in it.

    Raises:
        ValueError: not a Llama shape.
    """
    import gguf

    if shape.family != "llama":
        raise ValueError(f"GGUF files are written for llama shapes, not {shape.family}")
    layer = shape.layer
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(2**20)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(layer.num_q_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    for name, rows, columns in _weights(shape):
        writer.add_tensor(name, _random(name, rows, columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(shape: ModelShape) -> list[tuple[str, int, int]]:
    """(name, rows, columns); one row of no columns for the scales of norms."""
    hidden, inner, layer = shape.hidden_size, shape.intermediate_size, shape.layer
    query_size, key_size = (
        heads * layer.head_dim for heads in (layer.num_q_heads, layer.num_kv_heads)
    )
    weights = [("token_embd.weight", shape.vocab_size, hidden), ("output_norm.weight", 0, hidden)]
    if not shape.is_tied:
        weights.append(("output.weight", shape.vocab_size, hidden))
    for i in range(shape.num_layers):
        own = [
            ("attn_norm", 0, hidden),
            ("attn_q", query_size, hidden),
            ("attn_k", key_size, hidden),
            ("attn_v", key_size, hidden),
            ("attn_output", hidden, query_size),
            ("ffn_norm", 0, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ]
        weights += [(f"blk.{i}.{name}.weight", rows, columns) for name, rows, columns in own]
    return weights


def _random(name: str, rows: int, columns: int) -> Any:
    if rows == 0:
        return torch.ones(columns, dtype=torch.float32).numpy()
    generator = torch.Generator().manual_seed(len(name))
    values = torch.empty(rows, columns, dtype=torch.float16)
    return values.normal_(0, 0.02, generator=generator).numpy()
