"""A tensor in the file of a cache."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch


class Region(NamedTuple):
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def as_json(self) -> list[Any]:
        return [self.offset, list(self.shape), str(self.dtype).removeprefix("torch.")]

    @classmethod
    def from_json(cls, saved: list[Any]) -> Region:
        offset, shape, dtype = saved
        return cls(offset, tuple(shape), getattr(torch, dtype))

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements; contiguous."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """On one thread: what comes from a disk is not faster on several, which wait for each other."""
    _bytes_of(target)[...] = _bytes_of(source)


def checksum(*tensors: torch.Tensor) -> int:
    """CRC-32 of the elements in their order."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(_bytes_of(tensor).tobytes(), crc)
    return crc


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The same memory as an array of numpy."""
    return tensor.detach().view(torch.uint8).numpy()
