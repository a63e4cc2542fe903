"""A state of llama.cpp's KV cache that holds as many tokens as wanted, instead of a prefill.

The layout (``llama_kv_cache::state_write``, one sequence) is taken from a state of a few tokens
that llama.cpp itself wrote: building that one again must give the same bytes, or ``ValueError``
says that this version of llama.cpp writes another layout.
"""

from __future__ import annotations

import dataclasses
import struct

import torch


@dataclasses.dataclass
class _LayerRows:
    """``kind``: ggml's number of the type; ``rows`` uint8 [tokens, row_bytes]."""

    kind: int
    row_bytes: int
    rows: torch.Tensor


class KvState:
    """A parsed state of ``num_tokens`` tokens, all of one sequence."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._magic, self._version, self._num_streams, self.num_tokens = self._read("IIII")
        cells = [self._read("iIi") for _ in range(self.num_tokens)]
        if self._num_streams != 1 or any(c[:2] != (i, 1) for i, c in enumerate(cells)):
            raise ValueError("the state of llama.cpp has another layout: positions")
        self._sequence = cells[0][2]
        self._is_transposed, num_layers = self._read("II")
        self._keys = [self._read_rows() for _ in range(num_layers)]
        read = self._read_columns if self._is_transposed else self._read_rows
        self._values = [read() for _ in range(num_layers)]
        self._tail = data[self._at :]
        if self.repeated(self.num_tokens) != data:
            raise ValueError("the state of llama.cpp has another layout: written back, it differs")

    def repeated(self, num_tokens: int) -> bytes:
        """The state of so many tokens: the known ones again and again."""
        header = (self._magic, self._version, self._num_streams, num_tokens)
        parts = [struct.pack("<IIII", *header)]
        parts += [struct.pack("<iIi", i, 1, self._sequence) for i in range(num_tokens)]
        parts.append(struct.pack("<II", self._is_transposed, len(self._keys)))
        pick = torch.arange(num_tokens) % self.num_tokens
        for layer in self._keys:
            parts.append(struct.pack("<iQ", layer.kind, layer.row_bytes))
            parts.append(layer.rows[pick].numpy().tobytes())
        for layer in self._values:
            if not self._is_transposed:
                parts.append(struct.pack("<iQ", layer.kind, layer.row_bytes))
                parts.append(layer.rows[pick].numpy().tobytes())
                continue
            # [channels, tokens, bytes of an element]
            channels = layer.rows.shape[0]
            parts.append(struct.pack("<iII", layer.kind, layer.row_bytes, channels))
            parts.append(layer.rows[:, pick].numpy().tobytes())
        return b"".join([*parts, self._tail])

    def _read_rows(self) -> _LayerRows:
        kind, row_bytes = self._read("iQ")
        rows = self._take(self.num_tokens * row_bytes).view(self.num_tokens, row_bytes)
        return _LayerRows(kind, row_bytes, rows)

    def _read_columns(self) -> _LayerRows:
        kind, element_bytes, channels = self._read("iII")
        size = channels * self.num_tokens * element_bytes
        columns = self._take(size).view(channels, self.num_tokens, element_bytes)
        return _LayerRows(kind, element_bytes, columns)

    def _read(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + layout)
        if self._at + size > len(self._data):
            raise ValueError("the state of llama.cpp has another layout: too short")
        values = struct.unpack_from("<" + layout, self._data, self._at)
        self._at += size
        return values

    def _take(self, num_bytes: int) -> torch.Tensor:
        if self._at + num_bytes > len(self._data):
            raise ValueError("the state of llama.cpp has another layout: too short")
        taken = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return torch.frombuffer(bytearray(taken), dtype=torch.uint8)
