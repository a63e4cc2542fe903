"""Long-context tasks made from nothing, or from a book: the ideas are RULER's and the passkey's.

RULER: arXiv 2404.06654, Apache-2.0, whose task names these are; the wording is our own. Passkey:
arXiv 2305.16300, with the sentences that Quest's evaluation uses.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Sequence

from quest_compile.eval import needles
from quest_compile.eval.words import distinct_words


@dataclasses.dataclass(frozen=True)
class TextSample:
    """A context and what is asked about it: (question, start of the answer, references)."""

    context: str
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class TextTask:
    """``generate(size, number, rng, book)``: sample ``number`` with ``size`` units of filler.

    ``book``: sentences to hide things in, for tasks that need them. ``min_size``: units without
    which there is nothing to find. A sample has up to ``num_questions`` questions.
    """

    generate: Callable[[int, int, random.Random, Sequence[str]], TextSample]
    max_new_tokens: int
    metric: str = "string_match_all"
    min_size: int = 0
    needs_book: bool = False
    num_questions: int = 1


def passkey(size: int, number: int, rng: random.Random, book: Sequence[str]) -> TextSample:
    """A number to remember, at depths that fill the context evenly."""
    golden_ratio = 0.6180339887
    depth = round(number * golden_ratio % 1 * size)
    key = str(rng.randint(1, 50000))
    filler = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.",
        *[filler] * depth,
        needle,
        *[filler] * (size - depth),
    ]
    question = ("\nWhat is the pass key?", " The pass key is", (key,))
    return TextSample("\n".join(lines), (question,))


def variable_tracking(
    size: int, number: int, rng: random.Random, book: Sequence[str]
) -> TextSample:
    """A value handed on through five variables: which of them hold it?"""
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
    value = str(rng.randint(10000, 99999))
    steps = [f"VAR {names[0]} = {value}."]
    steps += [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:])]
    text = needles.hide(steps, [needles.NOISE] * size, rng, in_order=True)
    context = f"Keep track of the variables that are assigned in this text.\n{text}"
    question = f"\nWhich variables have the value {value}, directly or through other variables?"
    prefix = f" The five variables with the value {value} are"
    return TextSample(context, ((question, prefix, tuple(names)),))


def common_words(size: int, number: int, rng: random.Random, book: Sequence[str]) -> TextSample:
    """Ten words occur 30 times, all others three times."""
    words = distinct_words(rng, 10 + size)
    listed = words[:10] * 30 + words[10:] * 3
    rng.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    context = f"Here is a numbered list of words. Some occur more often than the others.\n{text}"
    question = "\nWhich ten words occur most often in the list?"
    prefix = " The ten words that occur most often are"
    return TextSample(context, ((question, prefix, tuple(words[:10])),))


def frequent_words(size: int, number: int, rng: random.Random, book: Sequence[str]) -> TextSample:
    """Made-up words; the k-th most frequent occurs as often as 1/k^2."""
    count = max(20, size // 20)
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    weights = [1 / rank**2 for rank in range(1, count + 1)]
    total = sum(weights)
    listed = [
        word
        for word, weight in zip(words, weights)
        for _ in range(max(1, round(size * weight / total)))
    ]
    rng.shuffle(listed)
    context = f"Here is a coded text. Count how often each coded word occurs.\n{' '.join(listed)}"
    question = "\nWhich three coded words occur most often?"
    prefix = " The three coded words that occur most often are"
    return TextSample(context, ((question, prefix, tuple(words[:3])),))


def _needles(**settings) -> Callable[[int, int, random.Random, Sequence[str]], TextSample]:
    def generate(size, number, rng, book):
        return TextSample(*needles.sample(size, rng, book, **settings))

    return generate


TEXT_TASKS = {
    "passkey": TextTask(passkey, 10, "first_number"),
    "niah_single_1": TextTask(_needles(haystack="noise"), 16),
    "niah_single_2": TextTask(_needles(haystack="book"), 16, needs_book=True),
    "niah_single_3": TextTask(_needles(haystack="book", values="uuid"), 40, needs_book=True),
    "niah_multikey_1": TextTask(
        _needles(haystack="book", num_keys=4), 16, needs_book=True, num_questions=4
    ),
    "niah_multikey_2": TextTask(
        _needles(haystack="needles", num_keys=4), 16, min_size=4, num_questions=4
    ),
    "niah_multikey_3": TextTask(
        _needles(haystack="needles", num_keys=4, keys="uuid", values="uuid"),
        40,
        min_size=4,
        num_questions=4,
    ),
    "niah_multivalue": TextTask(_needles(haystack="book", num_values=4), 48, needs_book=True),
    "niah_multiquery": TextTask(
        _needles(haystack="book", num_keys=4, at_once=True), 96, needs_book=True
    ),
    "vt": TextTask(variable_tracking, 40),
    "cwe": TextTask(common_words, 80, min_size=1),
    "fwe": TextTask(frequent_words, 40, min_size=60),
}
