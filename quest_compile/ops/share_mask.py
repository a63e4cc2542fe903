"""A mask that Inductor cannot see through: made once per step, not once more in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import reference, registration, require

registration.define("share_mask", "(Tensor attn_mask) -> Tensor")


def _check(attn_mask):
    require.tensors(attn_mask=attn_mask)
    require.dtype("attn_mask", attn_mask, torch.bool)


@registration.reference("share_mask")
def _share_mask_reference(attn_mask):
    _check(attn_mask)
    return reference.share_mask(attn_mask)


@registration.fake("share_mask")
def _share_mask_fake(attn_mask):
    _check(attn_mask)
    return torch.empty_like(attn_mask, memory_format=torch.contiguous_format)


_share_mask = torch.ops.quest.share_mask.default


def share_mask(attn_mask: Tensor) -> Tensor:
    """Contiguous copy of a bool mask of any shape.

    Raises:
        ValueError, TypeError: attn_mask is not a bool tensor.
    """
    _check(attn_mask)
    return _share_mask(attn_mask)
