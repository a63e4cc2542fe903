"""The build backend: scikit-build-core, told whether to build the native library.

QUEST_COMPILE_NATIVE unset: the library is built if there is a C++ compiler, else the package is
installed without it and runs on plain torch. 0: never built. 1: a missing compiler is an error.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

from find_torch import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Only its headers are used, and the library they make runs with torch 2.10 and later.
TORCH = "torch==2.13.0"

_Config = dict[str, Any] | None


def find_compiler() -> str | None:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def reason_for_no_library() -> str | None:
    """Why the native library is not to be built; None if it is."""
    wanted = os.environ.get("QUEST_COMPILE_NATIVE", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"quest-compile: QUEST_COMPILE_NATIVE must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return "QUEST_COMPILE_NATIVE=0"
    obstacle = None
    if sys.platform != "linux":
        obstacle = f"it is not supported on {sys.platform}"
    elif find_compiler() is None:
        obstacle = "there is no C++ compiler (c++, g++ or clang++ on PATH, or CXX)"
    if obstacle and wanted == "1":
        sys.exit(f"quest-compile: QUEST_COMPILE_NATIVE=1, but {obstacle}")
    return obstacle


def _settings(config: _Config) -> _Config:
    return config if reason_for_no_library() is None else {**(config or {}), "wheel.cmake": "false"}


def _requires(hook: Any, config: _Config) -> list[str]:
    torch = [TORCH] if reason_for_no_library() is None and find_torch() is None else []
    return [*hook(_settings(config)), *torch]


def _built(hook: Any, directory: str, config: _Config, metadata_directory: str | None) -> str:
    reason = reason_for_no_library()
    if reason is not None:
        print(f"quest-compile: installing WITHOUT the native library: {reason}.", flush=True)
        print("quest-compile: all operators run as plain torch, which is slow.", flush=True)
        return hook(directory, _settings(config), metadata_directory)
    try:
        return hook(directory, config, metadata_directory)
    except BaseException:
        print(
            "quest-compile: the native library could not be built (see above);"
            " QUEST_COMPILE_NATIVE=0 installs without it.",
            file=sys.stderr,
            flush=True,
        )
        raise


def get_requires_for_build_wheel(config_settings: _Config = None) -> list[str]:
    return _requires(_build.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: _Config = None) -> list[str]:
    return _requires(_build.get_requires_for_build_editable, config_settings)


def prepare_metadata_for_build_wheel(directory: str, config_settings: _Config = None) -> str:
    return _build.prepare_metadata_for_build_wheel(directory, _settings(config_settings))


def prepare_metadata_for_build_editable(directory: str, config_settings: _Config = None) -> str:
    return _build.prepare_metadata_for_build_editable(directory, _settings(config_settings))


def build_wheel(
    directory: str, config_settings: _Config = None, metadata_directory: str | None = None
) -> str:
    return _built(_build.build_wheel, directory, config_settings, metadata_directory)


def build_editable(
    directory: str, config_settings: _Config = None, metadata_directory: str | None = None
) -> str:
    return _built(_build.build_editable, directory, config_settings, metadata_directory)
