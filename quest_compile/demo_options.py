"""The options of ``quest-compile demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.choices import DTYPES
from quest_compile.options import add_budget_argument, add_preset_argument, check_file
from quest_compile.quantize import add_quantize_argument
from quest_compile.real_model.find import find_model
from quest_compile.real_model.options import MODEL_HELP

RECALL_BUDGET = 256
EXAMPLES = """\
  quest-compile demo
  quest-compile demo --chat
  quest-compile demo --chat --cache-file book.kv
  quest-compile demo --model smollm2 --prompt-file long.txt --budget 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{MODEL_HELP}; default: smollm2, which reads a book")
    parser.add_argument("--chat", action="store_true", help="ask the book questions of your own")
    parser.add_argument(
        "--cache-file",
        type=Path,
        metavar="PATH",
        help="keep what was read of the book here, and do not read it again the next time",
    )
    parser.add_argument(
        "--recall", action="store_true", help="a tiny model shipped here, 32 questions, no network"
    )
    parser.add_argument("--prompt-file", type=Path, help="UTF-8 text to continue (with --model)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="with --model; default 64")
    add_budget_argument(parser, f"{DEFAULT_BUDGET} ({RECALL_BUDGET} with --recall)")
    add_preset_argument(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    add_quantize_argument(parser)
    parser.add_argument("--json", action="store_true", help="what was measured as JSON")


def check(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: options that do not fit together or have a bad value; no such model.
        OSError: there is no such file.
    """
    if args.recall and args.chat:
        raise ValueError("--chat asks the book, and --recall has none: leave one of them out")
    if args.json and args.chat:
        raise ValueError("--chat is for people, and --json for machines: leave one of them out")
    if args.cache_file is not None:
        if args.recall or args.model is not None:
            raise ValueError("--cache-file keeps the book: leave --recall and --model out")
        if args.device != "cpu":
            raise ValueError(f"--cache-file is for --device cpu, got {args.device}")
    if args.model is None:
        if args.prompt_file is not None:
            raise ValueError("--prompt-file needs --model")
        return
    if args.recall or args.chat:
        raise ValueError("--recall and --chat have models of their own: leave --model out")
    if args.prompt_file is None:
        raise ValueError("--model needs --prompt-file, the text to continue")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    check_file("--prompt-file", args.prompt_file)
    find_model(args.model)
