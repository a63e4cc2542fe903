"""The parser of every benchmark; nothing here imports torch, so that ``--help`` comes at once."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from pathlib import Path

from quest_compile.bench import options
from quest_compile.bench.shapes import listed
from quest_compile.options import Parser
from quest_compile.quantize import add_quantize_argument

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")


def ops() -> Parser:
    parser = options.parser_of("ops", _docstring("ops"), rounds=15, contexts="2K,4K,8K,32K")
    parser.add_argument("--page-sizes", type=options.int_list, default=[16])
    parser.add_argument("--isa", type=listed, help=f"compare levels, of {', '.join(LEVELS)}")
    parser.add_argument("--shapes", action="store_true", help="table of layer shapes and dtypes")
    parser.add_argument("--no-overhead", action="store_true", help="skip the cost of tiny calls")
    parser.add_argument("--no-llama-cpp", action="store_true", help="skip it where it is installed")
    return parser


def decode() -> Parser:
    contexts = "2K,8K,32K"
    parser = options.parser_of("decode", _docstring("decode"), rounds=64, contexts=contexts)
    parser.set_defaults(method_seconds=60.0)
    options.add_model_arguments(parser)
    add_quantize_argument(parser)
    parser.add_argument("--no-llama-cpp", action="store_true", help="skip it where it is installed")
    return parser


def prefill() -> Parser:
    contexts = "2K,8K,32K"
    parser = options.parser_of("prefill", _docstring("prefill"), rounds=5, contexts=contexts)
    parser.set_defaults(method_seconds=60.0)
    options.add_model_arguments(parser)
    return parser


def compile_() -> Parser:
    parser = options.parser_of("compile", _docstring("compile"), rounds=2, contexts="8K")
    options.add_model_arguments(parser)
    return parser


def memory() -> Parser:
    parser = options.parser_of("memory", _docstring("memory"), rounds=1, contexts="8K,32K")
    options.add_model_arguments(parser)
    return parser


def longrun() -> Parser:
    parser = options.parser_of("longrun", _docstring("longrun"), rounds=4000, contexts="4K")
    options.add_model_arguments(parser)
    return parser


def overhead() -> Parser:
    parser = _plain("overhead")
    options.add_output_arguments(parser)
    parser.add_argument("--max-load", type=float, default=0.25, help="cores others may use")
    return parser


def gpu_check() -> Parser:
    parser = _plain("gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it; default 8")
    parser.add_argument("--output", type=Path, help="folder; default: one in bench/results")
    parser.add_argument("--only", help="comma-separated names of steps (see --list)")
    parser.add_argument("--list", action="store_true", help="print the steps, run nothing")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: tiny shapes, proves no speed",
    )
    return parser


def report() -> Parser:
    parser = _plain("report")
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="folders of results")
    parser.add_argument(
        "--accuracy", type=Path, metavar="PATH", help="results of quest-compile eval"
    )
    parser.add_argument("--readme", type=Path, help="make the marked tables of this file anew")
    parser.add_argument("--no-plots", action="store_true")
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "ops": ops,
    "decode": decode,
    "prefill": prefill,
    "compile": compile_,
    "memory": memory,
    "longrun": longrun,
    "overhead": overhead,
    "gpu-check": gpu_check,
    "report": report,
}


def _plain(name: str) -> Parser:
    return Parser(prog=f"quest-compile bench {name}", description=_docstring(name))


def _docstring(name: str) -> str | None:
    """Of the benchmark, which says there how it measures; importing it would take seconds."""
    path = Path(__file__).with_name(f"bench_{name.replace('-', '_')}.py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
