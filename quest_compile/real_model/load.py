"""Models for commands; what is wrong with one is said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from quest_compile.context_length import context_length
from quest_compile.real_model.find import found_model

_Loaded = TypeVar("_Loaded")


def load_config(name: str) -> Any:
    """
    Raises:
        ValueError: see ``found_model``; or it cannot be read.
    """
    from transformers import AutoConfig

    return _load(name, AutoConfig.from_pretrained)


def load_model(name: str, dtype: str, device: str) -> Any:
    """A model for text, in eval mode; ``dtype`` as "float32".

    Raises:
        ValueError: see ``found_model``; or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    return _load(name, load).to(device).eval()


def load_tokenizer(name: str) -> Any:
    """
    Raises:
        ValueError: see ``found_model``; or it has none.
    """
    from transformers import AutoTokenizer

    return _load(name, AutoTokenizer.from_pretrained, "the tokenizer of ")


def _load(name: str, load: Callable[[str], _Loaded], what: str = "") -> _Loaded:
    with found_model(name) as path:
        try:
            return load(path)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot load {what}the model {name}: {reason}") from error


def warn_beyond_context(config: Any, num_tokens: int) -> None:
    """Say on stderr that ``num_tokens`` are more than the model of this config was made for."""
    most = context_length(config)
    if most is not None and num_tokens > most:
        print(
            f"warning: {num_tokens} tokens, prompt and answer, are more than the {most} that the "
            "model was made for: expect nonsense, dense as with Quest",
            file=sys.stderr,
        )
