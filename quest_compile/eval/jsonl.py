"""Samples from a JSONL file, as LongBench and others are exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from quest_compile.eval.metrics import METRICS, OF_TASK
from quest_compile.text_files import read_text

_TYPES: dict[str, Any] = {
    "context": str,
    "question": str,
    "answer_prefix": str,
    "answer": (str, list),
    "max_new_tokens": int,
    "task": str,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line; ``answers`` are the references, of which a line may give one or a list."""

    line: int
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    task: str
    metric: str


def read_rows(path: Path) -> list[Row]:
    """All lines of the file, checked.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON, lacks a field or has a wrong one; the message says which.
    """
    rows = []
    # Not splitlines(): JSON texts may hold other ends of lines.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_read_row(f"{path} line {number}", number, line))
    if not rows:
        raise ValueError(f"{path} has no lines")
    return rows


def _read_row(where: str, number: int, line: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(fields).__name__}")
    missing = [name for name in _TYPES if name not in fields]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(fields)}")
    for name, wanted in _TYPES.items():
        if not isinstance(fields[name], wanted) or isinstance(fields[name], bool):
            raise ValueError(f"{where}: {name} has the wrong type, got {fields[name]!r}")
    answers = fields["answer"]
    answers = [answers] if isinstance(answers, str) else answers
    if not answers or not all(isinstance(answer, str) and answer for answer in answers):
        raise ValueError(f"{where}: answer must be a text or a list of texts, got {answers!r}")
    if fields["max_new_tokens"] < 1:
        raise ValueError(f"{where}: max_new_tokens must be at least 1")
    if not fields["context"] or not fields["question"] + fields["answer_prefix"]:
        raise ValueError(f"{where}: context and question must not be empty")
    metric = fields.get("metric", OF_TASK.get(fields["task"], "string_match_all"))
    if metric not in METRICS:
        raise ValueError(f"{where}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    asked = (fields["question"], fields["answer_prefix"], tuple(answers))
    return Row(number, fields["context"], *asked, fields["max_new_tokens"], fields["task"], metric)
