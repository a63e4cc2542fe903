"""``--quantize``: the weights of linear layers in fewer bits, by torchao."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS = ("int8",)


def add_quantize_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", choices=WEIGHTS, help="weights in 8 bits; needs pip install torchao"
    )


def check_quantize(name: str | None) -> None:
    """Before a model is loaded.

    Raises:
        ValueError: torchao is not installed.
    """
    if name is not None and importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"--quantize {name} needs torchao, which is not installed: pip install torchao"
        )


def quantize(model: Any, name: str | None) -> Any:
    """The same model, its ``nn.Linear`` weights quantised in place; None: as it is.

    ``"int8"``: 8 bits and a scale per output channel; activations keep their dtype.

    Raises:
        ValueError: torchao is not installed.
    """
    check_quantize(name)
    if name is not None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes in memory; of a quantised tensor those of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, part)) for part in parts)
