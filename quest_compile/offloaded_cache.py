"""A static cache in a file: larger than the memory, and still there after a restart."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from quest_compile.cache_file import CacheFile
from quest_compile.cache_record import Record
from quest_compile.fingerprint import config_fields, differing_fields, weights_checksum
from quest_compile.offloaded_layer import OffloadedLayer
from quest_compile.ops import SummaryFormat, require


class OffloadedStaticCache(StaticCache):
    """``transformers.StaticCache`` in a file, for CPUs.

    The keys and values of all layers but the first ``num_dense_layers``, which a step reads whole,
    are mapped from the file: Linux keeps in memory what is used and what fits. Page summaries are
    in memory. Room on the disk is taken when the first tokens come.

    ``save()`` makes what the cache holds last, ``open()`` continues it, in another process too.
    Tokens behind the saved ones do not touch them: a process that ends without saving, however it
    ends, leaves what was saved. Writing in front of the end of what was saved, after ``rewind`` or
    ``reset``, withdraws it until the next ``save()``. The file is locked while a cache is open.

    Args:
        config: of the model; all of its layers must attend the whole context.
        max_cache_len: positions.
        path: of the file, which must not exist.
        num_dense_layers: this many first layers stay in memory; as of the backend.
        page_size, summary, sketch_bits: of the page summaries that are saved; as of the backend. A
            backend with others makes its own from all keys, once in each process.
        model: with it, a checksum of samples of the weights is saved too, for ``open`` to compare.

    Raises:
        TypeError, ValueError: an argument is not as described; a model that it does not fit; when
            tokens come: they are of another batch or dtype, or not on a CPU.
        FileExistsError: there is something at ``path``.
        BlockingIOError: another cache is being made for ``path``.
        OSError: the folder cannot be written; when the first tokens come: the disk is full.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        *,
        path: str | os.PathLike[str],
        num_dense_layers: int = 2,
        page_size: int = SummaryFormat.page_size,
        summary: str = SummaryFormat.summary,
        sketch_bits: int = SummaryFormat.sketch_bits,
        model: Any = None,
    ) -> None:
        require.integer("max_cache_len", max_cache_len, 1)
        require.integer("num_dense_layers", num_dense_layers, 0)
        _check_config(config)
        record = Record(
            config=config_fields(config),
            weights=None if model is None else weights_checksum(model),
            max_cache_len=max_cache_len,
            num_dense_layers=num_dense_layers,
            page_format=SummaryFormat(page_size, summary, sketch_bits),
        )
        self._set_up(config, record, CacheFile.create(_absolute(path)))

    def _set_up(self, config: Any, record: Record, file: CacheFile) -> None:
        super().__init__(config=config, max_cache_len=record.max_cache_len)
        self._record, self._file = record, file
        num_layers = len(self.layers)
        self.layers = [
            OffloadedLayer(file, record, num_layers, is_in_file=index >= record.num_dense_layers)
            for index in range(num_layers)
        ]

    @classmethod
    def open(
        cls,
        config: Any,
        path: str | os.PathLike[str],
        *,
        tokens: torch.Tensor | None = None,
        model: Any = None,
    ) -> OffloadedStaticCache:
        """Continue what was saved at ``path``.

        Args:
            config: of the model.
            tokens: ids [B, n] or [n] that have to begin with those that were saved.
            model: compared with the one that was given when the cache was made, if one was.

        Raises:
            FileNotFoundError: there is none, or it was never saved.
            BlockingIOError: it is in use.
            OSError: it cannot be read and written.
            ValueError: it is of another model or of other tokens, truncated, damaged, or was
                written in front of the end of what had been saved, and not saved again.
        """
        _check_config(config)
        file = CacheFile.open(_absolute(path))
        try:
            record = Record.from_bytes(file.read_record(), file.path)
            differing = differing_fields(record.config, config_fields(config))
            if differing:
                raise ValueError(f"config: {file.path} is of another model, with {differing}")
            if model is not None and record.weights not in (None, weights_checksum(model)):
                raise ValueError(f"model: {file.path} is of a model with other weights or dtype")
            if tokens is not None:
                record.check_tokens(tokens, file.path)
            cache = cls.__new__(cls)
            cache._set_up(config, record, file)
            cache._restore()
        except BaseException:
            file.close()
            raise
        return cache

    def _restore(self) -> None:
        for layer, saved in zip(self.layers, self._record.layers, strict=True):
            if not layer.restore(saved, self._record.length):
                raise ValueError(f"path: {self._file.path} is damaged: a checksum is wrong")
        self._file.saved_length = self._record.length

    @property
    def tokens(self) -> torch.Tensor | None:
        """Those that were saved, int32 [B, n], if they were given to ``save``."""
        return self._record.tokens

    def save(self, tokens: torch.Tensor | None = None) -> None:
        """Make what the cache holds last, whatever becomes of the process.

        Args:
            tokens: ids [B, n] or [n] of what the cache holds, for ``open`` to compare. What is
                behind, such as the last token of an answer, which is never fed, is left out.

        Raises:
            ValueError: the cache is empty, or holds more than ``tokens``.
            OSError: the disk failed; what was saved before is still there.
        """
        lengths = sorted({int(layer.cumulative_length) for layer in self.layers})
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(
                f"save: expected a cache with tokens, as many in all layers: {lengths}"
            )
        batch_size = self.layers[0].keys.shape[0]
        record = self._record.saved([], lengths[0], tokens, batch_size)
        layers = [layer.save(lengths[0]) for layer in self.layers]
        self._record = record.saved(layers, lengths[0], tokens, batch_size)
        self._file.flush()
        self._file.write_record(self._record.as_bytes(), lengths[0])

    def rewind(self, length: int) -> None:
        """Continue at position ``length``."""
        require.integer("length", length, 0)
        self._file.before_write(length)
        for layer in self.layers:
            layer.cumulative_length.fill_(length)

    def close(self) -> None:
        """Let go of the file; the cache is of no use any more. What was not saved is lost.

        The file is free once nobody has a tensor of it.
        """
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self._file.close()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce__()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an OffloadedStaticCache is its file and cannot be copied: go back with "
            "rewind(length), or save() it, copy the file and open() that"
        )


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fsdecode(path))


def _check_config(config: Any) -> None:
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"config: expected the configuration of a model, got {type(config).__name__}"
        )
    if config.is_encoder_decoder:
        raise ValueError("config: models with an encoder keep two caches: use a StaticCache")
    layers = StaticCache(config=config, max_cache_len=1).layers
    if other := sorted(
        {type(layer).__name__ for layer in layers if type(layer) is not StaticLayer}
    ):
        raise ValueError(
            "config: all layers of the model have to attend the whole context, and some have a "
            f"{', '.join(other)}: use a StaticCache"
        )
    if not hasattr(layers[0], "cumulative_length"):
        raise ValueError("OffloadedStaticCache needs transformers 5.17 or newer")
