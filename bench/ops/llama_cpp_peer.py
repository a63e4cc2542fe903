"""llama.cpp's attention of one layer: a step at the context, less a step at an empty one.

The model has one layer of the shape and next to nothing else, so the difference of two steps is the
attention over the context (and the longer mask). Its cache is float16 whatever the dtype of ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quest_compile.bench.llama_cpp.gguf_file import one_layer_shape, write_gguf
from quest_compile.bench.llama_cpp.session import LlamaModel, LlamaSession, is_installed
from quest_compile.bench.ops.inputs import CacheFlush, Workload
from quest_compile.bench.rounds import Sampler

METHODS = {"llama_cpp": False, "llama_cpp_flash": True}
_SHORT_CONTEXT = 16
_SHORT_STEPS = 15

Peers = dict[str, tuple[Sampler, dict[str, Any]]]


def peers_of(wanted: list[str] | None) -> Callable[[Workload], Peers] | None:
    """Makes the samplers of llama.cpp for a workload; None where it is not to be measured."""
    names = [name for name in METHODS if wanted is None or name in wanted]
    if not names:
        return None
    if not is_installed():
        if wanted is not None:
            raise ImportError("llama.cpp: pip install 'quest-compile[llama-cpp]'")
        return None

    def add(workload: Workload) -> Peers:
        if workload.batch != 1 or workload.device != "cpu":
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.gguf"
            write_gguf(path, one_layer_shape(workload.layer))
            model = LlamaModel(path)
        return {name: _peer(model, workload, METHODS[name]) for name in names}

    return add


def _peer(
    model: LlamaModel, workload: Workload, flash_attention: bool
) -> tuple[Sampler, dict[str, Any]]:
    flush = CacheFlush("cpu")

    def session(num_tokens: int) -> LlamaSession:
        return LlamaSession(
            model,
            num_tokens,
            flash_attention=flash_attention,
            threads=workload.threads,
            spare=64,
        )

    short, long = session(_SHORT_CONTEXT), session(workload.context)

    def seconds(of: LlamaSession, num_tokens: int) -> float:
        flush()
        taken = of.step()
        of.rewind(num_tokens)
        return taken

    empty = min(seconds(short, _SHORT_CONTEXT) for _ in range(_SHORT_STEPS))

    def sample(number: int) -> float:
        # A step is never that short; pyperf takes no value that is not positive.
        return max(seconds(long, workload.context) - empty, 1e-9)

    facts = {
        "llama_cpp_python": model.version,
        "cache_dtype": "float16",
        "step_at_empty_context_seconds": empty,
    }
    return sample, facts
