"""A layer of an OffloadedStaticCache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from quest_compile.cache_file import CacheFile
from quest_compile.cache_record import Record, SavedLayer
from quest_compile.file_region import Region, checksum, copy_bytes
from quest_compile.ops import empty_page_summary
from quest_compile.state import call_before_writes, current_rows, rows_to_restore

_KINDS = ("keys", "values")


class OffloadedLayer(StaticLayer):
    """Its keys and values are in the file and their page summaries in memory; or, of a layer that
    is read whole, keys and values are in memory and go to the file when it is saved.

    ``record``: of the cache, for what does not change.
    """

    keys: Any
    values: Any
    cumulative_length: Any

    def __init__(self, file: CacheFile, record: Record, num_layers: int, is_in_file: bool) -> None:
        super().__init__(max_cache_len=record.max_cache_len)
        self._file = file
        self._record = record
        self._num_layers = num_layers
        self._is_in_file = is_in_file
        self._regions: dict[str, Region] = {}

    # Nothing that a graph could do.
    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.device.type != "cpu":
            raise ValueError(
                f"OffloadedStaticCache(path=...) is for CPUs, and the keys are on "
                f"{key_states.device}: use a StaticCache"
            )
        # A cache may be made in inference mode and written outside.
        with torch.inference_mode(False), torch.no_grad():
            if not self._regions:
                self._regions = self._reserve(key_states, value_states)
            if not self._is_in_file:
                super().lazy_initialization(key_states, value_states)
                return
            self.max_cache_len = 0
            super().lazy_initialization(key_states, value_states)
            self.max_cache_len = self._record.max_cache_len
            for kind in _KINDS:
                tensor = self._file.map(self._regions[kind], is_read_here_and_there=True)
                torch._dynamo.mark_static_address(tensor)
                setattr(self, kind, tensor)
            before_write = functools.partial(_before_write, self._file, self.cumulative_length)
            call_before_writes(self.keys, before_write)

    def _reserve(self, *states: torch.Tensor) -> dict[str, Region]:
        whole = [
            torch.empty(*x.shape[:2], self.max_cache_len, x.shape[3], dtype=x.dtype, device="meta")
            for x in states
        ]
        named = dict(zip(_KINDS, whole))
        if self._is_in_file:
            page_format = self._record.page_format.as_kwargs()
            named["summary"] = empty_page_summary(named["keys"], **page_format)
        nbytes = sum(x.nbytes for x in named.values())
        self._file.lay_out(self._record.max_bytes(states[0].shape[0]), nbytes * self._num_layers)
        return {name: self._file.reserve(tuple(x.shape), x.dtype) for name, x in named.items()}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized:
            _check("keys", key_states, self.keys)
            _check("values", value_states, self.values)
        if not torch.compiler.is_compiling():
            _before_write(self._file, self.cumulative_length)
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        # What is behind the length is attended by nobody: no need to write a file full of zeros.
        self._file.before_write(0)
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise ValueError(
            "beam search copies the rows of a cache, and this one is a file: use a StaticCache"
        )

    batch_repeat_interleave = batch_select_indices = reorder_cache

    def save(self, length: int) -> SavedLayer:
        """What is in memory goes to the file."""
        rows = self._rows_in_memory(length)
        for name, tensor in rows.items():
            copy_bytes(self._file.map(self._regions[name])[:, :, : tensor.shape[2]], tensor)
        return SavedLayer(self._regions, checksum(*rows.values()))

    def _rows_in_memory(self, length: int) -> dict[str, torch.Tensor]:
        if self._is_in_file:
            return {"summary": current_rows(self.keys, self._record.page_format, length)}
        return {kind: getattr(self, kind)[:, :, :length] for kind in _KINDS}

    def restore(self, saved: SavedLayer, length: int) -> bool:
        """Back to what was saved; False: it is damaged."""
        self._regions = saved.regions
        like = [
            torch.empty(*region.shape[:2], 0, region.shape[3], dtype=region.dtype)
            for region in (saved.regions[kind] for kind in _KINDS)
        ]
        self.lazy_initialization(*like)
        self.cumulative_length.fill_(length)
        rows = self._rows_to_restore(length)
        for name, tensor in rows.items():
            copy_bytes(tensor, self._file.map(saved.regions[name])[:, :, : tensor.shape[2]])
        return checksum(*rows.values()) == saved.checksum

    def _rows_to_restore(self, length: int) -> dict[str, torch.Tensor]:
        if self._is_in_file:
            page_format = self._record.page_format
            num_pages = length // page_format.page_size
            return {"summary": rows_to_restore(self.keys, page_format, num_pages)}
        return {kind: getattr(self, kind)[:, :, :length] for kind in _KINDS}


def _before_write(file: CacheFile, cumulative_length: torch.Tensor) -> None:
    if file.saved_length:
        file.before_write(int(cumulative_length))


def _check(name: str, states: torch.Tensor, cached: torch.Tensor) -> None:
    found = (*states.shape[:2], states.shape[3], states.dtype)
    expected = (*cached.shape[:2], cached.shape[3], cached.dtype)
    if found != expected:
        raise ValueError(
            f"{name}: the cache has batch {expected[0]}, {expected[1]} heads of {expected[2]} "
            f"channels, {expected[3]}; got {found[0]}, {found[1]} of {found[2]}, {found[3]}"
        )
