"""Read a GGUF file: its settings, and its tensors as float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_MAGIC, _VERSION = b"GGUF", 3
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_BLOCK = 32
_F32, _Q4_1_KIND, _Q8_0_KIND = 0, 3, 8
_Q4_1 = np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", _BLOCK // 2)])
_Q8_0 = np.dtype([("scale", "<f2"), ("codes", "i1", _BLOCK)])


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings by name, and tensors by name, their axes in the order of torch.

    Raises:
        ValueError: not a GGUF file of version 3, or a tensor of a type that is not known here.
    """
    reader = _Reader(data)
    if data[: len(_MAGIC)] != _MAGIC or reader.skip(len(_MAGIC)).integer("<u4") != _VERSION:
        raise ValueError(f"not a GGUF file of version {_VERSION}")
    num_tensors, num_settings = reader.integer(), reader.integer()
    settings = {}
    for _ in range(num_settings):
        name = reader.string()
        settings[name] = reader.value(reader.integer("<u4"))
    described = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = reader.array("<u8", reader.integer("<u4")).tolist()
        described.append((name, shape[::-1], reader.integer("<u4"), reader.integer()))
    alignment = settings.get("general.alignment", 32)
    start = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in described:
        try:
            read = _READ[kind]
        except KeyError:
            raise ValueError(f"tensor {name} has type {kind}, not known here") from None
        tensors[name] = read(_Reader(data, start + offset), math.prod(shape)).reshape(shape)
    return settings, tensors


class _Reader:
    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data = data
        self.position = position

    def skip(self, size: int) -> _Reader:
        self.position += size
        return self

    def array(self, dtype: Any, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, dtype, count, self.position)
        self.position += found.nbytes
        return found

    def integer(self, dtype: str = "<u8") -> int:
        return int(self.array(dtype, 1)[0])

    def string(self) -> str:
        return self.array("u1", self.integer()).tobytes().decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.array(_SCALARS[kind], 1)[0].item()
        kind, count = self.integer("<u4"), self.integer()
        if kind in _SCALARS:
            return self.array(_SCALARS[kind], count).tolist()
        return [self.value(kind) for _ in range(count)]


def _read_f32(reader: _Reader, size: int) -> np.ndarray:
    return reader.array("<f4", size).copy()


def _read_q8_0(reader: _Reader, size: int) -> np.ndarray:
    blocks = reader.array(_Q8_0, size // _BLOCK)
    return blocks["codes"] * blocks["scale"].astype(np.float32)[:, None]


def _read_q4_1(reader: _Reader, size: int) -> np.ndarray:
    """The first half of a block is in the low halves of its bytes."""
    blocks = reader.array(_Q4_1, size // _BLOCK)
    scale, least = (blocks[name].astype(np.float32)[:, None] for name in ("scale", "least"))
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
    return codes * scale + least


_READ = {_F32: _read_f32, _Q4_1_KIND: _read_q4_1, _Q8_0_KIND: _read_q8_0}
