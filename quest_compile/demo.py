"""The demonstration: answer questions about a long context, with Quest and then densely."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quest_compile import ops, recall
from quest_compile.backend import backend
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill, rewind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTEXT_TOKENS = 8192
_NUM_QUESTIONS = 32


@dataclasses.dataclass
class Run:
    """What one method did: its answers, the seconds of each steady step, and what was read."""

    name: str
    answers: list[list[int]]
    compile_seconds: float
    step_seconds: list[float]
    counters: dict[str, int]

    @property
    def tokens_per_second(self) -> float:
        return 1 / statistics.median(self.step_seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``quest-compile demo``."""
    parser.add_argument(
        "--model", help="folder or hub name; default: the recall model shipped here"
    )
    parser.add_argument("--prompt-file", type=Path, help="UTF-8 text to continue (with --model)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="with --model; default 64")
    parser.add_argument("--budget", type=int, help="tokens; default 256 (2048 with --model)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration and print what it found; 0 when it is done.

    Raises:
        ValueError: options that do not fit together or have a bad value.
        OSError: the model or the prompt file cannot be read.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device")
    if args.model is None:
        if args.prompt_file is not None:
            raise ValueError("--prompt-file needs --model")
        return _run_recall(args)
    if args.prompt_file is None:
        raise ValueError("--model needs --prompt-file, the text to continue")
    if args.max_new_tokens < 2:
        raise ValueError(f"--max-new-tokens must be at least 2, got {args.max_new_tokens}")
    return _run_own_model(args)


def _run_recall(args: argparse.Namespace) -> int:
    quest = backend(budget=256 if args.budget is None else args.budget)
    model = recall.load_model(dtype=DTYPES[args.dtype], device=args.device)
    context = recall.make_context(_CONTEXT_TOKENS, _NUM_QUESTIONS, _NUM_QUESTIONS, seed=0)
    questions = context.questions.to(args.device)
    wanted = context.answers.tolist()
    print(
        f"A small recall model reads {_CONTEXT_TOKENS} tokens with {_NUM_QUESTIONS} records, "
        f"then answers {_NUM_QUESTIONS} questions.\n{_describe(model, args)}"
    )
    cache = prefill(model, context.tokens[None].to(args.device), _CONTEXT_TOKENS + 16)

    def answer(step: Callable[..., Any], number: int, seconds: list[float]) -> list[int]:
        rewind(cache, _CONTEXT_TOKENS)
        given, answer_tokens = questions[number], []
        token = given[:1]
        for i in range(len(given) + len(wanted[number]) - 1):
            token = _timed_step(step, cache, token.view(1, 1), _CONTEXT_TOKENS + i, seconds)
            if i >= len(given) - 1:
                answer_tokens.append(int(token))
            else:
                token = given[i + 1 : i + 2]
        return answer_tokens

    runs = [
        _measure(f"quest, budget {quest.config.budget}", quest, model, answer, _NUM_QUESTIONS),
        _measure("dense, torch.compile", "inductor", model, answer, _NUM_QUESTIONS),
    ]
    print(f"\n{quest.report()}\n")
    right = [sum(a == w for a, w in zip(r.answers, wanted)) for r in runs]
    _print_results(
        runs, quest.config, cache, _CONTEXT_TOKENS, [f"{n}/{len(wanted)}" for n in right]
    )
    return 0


def _run_own_model(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quest = backend(budget=2048 if args.budget is None else args.budget)
    text = args.prompt_file.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    model = model.to(args.device).eval()
    prompt = tokenizer(text, return_tensors="pt").input_ids.to(args.device)
    length = prompt.shape[1]
    if length < 2:
        raise SystemExit(
            f"quest-compile: {args.prompt_file} gives {length} tokens; need at least 2"
        )
    print(
        f"{args.model} continues {length} tokens of {args.prompt_file}.\n{_describe(model, args)}"
    )
    cache = prefill(model, prompt[:, :-1], length + args.max_new_tokens)

    def answer(step: Callable[..., Any], number: int, seconds: list[float]) -> list[int]:
        rewind(cache, length - 1)
        token, tokens = prompt[:, -1:], []
        for position in range(length - 1, length - 1 + args.max_new_tokens):
            token = _timed_step(step, cache, token, position, seconds)
            tokens.append(int(token))
        return tokens

    runs = [
        _measure(f"quest, budget {quest.config.budget}", quest, model, answer, 1),
        _measure("dense, torch.compile", "inductor", model, answer, 1),
    ]
    print(f"\n{quest.report()}\n")
    for r in runs:
        print(f"[{r.name}] {tokenizer.decode(r.answers[0])}\n")
    same = sum(a == b for a, b in zip(runs[0].answers[0], runs[1].answers[0]))
    _print_results(
        runs, quest.config, cache, length, [f"{same}/{args.max_new_tokens} as dense", "-"]
    )
    return 0


def _timed_step(
    step: Callable[..., Any], cache: Any, token: torch.Tensor, position: int, seconds: list[float]
) -> torch.Tensor:
    start = time.perf_counter()
    token = greedy_step(step, cache, token, position)
    if token.is_cuda:
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
    return token


def _measure(
    name: str,
    compiler: Any,
    model: Any,
    answer: Callable[[Callable[..., Any], int, list[float]], list[int]],
    num_questions: int,
) -> Run:
    """Compile on question 0 (not counted), then answer all questions with a progress bar."""
    from tqdm import tqdm

    step = torch.compile(model, backend=compiler)
    with torch.no_grad():
        start = time.perf_counter()
        print(f"\n[{name}] compiling ...", flush=True)
        answer(step, 0, [])
        compile_seconds = time.perf_counter() - start
        ops.reset_counters()
        seconds: list[float] = []
        progress = tqdm(range(num_questions), desc=f"[{name}]", unit="question", ncols=80)
        answers = [answer(step, number, seconds) for number in progress]
    return Run(name, answers, compile_seconds, seconds, ops.counters())


def _describe(model: Any, args: argparse.Namespace) -> str:
    config = model.config.get_text_config(decoder=True)
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} query heads, {args.dtype} on {args.device}, "
        f"{torch.get_num_threads()} threads"
    )


def _print_results(
    runs: list[Run], config: QuestConfig, cache: Any, context_tokens: int, right: list[str]
) -> None:
    num_pages = -(-context_tokens // config.page_size)
    caches = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    dense_bytes = sum(
        2 * layer.keys[:, :, :context_tokens].numel() * layer.keys.element_size()
        for layer in caches
    )
    header = (
        "",
        "right",
        "tokens/s",
        "ms/step",
        "KV read/step",
        "tokens/query",
        "pages/query",
        "compile",
    )
    rows = [header]
    for r, answers in zip(runs, right):
        steps, counted = len(r.step_seconds), r.counters
        bytes_read, tokens, pages = dense_bytes, str(context_tokens), str(num_pages)
        if counted["sparse_rows"]:
            bytes_read = counted["bytes_read"] // steps
            tokens = f"{counted['tokens_attended'] / counted['sparse_rows']:.0f}"
            pages = f"{config.page_budget} of {num_pages}"
        milliseconds = 1e3 * statistics.median(r.step_seconds)
        rows.append(
            (
                r.name,
                answers,
                f"{r.tokens_per_second:.0f}",
                f"{milliseconds:.2f}",
                f"{bytes_read / 2**20:.2f} MiB",
                tokens,
                pages,
                f"{r.compile_seconds:.0f} s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    counted = runs[0].counters
    print(
        f"\nQuest was active: {counted['sparse_calls']} sparse attention calls in "
        f"{len(runs[0].step_seconds)} steps, at most {counted['max_tokens_attended']} tokens "
        f"per query of {context_tokens}."
        if counted["sparse_calls"]
        else "\nQuest was NOT active: no sparse attention call ran (see the report above)."
    )
