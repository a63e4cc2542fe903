"""The command line says ``--help`` and finds mistakes without torch, which takes seconds to import.

``import quest_compile`` imports torch and registers the operators, and examples rely on that. Only
the process of a command waits with both until ``import_all``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys


def _is_command() -> bool:
    name = (sys.argv or [""])[0]
    # While Python looks for the module of -m, that stands for its path; behind come the arguments.
    if name == "-m":
        module = sys.orig_argv[-len(sys.argv)]
        return re.fullmatch(r"(-[A-Za-z]*m)?quest_compile", module) is not None
    return os.path.basename(name) == "quest-compile"


_is_waiting = _is_command()


def is_waiting() -> bool:
    """Was Python started as ``quest-compile`` or ``python -m quest_compile``, and not more yet?"""
    return _is_waiting


def import_all() -> None:
    """What ``import quest_compile`` does elsewhere."""
    global _is_waiting
    if _is_waiting:
        _is_waiting = False
        importlib.reload(importlib.import_module("quest_compile"))
