"""Texts that users give."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """A file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; the message says where.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error
