"""Decode with one compiler after the other, time every step, and print the comparison."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.decoding import greedy_step, rewind
from quest_compile.progress import progress_bar
from quest_compile.reading import Reading

# (token [1, 1], position) -> the next token [1, 1]
Step = Callable[[torch.Tensor, int], torch.Tensor]


@dataclasses.dataclass
class Run:
    """What one method did: its answers, the seconds of each steady step, and what was read.

    ``first_seconds``: from each question to the first token of its answer, where that was timed.
    """

    name: str
    answers: list[list[int]]
    compile_seconds: float
    step_seconds: list[float]
    counters: dict[str, int]
    first_seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions about one filled cache: ``answer(step, number)`` decodes the answer of one.

    Every answer starts with ``first_token`` [1, 1] (or another) at position ``length``.
    """

    model: Any
    cache: Any
    length: int
    first_token: torch.Tensor
    num_questions: int
    steps_per_question: int
    answer: Callable[[Step, int], list[int]]


def measure(name: str, compiler: Any, task: Task) -> Run:
    """Compile with one step, which is timed apart, then answer everything with a progress bar."""
    compiled = torch.compile(task.model, backend=compiler)
    seconds: list[float] = []

    def step(token: torch.Tensor, position: int) -> torch.Tensor:
        start = time.perf_counter()
        token = greedy_step(compiled, task.cache, token, position)
        if token.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        progress.update()
        return token

    answers = []
    print(f"\n[{name}] compiling ...", flush=True)
    with torch.no_grad():
        rewind(task.cache, task.length)
        start = time.perf_counter()
        greedy_step(compiled, task.cache, task.first_token, task.length)
        compile_seconds = time.perf_counter() - start
        ops.reset_counters()
        total = task.num_questions * task.steps_per_question
        with progress_bar(total, "step") as progress:
            progress.doing(f"[{name}]")
            for number in range(task.num_questions):
                rewind(task.cache, task.length)
                answers.append(task.answer(step, number))
    return Run(name, answers, compile_seconds, seconds, ops.counters())


def print_comparison(
    quest: Run,
    dense: Run,
    backend: QuestBackend,
    task: Task | Reading,
    right: tuple[int, int],
    num_answers: int,
    word: str = "right",
) -> dict[str, Any]:
    """The table of both runs, ``right`` being how many of the answers are, for each, and the proof
    of activity; the same for a machine."""
    config = backend.config
    num_pages = -(-task.length // config.page_size)
    dense_bytes = sum(
        cached[:, :, : task.length].nbytes
        for layer in task.cache.layers
        for cached in (layer.keys, layer.values)
    )
    names = ["answers", "tokens/s", "ms/step", "KV read/step", "tokens/query", "pages/query"]
    is_first_timed = bool(quest.first_seconds and dense.first_seconds)
    rows = [["", *names, *["first token"] * is_first_timed]]
    methods = []
    for run, num_right in ((quest, right[0]), (dense, right[1])):
        seconds, counted = statistics.median(run.step_seconds), run.counters
        bytes_read, tokens, pages = dense_bytes, str(task.length), str(num_pages)
        if counted["sparse_rows"]:
            bytes_read = counted["bytes_read"] // len(run.step_seconds)
            tokens = f"{counted['tokens_attended'] / counted['sparse_rows']:.0f}"
            budget = config.layer_budget(config.num_dense_layers, task.length)
            pages = f"{budget.pages} of {num_pages}"
        speed = (f"{1 / seconds:.0f}", f"{1e3 * seconds:.2f}")
        result = f"{num_right}/{num_answers} {word}"
        cells = [run.name, result, *speed, f"{bytes_read / 2**20:.2f} MiB", tokens, pages]
        if is_first_timed:
            cells.append(f"{statistics.median(run.first_seconds):.2f} s")
        rows.append(cells)
        methods.append(
            {
                "name": run.name,
                word: num_right,
                "step_seconds": seconds,
                "first_token_seconds": run.first_seconds,
                "compile_seconds": run.compile_seconds,
                "cache_bytes_read_per_step": bytes_read,
                "counters": counted,
            }
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"Compiling took {quest.compile_seconds:.0f} s and {dense.compile_seconds:.0f} s.")
    counted = quest.counters
    if counted["sparse_calls"]:
        print(
            f"Quest was active: {counted['sparse_calls']} sparse attention calls in "
            f"{len(quest.step_seconds)} steps, at most {counted['max_tokens_attended']} tokens "
            f"per query of {task.length}."
        )
    else:
        print("Quest was NOT active: no sparse attention call ran (see the report above).")
    return {
        "context_tokens": task.length,
        "answers": num_answers,
        "methods": methods,
        "report": backend.report().as_dict(),
    }
