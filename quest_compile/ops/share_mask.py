"""A mask that Inductor cannot see through: made once per step, not once more in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, require
from quest_compile.ops.operator import operator


def _check(attn_mask):
    require.tensors(attn_mask=attn_mask)
    require.dtype("attn_mask", attn_mask, torch.bool)


def _fake(attn_mask):
    return torch.empty_like(attn_mask, memory_format=torch.contiguous_format)


_OPERATOR = operator(
    "share_mask",
    "(Tensor attn_mask) -> Tensor",
    check=_check,
    reference=reference.share_mask,
    fake=_fake,
    kernels=(),
)


def share_mask(attn_mask: Tensor) -> Tensor:
    """Contiguous copy of a bool mask of any shape.

    Raises:
        ValueError, TypeError: attn_mask is not a bool tensor.
    """
    return _OPERATOR(attn_mask)
