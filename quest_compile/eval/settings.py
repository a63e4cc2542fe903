"""What all records of a folder have in common, and what may differ only with a warning."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from quest_compile.eval.copy_tasks import text_of
from quest_compile.eval.encode import Encoder
from quest_compile.eval.samples import COPY_TASKS

_OPTIONS = (
    "dtype",
    "quantize",
    "device",
    "page_size",
    "num_dense_layers",
    "inner",
    "seed",
    "decoded",
)
_CONDITIONS = (
    "commit", "kernels", "quest_compile", "torch", "transformers", "cpu_model_name", "cuda_device",
)  # fmt: skip
_DIGEST_LEN = 12
_NUM_VALUES = 1024


def settings_of(args: argparse.Namespace, model: Any, encoder: Encoder | None) -> dict[str, Any]:
    """The model, the files and the options that decide what is asked and answered.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
        "weights": weights_digest(model),
        **{name: getattr(args, name) for name in _OPTIONS},
        "haystack": args.haystack and _file_digest(args.haystack),
        "text": _text_digest(args),
        "jsonl": ", ".join(map(_file_digest, args.jsonl)) or None,
        "chat": encoder is not None and encoder.uses_chat,
    }


def conditions_of(identity: dict[str, Any]) -> dict[str, Any]:
    """Of the identity what may change answers without being a setting."""
    return {name: identity[name] for name in _CONDITIONS if name in identity}


def weights_digest(model: Any) -> str:
    """Of names, shapes and about a thousand values of every weight: a model trained further has
    another, and a large one is not read a second time."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // _NUM_VALUES)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:_DIGEST_LEN]


def _text_digest(args: argparse.Namespace) -> str | None:
    if args.text is not None:
        return _file_digest(args.text)
    # Another Python has another text.
    if set(args.tasks) & set(COPY_TASKS):
        return _named_digest("help() of Python", text_of(None).encode())
    return None


def _file_digest(path: Path) -> str:
    return _named_digest(path.name, path.read_bytes())


def _named_digest(name: str, content: bytes) -> str:
    return f"{name} {hashlib.sha256(content).hexdigest()[:_DIGEST_LEN]}"
