"""Needles in a haystack: keys with values, hidden in noise, in a book, or among other needles."""

from __future__ import annotations

import random
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from quest_compile.eval.words import distinct_pairs
from quest_compile.text_files import read_text

NOISE = "Rain fell on the roof. A cart went by. The kettle was warm. Nobody came to the door."

Asked = tuple[str, str, tuple[str, ...]]


def sample(
    size: int,
    rng: random.Random,
    book: Sequence[str],
    *,
    haystack: str,
    keys: str = "words",
    values: str = "number",
    num_keys: int = 1,
    num_values: int = 1,
    at_once: bool = False,
) -> tuple[str, tuple[Asked, ...]]:
    """A context and its questions, one per key, or one for all keys ``at_once``.

    ``size`` counts lines of noise, words of the book, or needles that nobody asks for.
    """
    num_others = size if haystack == "needles" else 0
    names = _keys(rng, keys, num_keys + num_others)
    what = "number" if values == "number" else "code"
    found = {name: [_value(rng, values) for _ in range(num_values)] for name in names}
    lines = {
        name: [f"One of the secret {what}s of {name} is {value}." for value in found[name]]
        for name in names
    }
    asked = names[:num_keys]
    hidden = [line for name in asked for line in lines[name]]
    if haystack == "needles":
        straw = [line for name in names[num_keys:] for line in lines[name]]
    elif haystack == "noise":
        straw = [NOISE] * size
    else:
        straw = _passage(book, size, rng)
    context = f"Secret {what}s are hidden in this text. Remember them.\n{hide(hidden, straw, rng)}"
    wanted = [asked] if at_once else [[name] for name in asked]
    return context, tuple(_question(what, group, found, num_values) for group in wanted)


def hide(lines: Sequence[str], straw: Sequence[str], rng: random.Random, in_order=False) -> str:
    """The straw with the lines at random places in it, if asked for in their order."""
    places = [rng.randrange(len(straw) + 1) for _ in lines]
    if in_order:
        places.sort()
    by_place: dict[int, list[str]] = {}
    for place, line in zip(places, lines):
        by_place.setdefault(place, []).append(line)
    out: list[str] = []
    for i in range(len(straw) + 1):
        out += by_place.get(i, [])
        out += straw[i : i + 1]
    return "\n".join(out)


def read_sentences(path: Path) -> list[str]:
    """The sentences of a book, each on one line.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read as UTF-8.
        ValueError: there are hardly any sentences in it.
    """
    text = re.sub(r"\s+", " ", read_text(path))
    sentences = re.split(r"(?<=[.!?])\s+(?=[^a-z])", text)
    if len(sentences) < 10:
        raise ValueError(f"{path} has {len(sentences)} sentences; a haystack needs more")
    return sentences


def _passage(book: Sequence[str], num_words: int, rng: random.Random) -> list[str]:
    """Neighbouring sentences with at most so many words, from the beginning again at the end."""
    taken: list[str] = []
    for i in range(rng.randrange(len(book)), sys.maxsize):
        sentence = book[i % len(book)]
        num_words -= len(sentence.split())
        if num_words < 0:
            return taken
        taken.append(sentence)
    return taken


def _question(what: str, names: list[str], found: dict[str, list[str]], num_values: int) -> Asked:
    who = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    several = len(names) * num_values > 1
    question = f"\nWhat {'are' if several else 'is'} the secret {what}{'s' * several} of {who}?"
    prefix = f" The secret {what}{'s' * several} of {who} {'are' if several else 'is'}"
    return question, prefix, tuple(value for name in names for value in found[name])


def _keys(rng: random.Random, kind: str, count: int) -> list[str]:
    if kind == "words":
        return distinct_pairs(rng, count)
    return [_value(rng, "uuid") for _ in range(count)]


def _value(rng: random.Random, kind: str) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
