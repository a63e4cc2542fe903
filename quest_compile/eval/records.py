"""What was measured so far, a line per context, method and budget: an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One line: all questions of a context with one method; ``budget`` 0 for dense."""

    task: str
    length: int
    context: int
    method: str
    budget: int


class Records:
    """The file ``records.jsonl`` of a folder. Its first line has the settings all lines share."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """Start a new file, or with ``resume`` read what is there.

        Raises:
            ValueError: there are records and ``resume`` is not set, they were made with other
                settings, or a line before the last is broken.
        """
        self.path = folder / "records.jsonl"
        self.settings = settings
        self.lines: dict[Cell, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if not resume:
                raise ValueError(
                    f"{self.path} exists: go on with it (--resume), or choose another --out"
                )
            self._read(settings)
        else:
            self._append({"settings": settings})

    def add(self, cell: Cell, **fields: Any) -> None:
        """Write one finished cell; it survives whatever happens next."""
        self.lines[cell] = fields
        self._append({"cell": list(cell), **fields})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, settings: dict[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        # A run that was killed may leave the last line unfinished.
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                fields = json.loads(line)
                if number == 1:
                    _check_same(self.path, fields["settings"], json.loads(json.dumps(settings)))
                else:
                    self.lines[Cell(*fields.pop("cell"))] = fields
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} line {number} is broken: {error!r}") from error
        if not complete:
            self._append({"settings": settings})


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted(found.keys() | wanted.keys())
    differ = [name for name in names if found.get(name) != wanted.get(name)]
    if differ:
        was = ", ".join(f"{name}={found.get(name)!r}" for name in differ)
        now = ", ".join(f"{name}={wanted.get(name)!r}" for name in differ)
        raise ValueError(f"{path} was made with {was}; now {now}: choose another --out")
