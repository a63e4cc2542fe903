"""Whether a saved cache is of a model: by its configuration and samples of its weights."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch

# Of a configuration, without effect on keys and values.
_WITHOUT_EFFECT = frozenset(
    "_name_or_path _attn_implementation architectures bos_token_id dtype eos_token_id "
    "output_attentions output_hidden_states pad_token_id return_dict torch_dtype "
    "transformers_version use_cache".split()
)
_SAMPLE = 256


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a transformers configuration on which keys and values depend, as JSON."""
    fields = json.loads(json.dumps(config.to_dict(), sort_keys=True, default=str))
    return _with_effect(fields)


def _with_effect(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _with_effect(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in _WITHOUT_EFFECT
    }


def differing_fields(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first few, in words; empty where there are none."""
    names = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    shown = (f"{name} {found.get(name)!r} and not {expected.get(name)!r}" for name in names[:3])
    return ", ".join(shown) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def weights_checksum(model: Any) -> int:
    """CRC-32 of the names, shapes and first elements of all parameters and buffers."""
    crc = 0
    for name, tensor in sorted(model.state_dict().items()):
        for part in _parts(tensor):
            crc = zlib.crc32(f"{name} {list(part.shape)} {part.dtype}".encode(), crc)
            first = part.detach().as_strided((min(_SAMPLE, part.numel()),), (1,))
            crc = zlib.crc32(first.cpu().contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def _parts(tensor: Any) -> list[torch.Tensor]:
    """Itself; of a quantised tensor those that it consists of."""
    if not isinstance(tensor, torch.Tensor):
        return []
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
