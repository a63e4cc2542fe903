"""Run steps within a time limit and write what they found, after each of them."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quest_compile import ops
from quest_compile.identity import identity

Row = dict[str, Any]


class StepFailedError(RuntimeError):
    """A step ran and found something wrong."""


class StepSkippedError(RuntimeError):
    """A step does not apply here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Step:
    """``run`` gets the record, adds rows to it and keeps to ``record.seconds_left()``.

    ``seconds``: about how long; with much less left it is skipped.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Record], None]


class Record:
    """The rows of every step, in JSON and Markdown."""

    def __init__(self, folder: Path, seconds: float, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.end = time.monotonic() + seconds
        self.settings = settings
        self.identity = identity() | {"cuda_kernels": ops.cuda_kernels()}
        self.steps: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def has_failures(self) -> bool:
        return any(step["status"] == "failed" for step in self.steps)

    def run(self, step: Step) -> None:
        """Run one step; it cannot stop the others."""
        found: dict[str, Any] = {"name": step.name, "title": step.title, "status": "ok"}
        found |= {"why": "", "rows": []}
        self.steps.append(found)
        start = time.monotonic()
        if self.seconds_left() < 0.6 * step.seconds:
            found["status"], found["why"] = "skipped", f"{self.seconds_left():.0f} s left"
        else:
            print(f"\n== {step.title} ({self.seconds_left():.0f} s left)", flush=True)
            try:
                step.run(self)
            except StepSkippedError as why:
                found["status"], found["why"] = "skipped", str(why)
            except StepFailedError as why:
                found["status"], found["why"] = "failed", str(why)
            except Exception as error:
                traceback.print_exc()
                found["status"] = "failed"
                found["why"] = f"{type(error).__name__}: {error}"[:500]
        found["seconds"] = round(time.monotonic() - start, 1)
        print(
            f"-- {step.name}: {found['status']} {found['why']} ({found['seconds']} s)", flush=True
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.write()

    def add(self, **row: Any) -> None:
        """A row of the running step, printed and written at once."""
        self.steps[-1]["rows"].append(row)
        print("  " + "  ".join(f"{key} {_text(value)}" for key, value in row.items()), flush=True)
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {
            "identity": self.identity,
            "settings": self.settings,
            "steps": self.steps,
            "notes": self.notes,
        }
        (self.folder / "gpu-check.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (self.folder / "gpu-check.md").write_text(markdown(found), "utf-8")


def markdown(found: dict[str, Any]) -> str:
    """The page of what is in gpu-check.json."""
    lines = ["# gpu-check", ""]
    lines += [f"- {key}: {value}" for key, value in found["identity"].items()]
    lines += [f"- {note}" for note in found["notes"]]
    for step in found["steps"]:
        lines += ["", f"## {step['title']}", ""]
        seconds = step.get("seconds")
        took = "running" if seconds is None else f"{seconds} s"
        lines += [f"{step['status']} ({took}) {step['why']}".rstrip(), ""]
        lines += _table(step["rows"])
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    """Rows with the same keys side by side."""
    lines: list[str] = []
    keys: list[str] = []
    for row in rows:
        if list(row) != keys:
            keys = list(row)
            lines += ["", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
        lines.append("| " + " | ".join(_text(row[key]) for key in keys) + " |")
    return lines


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
