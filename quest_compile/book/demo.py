"""A really trained model reads a book once and answers questions, densely and with Quest."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from quest_compile import book, ops
from quest_compile.backend import QuestBackend
from quest_compile.book.chat import chat
from quest_compile.decoding import greedy_step, rewind
from quest_compile.inner import inner_compiler
from quest_compile.measure import Run, print_comparison
from quest_compile.progress import waiting
from quest_compile.quantize import quantize
from quest_compile.reading import Reading, Step, answer, print_piece, read
from quest_compile.real_model import SOURCES, model_folder
from quest_compile.real_model.fetch import FetchError, fetch
from quest_compile.real_model.load import load_model, load_tokenizer
from quest_compile.text_cache import TextCache

NAME = "smollm2"
# For the questions, which take their places in turn, or for a conversation.
_ROOM = 128
_CHAT_ROOM = 1024


def have_model(is_needed: bool) -> bool:
    """Fetch the model unless it is here; if it cannot be had, say why in a line.

    Raises:
        FetchError: it cannot be had, and ``is_needed``.
    """
    folder = model_folder(NAME)
    if folder.is_dir():
        return True
    print(f"The model of this demonstration, {NAME}, is fetched once:", flush=True)
    try:
        fetch(SOURCES[NAME], folder)
    except FetchError as error:
        if is_needed:
            raise
        print(f"No {NAME}: {error}\nSo a tiny model answers instead, as with demo --recall.\n")
        return False
    return True


def run(args: argparse.Namespace, quest: QuestBackend) -> dict[str, Any]:
    """The model is here; what was measured, nothing of a chat."""
    folder = str(model_folder(NAME))
    tokenizer = load_tokenizer(folder)
    model = quantize(load_model(folder, args.dtype, args.device), args.quantize)
    print(
        f"SmolLM2-135M-Instruct (4-bit weights, computed in {args.dtype}) reads {book.TITLE}, with "
        f"{len(book.PLACED)} sentences placed in it.\n"
        f"{torch.get_num_threads()} threads on {args.device}.",
        flush=True,
    )
    # A file serves the questions and conversations alike.
    room = _CHAT_ROOM if args.chat or args.cache_file else _ROOM
    file = TextCache(args.cache_file, quest.config) if args.cache_file else None
    reading = read(model, tokenizer, book.text(), room, file=file)
    if reading.is_reopened:
        print(
            f"{args.cache_file}: its {reading.length} tokens were read before; opened in "
            f"{reading.seconds:.1f} s.",
            flush=True,
        )
    with_quest = torch.compile(model, backend=quest)
    if args.chat:
        chat(reading, with_quest, quest)
        return {}
    inner = inner_compiler(quest.config.inner, [reading.tokens])
    steps = {
        f"dense, {inner}": torch.compile(model, backend=inner),
        f"quest, budget {quest.config.budget}": with_quest,
    }
    return _ask_both(reading, steps, quest)


def _ask_both(reading: Reading, steps: dict[str, Step], quest: QuestBackend) -> dict[str, Any]:
    tasks = book.tasks()
    runs = [Run(name, [], _compile(name, step, reading), [], {}) for name, step in steps.items()]
    width = max(map(len, steps))
    ops.reset_counters()
    right = dict.fromkeys(steps, 0)
    for number, task in enumerate(tasks, 1):
        print(f"\n[{number}/{len(tasks)}] {task.begun} ...")
        for run in runs:
            print(f"  {run.name:{width}}  ... ", end="", flush=True)
            made = answer(
                steps[run.name],
                reading,
                reading.encode(task.prompt),
                max_new_tokens=task.max_new_tokens,
                stop=task.stop,
                on_token=print_piece,
            )
            is_right = task.is_right(made.text)
            right[run.name] += is_right
            print(f"  [{'right' if is_right else 'WRONG'}, {made.first_seconds:.1f} s]")
            run.answers.append(made.tokens)
            run.step_seconds += made.step_seconds
            run.first_seconds.append(made.first_seconds)
    dense, sparse = runs
    # Dense attention is transformers' own and calls none of our operators: all of this is Quest's.
    sparse.counters, dense.counters = ops.counters(), dict.fromkeys(ops.counters(), 0)
    print(f"\n{quest.report()}\n")
    if not reading.is_reopened:
        print(f"Reading the book took {reading.seconds:.0f} s, once for all questions.")
    num_right = (right[sparse.name], right[dense.name])
    return print_comparison(sparse, dense, quest, reading, num_right, len(tasks))


def _compile(name: str, step: Step, reading: Reading) -> float:
    """Seconds of the first step."""
    start = time.perf_counter()
    with torch.no_grad(), waiting(f"compiling, {name}"):
        rewind(reading.cache, reading.length)
        greedy_step(step, reading.cache, reading.tokens[:, -1:], reading.length)
    return time.perf_counter() - start
