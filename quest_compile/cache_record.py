"""What the file of a cache says about itself."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from quest_compile.file_region import Region
from quest_compile.ops import SummaryFormat

# Of a record without its tokens, at most.
_ROOM = 2**20


@dataclasses.dataclass(frozen=True)
class SavedLayer:
    """``regions``: by name; ``checksum``: of what is in memory while the cache is open."""

    regions: dict[str, Region]
    checksum: int


@dataclasses.dataclass(frozen=True)
class Record:
    """``config`` and ``weights``: what ``fingerprint`` makes of a model, which may be unknown;
    ``length``: positions in use; ``tokens``: their ids, int32 [B, length], or not known.
    """

    config: dict[str, Any]
    weights: int | None
    max_cache_len: int
    num_dense_layers: int
    page_format: SummaryFormat
    length: int = 0
    tokens: torch.Tensor | None = None
    layers: tuple[SavedLayer, ...] = ()

    def max_bytes(self, batch_size: int) -> int:
        """Whatever it will have to say."""
        return len(json.dumps(self.config)) + _ROOM + 4 * batch_size * self.max_cache_len

    def as_bytes(self) -> bytes:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["page_format"] = self.page_format.as_kwargs()
        fields["layers"] = [
            {name: region.as_json() for name, region in layer.regions.items()}
            | {"checksum": layer.checksum}
            for layer in self.layers
        ]
        fields["tokens"] = None if self.tokens is None else list(self.tokens.shape)
        ids = b"" if self.tokens is None else self.tokens.numpy().tobytes()
        return json.dumps(fields).encode() + b"\n" + ids

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Record:
        """
        Raises:
            ValueError: nothing is saved.
        """
        if not data:
            raise ValueError(
                f"path: {path} was written in front of the end of what had been saved, and not "
                "saved again: delete it and begin anew"
            )
        text, _, ids = data.partition(b"\n")
        fields = json.loads(text)
        fields["page_format"] = SummaryFormat(**fields["page_format"])
        fields["layers"] = tuple(
            SavedLayer({name: Region.from_json(x) for name, x in layer.items()}, checksum)
            for layer in fields["layers"]
            for checksum in [layer.pop("checksum")]
        )
        if fields["tokens"] is not None:
            found = torch.frombuffer(bytearray(ids), dtype=torch.int32)
            fields["tokens"] = found.view(fields["tokens"])
        return cls(**fields)

    def saved(
        self, layers: list[SavedLayer], length: int, tokens: torch.Tensor | None, batch_size: int
    ) -> Record:
        """The record of these layers.

        Raises:
            ValueError: ``tokens`` are not those of ``length`` positions.
        """
        if tokens is not None:
            ids = _as_ids(tokens)
            if ids.shape[0] != batch_size or ids.shape[1] < length:
                raise ValueError(
                    f"tokens: expected [{batch_size}, {length}] or more of them, as the cache "
                    f"holds, got {list(ids.shape)}"
                )
            tokens = ids[:, :length].contiguous()
        return dataclasses.replace(self, length=length, tokens=tokens, layers=tuple(layers))

    def check_tokens(self, tokens: torch.Tensor, path: str) -> None:
        """
        Raises:
            ValueError: they do not begin with those of the record.
        """
        ids = _as_ids(tokens)
        if self.tokens is None:
            raise ValueError(f"tokens: {path} was saved without tokens: leave them out here")
        if ids.shape[0] != self.tokens.shape[0] or ids.shape[1] < self.length:
            raise ValueError(
                f"tokens: expected the {list(self.tokens.shape)} that {path} has, or more, "
                f"got {list(ids.shape)}"
            )
        differs = (ids[:, : self.length] != self.tokens).any(0).nonzero()
        if len(differs):
            raise ValueError(
                f"tokens: {path} is of another text: of its {self.length} tokens that at position "
                f"{int(differs[0])} is the first to differ"
            )


def _as_ids(tokens: torch.Tensor) -> torch.Tensor:
    """int32 [B, n], on the CPU."""
    ids = torch.as_tensor(tokens)
    if ids.ndim not in (1, 2) or ids.is_floating_point():
        raise ValueError(
            f"tokens: expected integers [B, n] or [n], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.reshape(-1, ids.shape[-1]).to("cpu", torch.int32)
