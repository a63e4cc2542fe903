"""A file that one process has at a time."""

from __future__ import annotations

import fcntl
import os


def open_locked(name: str, flags: int, verb: str) -> int:
    """The file of this name, locked.

    Raises:
        BlockingIOError: it is locked.
        OSError: it cannot be opened.
    """
    while True:
        try:
            fd = os.open(name, flags, 0o666)
        except OSError as error:
            text = f"path: cannot {verb} {name}: {error.strerror}"
            raise type(error)(error.errno, text) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have renamed or deleted it in between.
            if os.path.exists(name) and os.path.samestat(os.fstat(fd), os.stat(name)):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            text = f"path: {name} is in use, by another process or another cache of this one"
            raise BlockingIOError(error.errno, text) from None
        os.close(fd)
