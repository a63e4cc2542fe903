"""What a page summary keeps of a page, as a part of a tensor."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """``layout``: the shape in words."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
