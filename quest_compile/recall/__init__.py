"""Record recall: a task and a small shipped model that answers it over thousands of tokens.

Small enough for tests on a CPU, and yet a model whose answers are wrong when attention reads the
wrong pages. What it proves and what not: `model/README.md`.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quest_compile.recall.task import RecallContext, make_context

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["MODEL_DIR", "RecallContext", "load_model", "make_context", "model_path"]

MODEL_DIR = Path(str(importlib.resources.files(__name__) / "model"))


def model_path() -> Path:
    """The folder with config.json and model.safetensors, for `from_pretrained`.

    Raises:
        FileNotFoundError: the installation lacks the package data.
    """
    for name in ("config.json", "model.safetensors"):
        if not (MODEL_DIR / name).is_file():
            raise FileNotFoundError(f"the recall model is not installed: no {name} in {MODEL_DIR}")
    return MODEL_DIR


def load_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LlamaForCausalLM:
    """Loads the shipped recall model in eval mode.

    3 layers, 4 query and 2 KV heads, head_dim 64, 512 symbols, contexts up to 8192 tokens.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the installation lacks the package data.
    """
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ImportError(
            "load_model needs transformers: pip install 'quest-compile[hf]'"
        ) from error
    model = LlamaForCausalLM.from_pretrained(model_path(), dtype=dtype).eval()
    return model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
