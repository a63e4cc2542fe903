"""Which kernels serve CUDA tensors: native, Triton, FlashInfer where asked for, or plain torch."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.ops import checks, flashinfer_attention
from quest_compile.ops.counters import count_cuda_call
from quest_compile.ops.native import announce_refused, announce_slow, native_status

KERNELS_VARIABLE = "QUEST_COMPILE_CUDA_KERNELS"
_CHOICES = ("native", "triton", "torch", "flashinfer")
# Operators with kernels of their own for CUDA tensors.
NAMES = (
    "update_page_summary",
    "score_pages",
    "select_pages",
    "attend_pages",
    "dense_decode",
    "sparse_decode",
    "sparse_decode_step",
)
_providers: dict[str, str] = {}
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Register what serves each operator on CUDA; native kernels are registered already.

    Raises:
        ValueError: the environment variable QUEST_COMPILE_CUDA_KERNELS has an unknown value.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "")
    if wanted not in ("", *_CHOICES):
        names = ", ".join(_CHOICES)
        raise ValueError(f"{KERNELS_VARIABLE}: expected one of {names}, got {wanted!r}")
    for name in NAMES:
        has_native = native_status().loaded and _has_native(name)
        _providers[name] = provider = _choose(name, wanted, has_native)
        if provider != "native" and (provider != "torch" or has_native):
            library = torch.library.Library("quest", "IMPL", "CUDA")
            library.impl(name, _OPERATORS[provider](name))
            _libraries.append(library)


def provider_of(name: str) -> str:
    """What serves this operator on CUDA: "native", "triton", "flashinfer" or "torch"."""
    return _providers.get(name, "torch")


def cuda_kernels() -> str:
    """What serves on CUDA, for reports: e.g. "native", "triton 3.7.1", "torch reference, slow"."""
    found: dict[str, list[str]] = {}
    for name, provider in _providers.items():
        found.setdefault(provider, []).append(name)
    texts = []
    for provider, names in found.items():
        text = {
            "triton": f"triton {_triton_version()}",
            "torch": f"torch reference, slow{_why()}",
            "flashinfer": _flashinfer_version(),
        }
        only = "" if len(found) == 1 else f" ({', '.join(names)})"
        texts.append(text.get(provider, provider) + only)
    return ", ".join(texts)


def _choose(name: str, wanted: str, has_native: bool) -> str:
    if wanted == "flashinfer" and name in flashinfer_attention.NAMES:
        return "flashinfer"
    if wanted == "torch":
        return "torch"
    if has_native and wanted != "triton":
        return "native"
    return "triton" if wanted != "native" and _triton_version() else "torch"


def _has_native(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"quest::{name}", "CUDA")


@functools.cache
def _triton_version() -> str:
    """Without importing it; empty where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ""
    for package in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _flashinfer_version() -> str:
    if not flashinfer_attention.is_installed():
        return "flashinfer (not installed: pip install 'quest_compile[flashinfer]')"
    try:
        return f"flashinfer {importlib.metadata.version('flashinfer-python')}"
    except importlib.metadata.PackageNotFoundError:
        return "flashinfer of unknown version"


def _why() -> str:
    wanted = os.environ.get(KERNELS_VARIABLE)
    if wanted in ("native", "triton", "torch"):
        return f" ({KERNELS_VARIABLE}={wanted})"
    return "" if _triton_version() else " (no native kernels, and triton is not installed)"


def triton_operator(name: str) -> Callable[..., Any]:
    """The operator on Triton kernels; where they do not load plain torch serves, and is said."""

    def call(*arguments: Any, **settings: Any) -> Any:
        kernels, why = _import_triton_kernels()
        if why:
            subject = f"cuda {name} {why}"
            announce_slow(subject, f"no kernel for quest::{name} on CUDA takes this: {why}.")
            return _reference(name)(*arguments, **settings)
        arguments = _in_full(name, arguments)
        _check_of(name)(*arguments, **settings)
        count_cuda_call(name, arguments, settings)
        return getattr(kernels, name)(*arguments, **settings)

    return call


def flashinfer_operator(name: str) -> Callable[..., Any]:
    """The operator on FlashInfer; what it does not take goes to Triton's, and is said."""
    otherwise = triton_operator(name)

    def call(*arguments: Any, **settings: Any) -> Any:
        arguments = _in_full(name, arguments)
        _check_of(name)(*arguments, **settings)
        query, keys, values, *_, seq_lens, mask = arguments
        page_size = settings.get("page_size", 16)
        if name == "dense_decode":
            page_size = flashinfer_attention.page_size_of(keys)
        why = flashinfer_attention.why_not(query, keys, values, seq_lens, mask, page_size)
        if why:
            announce_refused(f"flashinfer {name} {why}", f"FlashInfer does not take this: {why}.")
            return otherwise(*arguments, **settings)
        count_cuda_call(name, arguments, settings)
        return getattr(flashinfer_attention, name)(*arguments, **settings)

    return call


def _in_full(name: str, arguments: tuple) -> tuple:
    """The dispatcher leaves out what has its default, which is None for tensors."""
    return (*arguments, *[None] * (_num_positional(name) - len(arguments)))


@functools.cache
def _num_positional(name: str) -> int:
    schema = getattr(torch.ops.quest, name).default._schema
    return sum(not argument.kwarg_only for argument in schema.arguments)


def _reference(name: str) -> Callable[..., Any]:
    """The plain-torch operator, checks and counters included."""
    return getattr(sys.modules[f"quest_compile.ops.{name}"], f"_{name}_reference")


def _check_of(name: str) -> Callable[..., None]:
    if name == "dense_decode":
        return _check_dense_decode
    return sys.modules[f"quest_compile.ops.{name}"]._check


def _check_dense_decode(query, keys, values, seq_lens, attn_mask=None, *, scale=None):
    checks.attention(query, keys, values, seq_lens, attn_mask, scale)


_OPERATORS = {
    "triton": triton_operator,
    "flashinfer": flashinfer_operator,
    "torch": _reference,
}


@functools.cache
def _import_triton_kernels() -> tuple[Any, str]:
    try:
        from quest_compile.ops.triton import operators
    except Exception as error:
        return None, f"triton does not load ({error})"
    return operators, ""
