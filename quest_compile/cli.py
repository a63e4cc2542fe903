"""The command line: ``quest-compile demo | explain | eval | bench | fetch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import quest_compile
from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.config import PRESETS

# Exit status after Ctrl-C.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="quest-compile", description="Quest decoding as a torch.compile backend."
    )
    parser.add_argument("--version", action="version", version=quest_compile.__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    from quest_compile import demo
    from quest_compile.eval import options
    from quest_compile.eval.samples import NotActiveError
    from quest_compile.real_model import fetch
    from quest_compile.real_model.options import add_model_argument

    demo.add_arguments(
        commands.add_parser("demo", help="answer questions over a long context, sparse and dense")
    )
    explain = commands.add_parser("explain", help="what would be replaced in a model, and why not")
    add_model_argument(explain)
    explain.add_argument(
        "--budget",
        type=_budget,
        default=DEFAULT_BUDGET,
        help=f"tokens, or a share below 1; default {DEFAULT_BUDGET}",
    )
    explain.add_argument("--preset", choices=sorted(PRESETS), help="other defaults")
    options.add_arguments(
        commands.add_parser("eval", help="does Quest hurt a model? with statistics, per budget")
    )
    commands.add_parser("bench", help="benchmarks; see quest-compile bench --help", add_help=False)
    fetch.add_arguments(
        commands.add_parser("fetch", help="get a really trained small model, for --model")
    )

    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "demo":
            return demo.run(args)
        if args.command == "explain":
            return _explain(args)
        if args.command == "eval":
            from quest_compile.eval.cli import evaluate

            return evaluate(args)
        if args.command == "fetch":
            return fetch.run(args)
        from quest_compile.bench.__main__ import main as bench_main

        return bench_main(rest)
    except (ValueError, ImportError, OSError, NotActiveError) as error:
        print(f"quest-compile: {error}", file=sys.stderr)
        return 2


def _budget(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected tokens as 2048 or a share as 0.05, got {text!r}"
        ) from None


def _explain(args: argparse.Namespace) -> int:
    """Trace the model without weights: only its configuration is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quest_compile.real_model import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(args.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    print(quest_compile.explain(model, budget=args.budget, preset=args.preset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
