"""Decode steps of llama.cpp at a given context, through the C interface of llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
import time
import weakref
from pathlib import Path
from typing import Any

from quest_compile.bench.llama_cpp.kv_state import KvState

_FEW_TOKENS = 16


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


class LlamaModel:
    """A loaded GGUF file."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.api: Any = llama_cpp.llama_cpp
        self._keep_quiet = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self._keep_quiet, None)
        self.api.llama_backend_init()
        self.version: str = llama_cpp.__version__
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise ValueError(f"llama.cpp does not load {path}")
        weakref.finalize(self, self.api.llama_model_free, self.handle)


class LlamaSession:
    """A context of llama.cpp whose cache holds ``num_tokens`` tokens; ``step`` decodes one more."""

    def __init__(
        self, model: LlamaModel, num_tokens: int, *, flash_attention: bool, threads: int, spare: int
    ) -> None:
        # A context is freed before its model.
        self._model = model
        self._api = model.api
        params = self._api.llama_context_default_params()
        params.n_ctx = num_tokens + max(spare, _FEW_TOKENS)
        params.n_batch = params.n_ubatch = 64
        params.n_threads = params.n_threads_batch = threads
        # LLAMA_FLASH_ATTN_TYPE_DISABLED and _ENABLED of llama.h; the default is to choose.
        params.flash_attn_type = int(flash_attention)
        self._context = self._api.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {params.n_ctx} tokens")
        weakref.finalize(self, self._api.llama_free, self._context)
        self._token = (self._api.llama_token * 1)(1)
        self._fill(num_tokens)
        self.num_tokens = num_tokens

    def step(self) -> float:
        """Seconds of one decode step; the token stays in the cache."""
        start = time.perf_counter()
        self._decode(self._token)
        seconds = time.perf_counter() - start
        self.num_tokens += 1
        return seconds

    def rewind(self, num_tokens: int) -> None:
        """Forget all tokens behind the first ``num_tokens``."""
        memory = self._api.llama_get_memory(self._context)
        if not self._api.llama_memory_seq_rm(memory, 0, num_tokens, -1):
            raise RuntimeError("llama.cpp does not remove tokens from its cache")
        self.num_tokens = num_tokens

    def _decode(self, tokens: Any) -> None:
        batch = self._api.llama_batch_get_one(tokens, len(tokens))
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_synchronize(self._context)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _fill(self, num_tokens: int) -> None:
        """A few tokens by decoding, the rest by a state that repeats them."""
        few = min(_FEW_TOKENS, num_tokens)
        self._decode((self._api.llama_token * few)(*range(1, few + 1)))
        if few == num_tokens:
            return
        size = self._api.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = self._api.llama_state_seq_get_data(self._context, buffer, size, 0)
        data = KvState(bytes(buffer[:written])).repeated(num_tokens)
        filled = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        if not self._api.llama_state_seq_set_data(self._context, filled, len(data), 0):
            raise ValueError("llama.cpp refuses a state of repeated tokens")
        memory = self._api.llama_get_memory(self._context)
        last = self._api.llama_memory_seq_pos_max(memory, 0)
        if last != num_tokens - 1:
            raise ValueError(f"llama.cpp took {last + 1} of {num_tokens} tokens")
