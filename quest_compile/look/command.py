"""Decode an answer with Quest, keep what every step read, and write it down."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from quest_compile.backend import backend
from quest_compile.look.html import write_html
from quest_compile.look.looked import look_at
from quest_compile.options import settings_of
from quest_compile.reading import answer, print_piece, read
from quest_compile.real_model.load import load_model, load_tokenizer
from quest_compile.text_files import read_text


def run(args: argparse.Namespace) -> int:
    """Write the file; 0 when it is there.

    Raises:
        ValueError: a bad option, a text that is not UTF-8, or no layer was sparse.
        OSError: the model or the text cannot be read, or the file not be written.
    """
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        found = _look(args)
    if args.json:
        print(json.dumps(found, indent=1))
    return 0


def _look(args: argparse.Namespace) -> dict[str, Any]:
    quest = backend(**settings_of(args), audit=int(args.audit), record=True, inner="eager")
    text = read_text(args.prompt_file)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, "float32", "cpu")
    asked = tokenizer(args.ask, add_special_tokens=False).input_ids
    reading = read(model, tokenizer, text, len(asked) + args.max_new_tokens)
    config = quest.config
    budget = config.layer_budget(config.num_dense_layers, reading.length)
    if budget.covers(config.page_format.num_pages(reading.length)):
        raise ValueError(
            f"--budget: {config.budget} covers the {reading.length} tokens of the text, all "
            "of which is read: give a smaller one"
        )
    print("quest: ", end="", flush=True)
    looked = look_at(reading, quest, asked, args.max_new_tokens, print_piece)
    print()
    if args.dense:
        print("dense: ", end="", flush=True)
        looked.dense = answer(
            model, reading, asked, max_new_tokens=args.max_new_tokens, on_token=print_piece
        )
        print()
    write_html(looked, args.model, args.output)
    counted, layers = looked.counters, list(looked.steps[0].pages)
    print(
        f"{args.output}: {len(looked.steps)} tokens, {len(layers)} sparse layers; "
        f"{counted['sparse_calls']} sparse attention calls, at most "
        f"{counted['max_tokens_attended']} tokens per query of {reading.length}."
    )
    return {
        "file": str(args.output),
        "context_tokens": reading.length,
        "answer": looked.answer.text,
        "answer_tokens": len(looked.steps),
        "dense_answer": looked.dense and looked.dense.text,
        "sparse_layers": layers,
        "counters": counted,
    }
