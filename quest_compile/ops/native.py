"""The native library: where it is, whether it is loaded, and why not."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = "libquest.so"
_VARIABLE = "QUEST_COMPILE_NATIVE"
_PATH_VARIABLE = "QUEST_COMPILE_LIBRARY"


class NativeLibraryWarning(UserWarning):
    """Operators run as plain torch, which is slow, because there is no kernel for them."""


@dataclasses.dataclass(frozen=True)
class NativeStatus:
    """Which kernels serve.

    ``info``: the kernels of the library, e.g. "cpu:avx512_bf16", or "torch reference".
    ``reason``: why the library is not loaded; empty if it is.
    """

    loaded: bool
    info: str
    reason: str


_status: NativeStatus | None = None
_announced: set[str] = set()


def native_status() -> NativeStatus:
    """Loads the library at the first call, which is the import of ``quest_compile.ops``."""
    global _status
    if _status is None:
        _status = _load()
    return _status


def warn_if_missing() -> None:
    """Announce once that the library is not there."""
    status = native_status()
    if not status.loaded:
        _announce("", f"the kernels of quest_compile are not in use: {status.reason}.")


def announce_reference(name: str, tensor: Tensor) -> None:
    """Announce once that plain torch serves this operator on the device of ``tensor``."""
    device = tensor.device.type
    if not native_status().loaded and device == "cpu":
        warn_if_missing()
    else:
        _announce(f"{device} {name}", f"quest_compile has no kernel for quest::{name} on {device}.")


def announce_slow(subject: str, message: str) -> None:
    """Announce once per subject that plain torch serves a call on CUDA, and why."""
    _announced.add("cuda")
    _announce(subject, message)


def _announce(subject: str, message: str) -> None:
    if subject not in _announced:
        _announced.add(subject)
        warnings.warn(
            f"{message} Plain torch serves instead: right, but slow.",
            NativeLibraryWarning,
            stacklevel=4,
        )


def _load() -> NativeStatus:
    reference = "torch reference"
    if os.environ.get(_VARIABLE) == "0":
        return NativeStatus(False, reference, f"disabled by {_VARIABLE}=0")
    forced = os.environ.get(_PATH_VARIABLE)
    path = Path(forced) if forced else _find()
    if path is None:
        return NativeStatus(False, reference, f"{_LIBRARY} is not installed")
    try:
        torch.ops.load_library(str(path))
        info = torch.ops.quest.native_info()
    except Exception as error:
        return NativeStatus(False, reference, f"{path.name} does not load: {error}")
    return NativeStatus(True, info, "")


def _find() -> Path | None:
    # An editable install has the Python files in the source tree and the library elsewhere.
    for folder in sys.modules["quest_compile"].__path__:
        if (path := Path(folder, _LIBRARY)).is_file():
            return path
    path = Path(str(importlib.resources.files("quest_compile") / _LIBRARY))
    return path if path.is_file() else None
