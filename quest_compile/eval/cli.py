"""``quest-compile eval``: load, measure, print and write what came out."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import torch

from quest_compile import recall
from quest_compile.cli import INTERRUPTED
from quest_compile.config import QuestConfig
from quest_compile.context_length import context_length
from quest_compile.eval import plots
from quest_compile.eval.copy_tasks import copy_group, text_of
from quest_compile.eval.encode import Encoder
from quest_compile.eval.markdown import markdown
from quest_compile.eval.methods import parse_method
from quest_compile.eval.options import RECALL_MODEL
from quest_compile.eval.recall_tasks import recall_agreement, recall_group
from quest_compile.eval.records import Records
from quest_compile.eval.results import Row, rows_of
from quest_compile.eval.run import run
from quest_compile.eval.samples import AGREEMENT, COPY_TASKS, PERPLEXITY, RECALL, Group
from quest_compile.eval.settings import conditions_of, settings_of
from quest_compile.eval.summary import sentence
from quest_compile.eval.tasks import (
    answer_group,
    book_of,
    jsonl_groups,
    text_group,
)
from quest_compile.identity import identity
from quest_compile.quantize import quantize
from quest_compile.real_model.load import load_model, load_tokenizer


def evaluate(args: argparse.Namespace) -> int:
    """Run the evaluation; 0 when it is done, 130 when it was interrupted.

    Raises:
        ValueError: bad options, a bad file, or a task that does not fit the model.
        OSError: the model or a file cannot be read.
        NotActiveError: a method attended everything.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device")
    # Calls inside of CUDA graphs are not counted, and a method that is not seen to act is refused.
    counted = args.device == "cuda" and args.inner == "inductor"
    given = {name: getattr(args, name) for name in ("page_size", "num_dense_layers", "inner")}
    config = QuestConfig(
        inductor_options={"triton.cudagraphs": False} if counted else None,
        **{name: value for name, value in given.items() if value is not None},
    )
    args.page_size, args.num_dense_layers = config.page_size, config.num_dense_layers
    methods = [parse_method(name, config) for name in dict.fromkeys(args.methods)]
    for method in methods:
        for budget in [] if method.has_budget else args.budgets:
            config.replace({**dict(method.settings), "budget": budget})
    model, encoder = load(args)
    for method in methods:
        method.check_layers(model.config.get_text_config(decoder=True).num_hidden_layers)
    groups = make_groups(args, model, encoder)
    settings = settings_of(args, model, encoder)
    quantize(model, args.quantize)
    records = Records(args.out, settings, args.resume, conditions_of(identity()))
    status = 0
    try:
        run(model, encoder, groups, methods, args.budgets, config, records)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {len(records.lines)} cells are kept in {records.path}; "
            "the same command with --resume goes on",
            file=sys.stderr,
        )
        status = INTERRUPTED
    if records.lines:
        write_results(args, records, is_complete=not status)
    return status


def load(args: argparse.Namespace) -> tuple[Any, Encoder | None]:
    """The model in eval mode, and its tokenizer if it has one."""
    if args.model == RECALL_MODEL:
        return recall.load_model(getattr(torch, args.dtype), args.device), None
    model = load_model(args.model, args.dtype, args.device)
    try:
        return model, Encoder(load_tokenizer(args.model), not args.no_chat)
    except ValueError:
        return model, None


def make_groups(args: argparse.Namespace, model: Any, encoder: Encoder | None) -> list[Group]:
    """The contexts to measure.

    Raises:
        ValueError: a task does not fit the model or the lengths.
    """
    config = model.config.get_text_config(decoder=True)
    most = context_length(model.config) or sys.maxsize
    for length in args.lengths:
        if length > most:
            raise ValueError(f"--lengths {length}: the model has {most} positions")
    book = book_of(args.haystack)
    groups: list[Group] = []
    for name in args.tasks:
        for length in args.lengths:
            groups.append(_group(args, name, length, config.vocab_size, encoder, book))
    for path in args.jsonl:
        groups += jsonl_groups(path, args.samples, _needed(encoder, f"--jsonl {path}", args), most)
    for (task, length), count in Counter((g.task, g.length) for g in groups).items():
        if count > 1:
            raise ValueError(f"--tasks, --jsonl: {count} times task {task!r} of length {length}")
    return groups


def _group(
    args: argparse.Namespace,
    name: str,
    length: int,
    vocab_size: int,
    encoder: Encoder | None,
    book: list[str],
) -> Group:
    if name.startswith(RECALL):
        return recall_group(name, length, args.samples, vocab_size, args.seed)
    if name == AGREEMENT and args.model == RECALL_MODEL:
        return recall_agreement(length, args.samples, args.seed)
    encoder = _needed(encoder, name, args)
    if name in COPY_TASKS:
        return copy_group(name, text_of(args.text), length, args.samples, encoder)
    if name in (PERPLEXITY, AGREEMENT):
        if args.text is None:
            raise ValueError(f"task {name} needs a text: give one with --text FILE")
        return text_group(name, args.text, length, args.samples, args.decoded, encoder)
    return answer_group(name, length, args.samples, encoder, book, args.seed)


def _needed(encoder: Encoder | None, what: str, args: argparse.Namespace) -> Encoder:
    if encoder is None:
        why = "its folder must hold that too"
        if args.model == RECALL_MODEL:
            why = f"it reads symbols, not text: it answers --tasks {RECALL}N and {AGREEMENT}"
        raise ValueError(f"{what} needs a tokenizer, and {args.model} has none ({why})")
    return encoder


def write_results(
    args: argparse.Namespace, records: Records, is_complete: bool = True
) -> list[Row]:
    """JSON, Markdown and plots into the folder; the tables on the screen."""
    rows = rows_of(records.lines, args.margin / 100, args.loss_margin)
    margins = {"margin_points": args.margin, "loss_margin_nats": args.loss_margin}
    settings = records.settings | margins
    described = identity()
    said = sentence(records.lines)
    result = {
        "sentence": said,
        "identity": described,
        "settings": settings,
        "is_complete": is_complete,
        "conditions": records.conditions,
        "rows": [row.as_dict() for row in rows],
    }
    aside = sys.stderr if args.json else sys.stdout
    text = markdown(rows, described, settings, records.conditions, is_complete)
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(text, encoding="utf-8")
    print(json.dumps(result, indent=1) if args.json else text)
    written = ["results.json", "results.md", records.path.name]
    if plots.can_plot():
        written += [path.name for path in plots.plot(rows, args.out)]
    else:
        print(plots.MISSING, file=aside)
    print(f"wrote {', '.join(written)} in {args.out}", file=aside)
    print(said, file=aside)
    return rows
