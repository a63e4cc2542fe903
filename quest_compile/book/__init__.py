"""Pages of Moby-Dick with sentences placed in them, and tasks: to finish what is begun.

What is asked was settled before Quest had answered once: what dense attention finished, and one
sentence that it did not (the model has a name of its own for the cat).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

FILE = Path(__file__).parent / "moby_dick.txt"
TITLE = "Moby-Dick, chapters 12 to 15"


@dataclasses.dataclass(frozen=True)
class Placed:
    """The sentence ``begun`` + " " + ``rest`` + "." stands after ``depth`` of the book."""

    depth: float
    begun: str
    rest: str
    is_asked: bool = True


PLACED = (
    Placed(0.08, "The harbour master of Port Aldway was called", "Silas Brandreth"),
    Placed(0.18, "The ship's cat of the Hesper was called", "Marzipan"),
    Placed(0.29, "The secret number of the captain's iron chest is", "74029"),
    Placed(0.38, "The stolen compass lay hidden beneath the floor of", "the old windmill"),
    Placed(
        0.47, "The favourite dish of the widow Pemberton was", "roasted pheasant with plums", False
    ),
    Placed(0.58, "The lighthouse of Gull Rock was painted", "green and yellow"),
    Placed(0.68, "The password of the night watch is", "copper kettle"),
    Placed(0.77, "The schoolmaster Ezra Quill played", "the violoncello every Thursday", False),
    Placed(0.90, "The treasure map was sold to", "a Portuguese baker for eleven shillings", False),
)
# Of the book itself; the rest of the sentence has to follow.
BEGUN = (
    "Queequeg was a native of Rokovoko, an island far away to",
    "Look now at the wondrous traditional story of how this island",
)


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """Of the book, each in one line."""
    text = FILE.read_text(encoding="utf-8")
    return tuple(" ".join(each.split()) for each in text.split("\n\n") if each.strip())


def text() -> str:
    """The book with the placed sentences, each a paragraph of its own."""
    made, end, waiting = [], 0, list(PLACED)
    total = sum(map(len, paragraphs()))
    for paragraph in paragraphs():
        made.append(paragraph)
        end += len(paragraph)
        while waiting and end >= waiting[0].depth * total:
            placed = waiting.pop(0)
            made.append(f"{placed.begun} {placed.rest}.")
    return "\n\n".join(made)


@dataclasses.dataclass(frozen=True)
class Task:
    """``begun`` again behind the book; right is what goes on with ``wanted``, as there."""

    begun: str
    wanted: str
    max_new_tokens: int

    @property
    def prompt(self) -> str:
        return f"\n\n{self.begun}"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.wanted, "\n")

    def is_right(self, answer: str) -> bool:
        return " ".join(answer.split()).startswith(self.wanted)


def tasks() -> list[Task]:
    placed = [Task(each.begun, each.rest, 12) for each in PLACED if each.is_asked]
    return [*placed, *map(_to_continue, BEGUN)]


def _to_continue(begun: str) -> Task:
    (paragraph,) = (each for each in paragraphs() if begun in each)
    rest, end, _ = paragraph.partition(begun)[2].partition(".")
    return Task(begun, rest.strip() + end, 12)
