"""What is asked: contexts and questions, in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ANSWER, PERPLEXITY, AGREEMENT, COPY = "answer", "perplexity", "agreement", "copy"
# Names of tasks; the last one has a number of records behind it.
COPY_TASKS = ("copy", "copy-multi")
RECALL = "recall-"


class NotActiveError(RuntimeError):
    """A method that should leave something out attended everything: there is nothing to compare."""


@dataclasses.dataclass(frozen=True)
class Question:
    """Asked right after the context, one token per decode step.

    ``tokens``: the question; for perplexity and copy what is read, for agreement what comes before
    the continuation. ``answers``: texts that have to be found; ``expected``: token ids instead,
    where the model has no tokenizer; for perplexity and copy the next tokens at the last steps.
    """

    tokens: tuple[int, ...]
    answers: tuple[str, ...] = ()
    expected: tuple[int, ...] = ()
    max_new_tokens: int = 0
    metric: str = "tokens"

    @property
    def num_tokens(self) -> int:
        """Positions behind the context that asking and answering take."""
        return len(self.tokens) + max(self.max_new_tokens - 1, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """``tokens`` int64 [T], prefilled once for all methods, budgets and ``questions``."""

    tokens: torch.Tensor
    questions: tuple[Question, ...]

    @property
    def num_tokens(self) -> int:
        """The context with its longest question and answer."""
        return len(self.tokens) + max(question.num_tokens for question in self.questions)


@dataclasses.dataclass(frozen=True)
class Group:
    """The contexts of a task at one length: ``make(number)`` makes one, always the same.

    ``length``: tokens asked for; 0 where a file gives contexts of any length.
    ``max_seq_len``: what the static cache must hold. ``kind``: how it is measured.
    """

    task: str
    length: int
    num_contexts: int
    max_seq_len: int
    make: Callable[[int], Context]
    kind: str = ANSWER
