"""The options of ``quest-compile look``."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_compile.options import add_budget_argument, add_preset_argument, check_file
from quest_compile.real_model.find import find_model
from quest_compile.real_model.options import MODEL_HELP

EXAMPLES = """\
  quest-compile look --model smollm2 --prompt-file book.txt --ask "The whale was" --budget 256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--prompt-file", type=Path, required=True, help="UTF-8 text that is read")
    parser.add_argument(
        "--ask", required=True, help="what follows the text; the model goes on from its end"
    )
    parser.add_argument("--output", type=Path, default=Path("look.html"), help="default look.html")
    add_budget_argument(parser)
    add_preset_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default 24")
    parser.add_argument(
        "--audit", action="store_true", help="how much attention the pages kept (slow)"
    )
    parser.add_argument("--dense", action="store_true", help="the dense answer beside it")
    parser.add_argument("--json", action="store_true", help="the file and what was read as JSON")


def check(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a bad value, no such text, model or folder of the output.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    check_file("--prompt-file", args.prompt_file)
    find_model(args.model)
    folder = args.output.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"--output: there is no folder {folder}")
