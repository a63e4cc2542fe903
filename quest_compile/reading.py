"""A text is read once into a cache; answers are decoded behind it, and the cache goes back."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.context_length import context_length
from quest_compile.decoding import greedy_step, prefill, rewind
from quest_compile.progress import progress_bar
from quest_compile.text_cache import TextCache

Step = Callable[..., Any]
# Tokens that go through the model at once while it reads: a bar that moves every few seconds.
_PART = 256
# What the tokenizer gives for half a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass
class Reading:
    """``cache`` holds the ``tokens`` [1, T] and has room for ``room`` more.

    ``seconds``: it took to read them, or to open the file where they had been read before.
    """

    model: Any
    tokenizer: Any
    tokens: torch.Tensor
    room: int
    cache: Any
    seconds: float
    is_reopened: bool = False

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@dataclasses.dataclass
class Answer:
    """``first_seconds``: from the question to the first token of the answer; ``step_seconds``: of
    every step, those that fed the question too."""

    question: list[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    first_seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)


def read(
    model: Any, tokenizer: Any, text: str, room: int, *, file: TextCache | None = None
) -> Reading:
    """Fill a new cache with the text, in parts, with a progress bar; or open the file that has it.

    Raises:
        ValueError: the text has no token, or with ``room`` more than the model can take; the file
            is of another model or text, or not to be opened for another reason.
        OSError: the file cannot be written.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids.to(model.device)
    length = ids.shape[1]
    limit = context_length(model.config) or sys.maxsize
    if not 1 <= length <= limit - room:
        raise ValueError(
            f"the text has {length} tokens; this model takes 1 to {limit - room}, "
            f"with room for {room} tokens of questions and answers"
        )
    start = time.perf_counter()
    if file is not None and file.path.exists():
        cache = file.reopened(model, ids, room)
        return Reading(model, tokenizer, ids, room, cache, time.perf_counter() - start, True)
    cache = None if file is None else file.new(model, length + room)
    with progress_bar(length, "token") as progress:
        progress.doing("reading")
        cache = prefill(model, ids, length + room, part=_PART, on_part=progress.update, cache=cache)
    if file is not None:
        cache.save(ids)
    return Reading(model, tokenizer, ids, room, cache, time.perf_counter() - start)


def answer(
    step: Step,
    reading: Reading,
    question: list[int],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    position: int | None = None,
    on_token: Callable[[Answer, str], None] = lambda made, piece: None,
    on_step: Callable[[], None] = lambda: None,
) -> Answer:
    """Decode the tokens of a question and an answer one by one, behind the text or at ``position``.

    Ends after ``max_new_tokens``, at an end of text (of the tokenizer or of the model's generation
    settings, which may have several), or at one of the texts ``stop``, which belongs to the answer.
    ``on_token`` gets each new token as the text it adds; ``on_step`` is called after every step,
    those of the question too.

    Raises:
        ValueError: the question is empty, or does not fit with its answer.
    """
    position = reading.length if position is None else position
    _check_room(reading, position, len(question), max_new_tokens)
    rewind(reading.cache, position)
    made = Answer(question)
    feeding, token = list(question), reading.tokens[:, -1:]
    ends = _ends(reading)
    begun = time.perf_counter()
    while len(made.tokens) < max_new_tokens:
        fed = reading.tokens.new_tensor([[feeding.pop(0)]]) if feeding else token
        start = time.perf_counter()
        with torch.no_grad():
            token = greedy_step(step, reading.cache, fed, position)
        number = int(token)
        made.step_seconds.append(time.perf_counter() - start)
        position += 1
        on_step()
        if feeding:
            continue
        made.first_seconds = made.first_seconds or time.perf_counter() - begun
        made.tokens.append(number)
        on_token(made, _new_text(reading.tokenizer, made))
        if number in ends or any(s in made.text for s in stop):
            break
    return made


def _ends(reading: Reading) -> set[int | None]:
    """Token ids."""
    settings = getattr(reading.model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    return {reading.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def _check_room(reading: Reading, position: int, num_asked: int, max_new_tokens: int) -> None:
    if not num_asked:
        raise ValueError("the question is empty")
    left = reading.length + reading.room - position
    if num_asked + max_new_tokens > left:
        raise ValueError(
            f"question and answer take {num_asked + max_new_tokens} tokens, and the cache has room "
            f"for {left}"
        )


def _new_text(tokenizer: Any, made: Answer) -> str:
    """What the last token adds; a character comes with the last of its tokens."""
    text = tokenizer.decode(made.tokens, skip_special_tokens=True)
    if text.endswith(_INCOMPLETE):
        return ""
    piece, made.text = text[len(made.text) :], text
    return piece


def print_piece(made: Answer, piece: str) -> None:
    """For ``on_token``: what comes, as it comes, in one line."""
    print(piece.replace("\n", " "), end="", flush=True)
