"""``--cache-file``: a text that was read is kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quest_compile.config import QuestConfig


@dataclasses.dataclass(frozen=True)
class TextCache:
    """``config``: of the backend that will decode."""

    path: Path
    config: QuestConfig

    def new(self, model: Any, max_cache_len: int) -> Any:
        """
        Raises:
            OSError: the file cannot be made.
            ValueError: the model cannot have its cache in a file.
        """
        from quest_compile.offloaded_cache import OffloadedStaticCache

        with _named():
            return OffloadedStaticCache(
                model.config,
                max_cache_len,
                path=self.path,
                num_dense_layers=self.config.num_dense_layers,
                **self.config.page_format.as_kwargs(),
                model=model,
            )

    def reopened(self, model: Any, tokens: torch.Tensor, room: int) -> Any:
        """
        Args:
            tokens: ids [1, n], all that the file holds.
            room: for so many more.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is of another model or text, damaged or too small.
        """
        from quest_compile.offloaded_cache import OffloadedStaticCache

        with _named():
            cache = OffloadedStaticCache.open(model.config, self.path, tokens=tokens, model=model)
            held, left = int(cache.get_seq_length()), cache.get_max_length() - tokens.shape[1]
            if held != tokens.shape[1] or left < room:
                cache.close()
                raise ValueError(
                    f"{self.path} holds {held} tokens and has room for {left} behind the text; "
                    f"expected {tokens.shape[1]} and {room}: delete it, or give another"
                )
        return cache


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Errors name the option."""
    try:
        yield
    except OSError as error:
        raise OSError(f"--cache-file: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--cache-file: {error}") from None
