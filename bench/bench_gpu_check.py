"""Everything that needs a GPU, in one command: tests, compute-sanitizer, benchmarks.

Needs no network and builds nothing (Triton and Inductor compile what they need). The most important
steps come first; what the time does not allow is skipped and listed. Results are written after each
step: JSON and Markdown in --output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from quest_compile.bench import parsers
from quest_compile.bench.gpu_check.checks import FLASHINFER_ROWS
from quest_compile.bench.gpu_check.record import Record
from quest_compile.bench.gpu_check.steps import flashinfer_rows, steps_of
from quest_compile.bench.records import record_folder
from quest_compile.ops.cuda_providers import KERNELS_VARIABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a step failed; 2 without a GPU."""
    parser = parsers.gpu_check()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not args.list and not torch.cuda.is_available():
        print(
            "quest-compile bench gpu-check: torch sees no CUDA GPU here "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "--device cpu runs all of it on tiny shapes.",
            file=sys.stderr,
        )
        return 2
    steps = steps_of(args.device)
    if args.only:
        wanted = args.only.split(",")
        if wanted == [FLASHINFER_ROWS]:
            steps = [flashinfer_rows()]
        unknown = sorted(set(wanted) - {step.name for step in steps})
        if unknown:
            parser.error(f"--only: unknown step {', '.join(unknown)}; --list prints them")
        steps = [step for step in steps if step.name in wanted]
    if args.list:
        for step in steps:
            print(f"{step.name:24} about {step.seconds:3.0f} s  {step.title}")
        return 0
    folder = args.output or record_folder(_name_of(args.only))
    record = Record(folder, args.minutes * 60, {"minutes": args.minutes, "device": args.device})
    try:
        for step in steps:
            record.run(step)
    except KeyboardInterrupt:
        record.note("stopped by the user; what is above was measured")
    record.write()
    print(f"\nwrote {folder}/gpu-check.json and .md")
    return 1 if record.has_failures else 0


def _name_of(only: str | None) -> str:
    """Parts of it, and runs of other kernels, do not overwrite what the whole has found."""
    kernels = os.environ.get(KERNELS_VARIABLE)
    return "-".join(["gpu-check", *filter(None, [kernels, *(only or "").split(",")])])
