"""``python -m quest_compile.bench NAME``: run one benchmark."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from quest_compile.bench.parsers import PARSERS
from quest_compile.cli import described
from quest_compile.options import Parser
from quest_compile.start import import_all

# bench/README.md begins its descriptions with these.
BENCHMARKS = {
    "ops": "single operators against scaled_dot_product_attention and a read loop",
    "decode": "whole models, a token per step, dense and with Quest side by side",
    "prefill": "attention of a prompt, and time to the first token of a whole model",
    "compile": "time to the first token, cold and warm, and seconds of the passes",
    "memory": "peak of a process, and what page summaries add",
    "longrun": "thousands of tokens: no step gets slower",
    "overhead": "seconds the passes take, microseconds the runtime wrapper adds per step",
    "gpu-check": "everything that needs a GPU: tests, compute-sanitizer, attention, end to end",
    "report": "tables and plots from results",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named first; the rest of ``argv`` is its own."""
    listing = "\n".join(f"  {name:15} {what}" for name, what in BENCHMARKS.items())
    parser = Parser(
        prog="quest-compile bench",
        description=f"benchmarks:\n{listing}",
        epilog="examples:\n  quest-compile bench ops --quick\n  quest-compile bench decode --help",
    )
    parser.add_argument("name", choices=BENCHMARKS, nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.add_argument("--list", action="store_true", help="print the benchmarks")
    args = parser.parse_args(argv)
    if args.list:
        print(listing)
        return 0
    if args.name is None:
        parser.error("which benchmark?")
    if {"-h", "--help"} & set(args.arguments):
        PARSERS[args.name]().parse_args(args.arguments)
    import_all()
    module_name = f"bench_{args.name.replace('-', '_')}"
    try:
        module = importlib.import_module(f"quest_compile.bench.{module_name}")
        return module.main(args.arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"quest-compile bench {args.name}: {described(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
