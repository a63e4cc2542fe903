"""Which kernels serve CUDA tensors: native, Triton, or plain torch."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.ops.counters import count_cuda_call
from quest_compile.ops.native import announce_slow, native_status
from quest_compile.ops.operator import OPERATORS

KERNELS_VARIABLE = "QUEST_COMPILE_CUDA_KERNELS"
_CHOICES = ("native", "triton", "torch")
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
    for name, operator in OPERATORS.items():
        if "cuda" not in operator.kernels:
            continue
        has_native = native_status().loaded and _has_native(name)
        _providers[name] = provider = _choose(name, wanted, has_native)
        if provider != "native" and (provider != "torch" or has_native):
            library = torch.library.Library("quest", "IMPL", "CUDA")
            served = triton_operator(name) if provider == "triton" else operator.serve
            library.impl(name, served)
            _libraries.append(library)


def provider_of(name: str) -> str:
    """What serves this operator on CUDA: "native", "triton" or "torch"."""
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
        }
        only = "" if len(found) == 1 else f" ({', '.join(names)})"
        texts.append(text.get(provider, provider) + only)
    return ", ".join(texts)


def _choose(name: str, wanted: str, has_native: bool) -> str:
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


def _why() -> str:
    wanted = os.environ.get(KERNELS_VARIABLE)
    if wanted in ("native", "triton", "torch"):
        return f" ({KERNELS_VARIABLE}={wanted})"
    return "" if _triton_version() else " (no native kernels, and triton is not installed)"


def triton_operator(name: str) -> Callable[..., Any]:
    """The operator on Triton kernels; where they do not load plain torch serves, and is said."""

    operator = OPERATORS[name]

    def call(*tensors: Any, **settings: Any) -> Any:
        kernels, why = _import_triton_kernels()
        if why:
            subject = f"cuda {name} {why}"
            announce_slow(subject, f"no kernel for quest::{name} on CUDA takes this: {why}.")
            return operator.serve(*tensors, **settings)
        tensors = operator.in_full(tensors)
        operator.check(*tensors, **settings)
        count_cuda_call(name, tensors, settings)
        return getattr(kernels, name)(*tensors, **settings)

    return call


@functools.cache
def _import_triton_kernels() -> tuple[Any, str]:
    try:
        from quest_compile.ops.triton import operators
    except Exception as error:
        return None, f"triton does not load ({error})"
    return operators, ""
