"""``python -m quest_compile.bench NAME``: run one benchmark."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "ops": "single operators against scaled_dot_product_attention and a read loop",
    "overhead": "seconds the passes take, microseconds the runtime wrapper adds per step",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named first; the rest of ``argv`` is its own."""
    listing = "\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="quest-compile bench",
        description=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    module = importlib.import_module(f"quest_compile.bench.bench_{args.name}")
    return module.main(args.arguments)


if __name__ == "__main__":
    sys.exit(main())
