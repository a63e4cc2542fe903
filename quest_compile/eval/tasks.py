"""From names of tasks to groups of contexts that fit the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quest_compile.eval.encode import Encoder
from quest_compile.eval.generators import TEXT_TASKS, TextTask
from quest_compile.eval.jsonl import Row, read_rows
from quest_compile.eval.needles import read_sentences
from quest_compile.eval.samples import PERPLEXITY, Context, Group, Question
from quest_compile.text_files import read_text


def answer_group(
    name: str, length: int, samples: int, encoder: Encoder, book: Sequence[str], seed: int
) -> Group:
    """Contexts of at most ``length`` tokens, question and answer included.

    Raises:
        ValueError: the task needs more tokens, or a book it does not get.
    """
    task = TEXT_TASKS[name]
    if task.needs_book and not book:
        raise ValueError(f"task {name} hides its needles in a book: give one with --haystack FILE")

    def make(number: int, size: int | None = None) -> Context:
        rng = random.Random(f"{seed}/{name}/{length}/{number}")
        sample = task.generate(fitting if size is None else size, number, rng, book)
        questions = tuple(
            Question(
                tuple(encoder.question(question, prefix)),
                answers,
                max_new_tokens=task.max_new_tokens,
                metric=task.metric,
            )
            for question, prefix, answers in sample.questions
        )
        return Context(torch.tensor(encoder.context(sample.context)), questions)

    def make_fitting(number: int) -> Context:
        size = fitting
        while (context := make(number, size)).num_tokens > length and size > task.min_size:
            size = max(task.min_size, min(size - 1, size * 99 // 100))
        return context

    def num_tokens(size: int) -> int:
        return make(0, size).num_tokens

    least = num_tokens(task.min_size)
    if least > length:
        raise ValueError(
            f"task {name} does not fit into --lengths {length}: the smallest sample takes {least} "
            "tokens of this tokenizer"
        )
    fitting = _largest_fitting(task, length, num_tokens)
    num_contexts = -(-samples // task.num_questions)
    return Group(name, length, num_contexts, length, make_fitting)


def _largest_fitting(task: TextTask, length: int, num_tokens: Callable[[int], int]) -> int:
    """Units of filler, by doubling and bisection."""
    low, high = task.min_size, max(2 * task.min_size, 16)
    while num_tokens(high) <= length:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if num_tokens(middle) <= length else (low, middle)
    return low


def jsonl_groups(path: Path, samples: int, encoder: Encoder, max_tokens: int) -> list[Group]:
    """A group per task of the file, of its first ``samples`` rows; same contexts share a prefill.

    Raises:
        ValueError: a row is bad, or longer than ``max_tokens``.
    """
    by_task: dict[str, dict[str, list[Row]]] = {}
    counts: dict[str, int] = {}
    for row in read_rows(path):
        counts[row.task] = counts.get(row.task, 0) + 1
        if counts[row.task] <= samples:
            by_task.setdefault(row.task, {}).setdefault(row.context, []).append(row)

    groups = []
    for task, contexts in by_task.items():
        made = [_context_of(rows, encoder) for rows in contexts.values()]
        for context, rows in zip(made, contexts.values()):
            if context.num_tokens > max_tokens:
                raise ValueError(
                    f"{path} line {rows[0].line}: task {task} does not fit the model: context, "
                    f"question and answer take {context.num_tokens} of {max_tokens} tokens"
                )
        most = max(context.num_tokens for context in made)
        groups.append(Group(task, 0, len(made), most, made.__getitem__))
    return groups


def _context_of(rows: list[Row], encoder: Encoder) -> Context:
    questions = tuple(
        Question(
            tuple(encoder.question(row.question, row.answer_prefix)),
            row.answers,
            max_new_tokens=row.max_new_tokens,
            metric=row.metric,
        )
        for row in rows
    )
    return Context(torch.tensor(encoder.context(rows[0].context)), questions)


def text_group(
    kind: str, path: Path, length: int, windows: int, num_tokens: int, encoder: Encoder
) -> Group:
    """Windows of a text: ``length - num_tokens`` tokens of context, ``num_tokens`` decoded.

    Raises:
        ValueError: the text is too short for one window, or the window for what is decoded.
    """
    tokens = torch.tensor(encoder.plain(read_text(path)))
    if length <= num_tokens + 1:
        raise ValueError(f"--lengths {length} must be more than the {num_tokens} decoded tokens")
    if len(tokens) < length:
        raise ValueError(f"{path} has {len(tokens)} tokens, too few for --lengths {length}")
    beginning = torch.tensor(encoder.beginning(), dtype=torch.int64)

    def make(number: int) -> Context:
        start = (len(tokens) - length) * number // max(windows - 1, 1)
        window = torch.cat([beginning, tokens[start:]])[:length]
        context, read = window[: -num_tokens - 1], tuple(window[-num_tokens - 1 :].tolist())
        if kind == PERPLEXITY:
            return Context(context, (Question(read[:-1], expected=read[1:]),))
        return Context(context, (Question(read[:1], max_new_tokens=num_tokens),))

    return Group(kind, length, windows, length + 1, make, kind)


def book_of(path: Path | None) -> list[str]:
    return [] if path is None else read_sentences(path)
