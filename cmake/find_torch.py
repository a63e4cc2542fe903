"""Find the torch package to build against, without importing it."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

# The stable ABI header: torch 2.10, the version CMakeLists.txt targets, is the oldest that serves.
_HEADER = Path("include", "torch", "csrc", "stable", "library.h")


def find_torch() -> Path | None:
    """The torch directory of the environment that is being installed into; None if there is none.

    QUEST_COMPILE_TORCH_DIR overrides the search. pip's isolated build hides the environment's
    packages from sys.path, but sysconfig still names their folder.
    """
    forced = os.environ.get("QUEST_COMPILE_TORCH_DIR")
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    candidates = [Path(forced)] if forced else [Path(folder, "torch") for folder in folders]
    return next((path.resolve() for path in candidates if (path / _HEADER).exists()), None)


if __name__ == "__main__":
    torch_dir = find_torch()
    if torch_dir is None:
        sys.exit("no torch with stable ABI headers: install torch or set QUEST_COMPILE_TORCH_DIR")
    print(torch_dir.as_posix(), end="")
