"""What was measured so far, a line per context, method and budget: an interrupted run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One line: all questions of a context with one method; ``budget`` 0 for dense."""

    task: str
    length: int
    context: int
    method: str
    budget: int | float


class Records:
    """The file ``records.jsonl`` of a folder.

    Its first line has the settings all lines share. ``conditions``: commit, kernels, versions and
    processor of each run that added records under other ones; a record has the number of its own.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        resume: bool,
        conditions: dict[str, Any] | None = None,
    ) -> None:
        """Start a new file, or with ``resume`` read what is there, and warn on stderr when it was
        measured under other conditions.

        Raises:
            ValueError: there are records and ``resume`` is not set, they were made with other
                settings, or a line before the last is broken.
        """
        self.path = folder / "records.jsonl"
        self.settings = settings
        self.lines: dict[Cell, dict[str, Any]] = {}
        self.conditions: list[dict[str, Any]] = []
        self._now = json.loads(json.dumps(conditions or {}))
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if not resume:
                raise ValueError(
                    f"{self.path} exists: go on with it (--resume), or choose another --out"
                )
            self._read(settings)
            self._warn_of_other_conditions()
        else:
            self._append({"settings": settings})

    def add(self, cell: Cell, **fields: Any) -> None:
        """Write one finished cell; it survives whatever happens next."""
        if self._now not in self.conditions:
            self.conditions.append(self._now)
            self._append({"conditions": self._now})
        fields["conditions"] = self.conditions.index(self._now)
        self.lines[cell] = fields
        self._append({"cell": list(cell), **fields})

    def _warn_of_other_conditions(self) -> None:
        for found in self.conditions:
            if found != self._now:
                was, now = _differences(found, self._now)
                print(
                    f"quest-compile: warning: {self.path} has cells measured with {was}; this run "
                    f"has {now}: the results name both",
                    file=sys.stderr,
                )

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
                elif "cell" not in fields:
                    self.conditions.append(fields["conditions"])
                else:
                    self.lines[Cell(*fields.pop("cell"))] = fields
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} line {number} is broken: {error!r}") from error
        if not complete:
            self._append({"settings": settings})


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        was, now = _differences(found, wanted)
        raise ValueError(f"{path} was made with {was}; now {now}: choose another --out")


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, str]:
    """``name=value, ...`` of both, where they differ."""
    names = [n for n in sorted(found.keys() | wanted.keys()) if found.get(n) != wanted.get(n)]
    was, now = (", ".join(f"{n}={x.get(n)!r}" for n in names) for x in (found, wanted))
    return was, now
