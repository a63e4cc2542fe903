"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quest_compile.bench.settings import MORE, QUEST, Setting
from quest_compile.bench.shapes import SHAPES, listed, tokens
from quest_compile.choices import DTYPES
from quest_compile.cli import INTERRUPTED
from quest_compile.options import Parser, budget
from quest_compile.real_model.options import MODEL_HELP

if TYPE_CHECKING:
    from quest_compile.bench.results import Recorder
    from quest_compile.bench.rounds import Rounds


def parser_of(name: str, description: str | None, *, rounds: int, contexts: str) -> Parser:
    """A parser with what all benchmarks take."""
    parser = Parser(
        prog=f"quest-compile bench {name}",
        description=description,
        epilog=f"examples:\n  quest-compile bench {name} --quick\n"
        f"  quest-compile bench {name} --contexts 8K --budgets 2K,0.05 --output results",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller: about two minutes on two cores")
    add("--list", action="store_true", help="print workloads and methods, measure nothing")
    add_output_arguments(parser)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", type=listed, help="comma-separated: float32, bfloat16, float16")
    add("--model-shape", choices=SHAPES, help="random weights of this shape")
    add("--contexts", type=token_list, default=token_list(contexts), help=f"such as {contexts}")
    add("--batch", type=int_list, default=[1], help="comma-separated batch sizes")
    add("--budgets", type=budget_list, default=[2048], help="comma-separated tokens, or shares")
    names = ", ".join(QUEST)
    add("--settings", type=listed, default=list(QUEST), help=f"of Quest; default {names}")
    add("--methods", type=listed, help="only these, comma-separated (see --list)")
    add("--threads", type=int_list, help="comma-separated numbers of threads; default: as torch")
    add("--rounds", type=int, default=rounds, help=f"samples per method; default {rounds}")
    add("--method-seconds", type=float, default=8.0, help="a slow method stops after so many")
    add("--max-load", type=float, default=0.25, help="cores others may use in a round that counts")
    return parser


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What recorder_of reads."""
    add = parser.add_argument
    add("--output", type=Path, help="folder for one pyperf JSON file per method")
    add("--record", action="store_true", help="--output bench/results/DATE_MACHINE_COMMIT_NAME")
    add(
        "--resume",
        action="store_true",
        help="keep what the folder has, measure what is missing or marked",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """For benchmarks of whole models."""
    parser.set_defaults(model_shape="llama-3.2-1b", quantize=None)
    parser.add_argument("--model", help=f"{MODEL_HELP}, instead of random weights")
    parser.add_argument("--layers", type=int, help="only the first layers of --model-shape")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Complete ``args``; exits with a message that names the option."""
    import torch

    args.dtype = args.dtype or ["bfloat16"]
    for name in args.dtype:
        if name not in DTYPES:
            parser.error(f"--dtype must be of {', '.join(DTYPES)}, got {name!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    for name in args.settings:
        if name not in QUEST | MORE:
            parser.error(f"--settings must be of {', '.join(QUEST | MORE)}, got {name!r}")
    layers, shape = getattr(args, "layers", None), SHAPES.get(args.model_shape or "")
    if layers is not None and shape is not None and not 1 <= layers <= shape.num_layers:
        parser.error(f"--layers must be from 1 to {shape.num_layers} here, got {layers}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.threads = args.threads or [torch.get_num_threads()]


def check_methods(
    parser: argparse.ArgumentParser, args: argparse.Namespace, known: list[str]
) -> None:
    """Exits with a message when ``--methods`` names another one."""
    for name in args.methods or ():
        if name not in known:
            parser.error(f"--methods must be of {', '.join(known)}, got {name!r}")


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Each of ``--settings`` with each budget, and page size where there is that option."""
    sizes = getattr(args, "page_sizes", [Setting.page_size])
    return [Setting(*s) for s in itertools.product(args.settings, args.budgets, sizes)]


def recorder_of(name: str, args: argparse.Namespace) -> Recorder:
    from quest_compile.bench.records import record_folder
    from quest_compile.bench.results import Recorder

    folder = args.output
    if folder is None and args.record:
        folder = record_folder(name)
    return Recorder(name, folder, resume=args.resume)


def rounds_of(args: argparse.Namespace) -> Rounds:
    from quest_compile.bench.rounds import Rounds

    return Rounds(args.rounds, args.method_seconds, args.max_load)


def token_list(text: str) -> list[int]:
    return [tokens(part) for part in listed(text)]


def budget_list(text: str) -> list[int | float]:
    return [budget(part) for part in listed(text)]


def int_list(text: str) -> list[int]:
    values = [int(part) if part.isdecimal() else 0 for part in listed(text)]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return values


def interrupted() -> int:
    """Say so after Ctrl-C; the exit status."""
    print("\ninterrupted: what is done is kept, --resume goes on", file=sys.stderr)
    return INTERRUPTED
