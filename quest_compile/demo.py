"""The demonstration: a book, records or your text, answered densely and with Quest."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

import torch

from quest_compile import recall
from quest_compile.backend import QuestBackend, backend
from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.decoding import prefill
from quest_compile.demo_options import RECALL_BUDGET
from quest_compile.inner import inner_compiler
from quest_compile.measure import Run, Step, Task, measure, print_comparison
from quest_compile.quantize import check_quantize, quantize
from quest_compile.real_model.load import load_model, load_tokenizer, warn_beyond_context
from quest_compile.text_files import read_text

_CONTEXT_TOKENS = 8192
_NUM_QUESTIONS = 32


def run(args: argparse.Namespace) -> int:
    """Run the demonstration and print what it found; 0 when it is done.

    Raises:
        ValueError: options that do not fit together or have a bad value.
        OSError: the model or the prompt file cannot be read.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device")
    check_quantize(args.quantize)
    if args.model is not None:
        demonstrate = _run_own_model
    else:
        demonstrate = _run_recall if args.recall else _run_book
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        found = demonstrate(args)
    if args.json:
        print(json.dumps(found, indent=1))
    return 0


def _run_book(args: argparse.Namespace) -> dict[str, Any]:
    from quest_compile.book import demo as book_demo

    quest = _backend_of(args, DEFAULT_BUDGET)
    if not book_demo.have_model(is_needed=args.chat or args.cache_file is not None):
        return _run_recall(args)
    return book_demo.run(args, quest)


def _run_recall(args: argparse.Namespace) -> dict[str, Any]:
    quest = _backend_of(args, RECALL_BUDGET)
    model = recall.load_model(dtype=getattr(torch, args.dtype), device=args.device)
    model = quantize(model, args.quantize)
    context = recall.make_context(_CONTEXT_TOKENS, _NUM_QUESTIONS, _NUM_QUESTIONS, seed=0)
    questions, wanted = context.questions.to(args.device), context.answers.tolist()
    print(
        f"A small recall model reads {_CONTEXT_TOKENS} tokens with {_NUM_QUESTIONS} records, "
        f"then answers {_NUM_QUESTIONS} questions.\n{_describe(model, args)}"
    )

    def answer(step: Step, number: int) -> list[int]:
        position, found = _CONTEXT_TOKENS, []
        for token in questions[number]:
            predicted = step(token.view(1, 1), position)
            position += 1
        found.append(int(predicted))
        while len(found) < len(wanted[number]):
            predicted = step(predicted, position)
            position += 1
            found.append(int(predicted))
        return found

    task = Task(
        model=model,
        cache=prefill(model, context.tokens[None].to(args.device), _CONTEXT_TOKENS + 16),
        length=_CONTEXT_TOKENS,
        first_token=questions[:1, :1],
        num_questions=_NUM_QUESTIONS,
        steps_per_question=len(questions[0]) + len(wanted[0]) - 1,
        answer=answer,
    )
    runs = _measure_both(quest, task, args)
    sparse, dense = (sum(a == w for a, w in zip(run.answers, wanted)) for run in runs)
    return print_comparison(*runs, quest, task, (sparse, dense), len(wanted))


def _run_own_model(args: argparse.Namespace) -> dict[str, Any]:
    quest = _backend_of(args, DEFAULT_BUDGET)
    text = read_text(args.prompt_file)
    tokenizer = load_tokenizer(args.model)
    model = quantize(load_model(args.model, args.dtype, args.device), args.quantize)
    prompt = tokenizer(text, return_tensors="pt").input_ids.to(args.device)
    length = prompt.shape[1] - 1
    if length < 1:
        raise ValueError(f"{args.prompt_file} gives {length + 1} tokens; need at least 2")
    warn_beyond_context(model.config, length + args.max_new_tokens)
    print(f"{args.model} continues {length + 1} tokens of {args.prompt_file}.")
    print(_describe(model, args))

    def answer(step: Step, number: int) -> list[int]:
        token, tokens = prompt[:, -1:], []
        for position in range(length, length + args.max_new_tokens):
            token = step(token, position)
            tokens.append(int(token))
        return tokens

    task = Task(
        model=model,
        cache=prefill(model, prompt[:, :-1], length + args.max_new_tokens),
        length=length,
        first_token=prompt[:, -1:],
        num_questions=1,
        steps_per_question=args.max_new_tokens,
        answer=answer,
    )
    runs = _measure_both(quest, task, args)
    for run in runs:
        print(f"[{run.name}] {tokenizer.decode(run.answers[0])}\n")
    same = sum(a == b for a, b in zip(runs[0].answers[0], runs[1].answers[0]))
    right = (same, args.max_new_tokens)
    return print_comparison(*runs, quest, task, right, args.max_new_tokens, "as dense")


def _backend_of(args: argparse.Namespace, default_budget: int) -> QuestBackend:
    budget = default_budget if args.budget is None else args.budget
    return backend(budget=budget, preset=args.preset)


def _measure_both(quest: QuestBackend, task: Task, args: argparse.Namespace) -> tuple[Run, Run]:
    """Quest, then dense through the compiler that Quest used; prints the report."""
    dense = inner_compiler("inductor", [task.first_token])
    runs = (
        measure(f"quest, budget {quest.config.budget}", quest, task),
        measure(f"dense, {dense}", dense, task),
    )
    print(f"\n{quest.report()}\n")
    return runs


def _describe(model: Any, args: argparse.Namespace) -> str:
    config = model.config.get_text_config(decoder=True)
    weights = f", {args.quantize} weights" if args.quantize else ""
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} query heads, {args.dtype}{weights} on {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
