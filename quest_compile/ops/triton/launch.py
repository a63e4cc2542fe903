"""Launching: sizes that follow from shapes, masks as kernels take them, the right device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.reference import each_query

LOG2_E = math.log2(math.e)


def power_of_two(size: int, lowest: int = 1) -> int:
    """The smallest one that is at least ``size`` and ``lowest``."""
    return max(lowest, 1 << (size - 1).bit_length())


def on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device; the interpreter takes CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Valid positions of every row; query i of a row has (q_len - 1 - i) * step fewer."""

    values: Tensor
    stride_b: int
    stride_i: int
    step: int

    @classmethod
    def of(cls, seq_lens: Tensor, query: Tensor, attn_mask: Tensor | None) -> Lengths:
        q_len = query.shape[2]
        if q_len == 1 or attn_mask is None:
            return cls(seq_lens, _stride(seq_lens, 0), 0, int(q_len > 1))
        each = each_query(query, seq_lens, attn_mask)
        values = torch.stack([seq_lens_i.expand(query.shape[0]) for _, seq_lens_i, _ in each], 1)
        return cls(values, values.stride(0), values.stride(1), 0)


@dataclasses.dataclass(frozen=True)
class Mask:
    """bool [B or 1, 1 or Q, q_len or 1, positions] as kernels take it.

    ``values``: uint8, positions contiguous; ``strides``: of batch, query and head, 0 where all
    share one. Rows begin at multiples of 8 bytes, so that 8 positions can be read as one word.
    """

    values: Tensor | None
    num_heads: int
    strides: tuple[int, int, int]
    num_positions: int

    @classmethod
    def of(cls, attn_mask: Tensor | None, max_seq_len: int) -> Mask:
        if attn_mask is None:
            return cls(None, 1, (0, 0, 0), 0)
        num_positions = attn_mask.shape[3]
        if num_positions == 1 and max_seq_len > 1:
            num_positions = max_seq_len
            attn_mask = attn_mask.expand(-1, -1, -1, max_seq_len)
        strides = [_stride(attn_mask, dim) for dim in (0, 2, 1)]
        in_words = [*strides, attn_mask.storage_offset(), num_positions]
        if attn_mask.stride(3) != 1 or any(n % 8 for n in in_words):
            # Padded with dead positions to whole words.
            attn_mask = torch.nn.functional.pad(attn_mask, (0, -num_positions % 8))
            attn_mask = attn_mask.contiguous()
            strides = [_stride(attn_mask, dim) for dim in (0, 2, 1)]
        values = attn_mask.view(torch.uint8)
        return cls(values, attn_mask.shape[1], (strides[0], strides[1], strides[2]), num_positions)

    @property
    def words(self) -> Tensor | None:
        """int64, 8 positions each."""
        return None if self.values is None else self.values.view(torch.int64)

    @property
    def word_strides(self) -> tuple[int, ...]:
        return tuple(stride // 8 for stride in self.strides)


@dataclasses.dataclass(frozen=True)
class Queries:
    """What each query may attend; a row of at most ``budget_tokens`` attends all of that."""

    lengths: Lengths
    mask: Mask
    max_seq_len: int
    budget_tokens: int = 0

    @classmethod
    def of(
        cls, query: Tensor, seq_lens: Tensor, attn_mask: Tensor | None, max_seq_len: int,
        budget_tokens: int = 0
    ) -> Queries:  # fmt: skip
        lengths, mask = Lengths.of(seq_lens, query, attn_mask), Mask.of(attn_mask, max_seq_len)
        return cls(lengths, mask, max_seq_len, budget_tokens)

    @property
    def length_arguments(self) -> tuple[int, ...]:
        lengths = self.lengths
        return lengths.stride_b, lengths.stride_i, lengths.step


def _stride(tensor: Tensor, dim: int) -> int:
    return 0 if tensor.shape[dim] == 1 else tensor.stride(dim)
